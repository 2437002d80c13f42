"""A version measured on int8 tensor cores: which layers suit that, what it costs, and how a reader gets it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from birkhoff.codec.errors import CodecError
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.pipeline.load.load import load_into
from birkhoff.pipeline.plan.proving import ProofTerms
from birkhoff.pipeline.proof.int8 import LEAST_DB
from birkhoff.pipeline.registry.documents import Agreement, Int8Record, ProofRecord
from tests.pipeline.proof.test_prove import Place, place  # noqa: F401  a fixture

NET = """
import torch
from torch import nn


class Heavy(nn.Module):
    def forward(self, x):
        return x * (1 + 99 * (torch.arange(x.shape[-1]) % 100 == 0))


def net():
    return nn.Sequential(nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 192), Heavy(), nn.Linear(192, 128))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 192, generator=generator) for _ in range(2)]
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    """Keys of a manifest for a model whose last layer's inputs have two columns that are a hundred times larger."""
    (tmp_path / "net.py").write_text(NET)
    space: dict = {}
    exec(NET, space)
    torch.manual_seed(0)
    torch.save(space["net"]().state_dict(), tmp_path / "net.pth")
    return "profile: fast, allocation: header, builder: 'net.py:net', inputs: 'net.py:batches'"


def test_layers_with_outliers_stay_in_float_and_readers_get_them_so(
    place: Place,  # noqa: F811
    net: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, rows, err = place.compress(f"{net}, compute: int8", name="net", source=tmp_path / "net.pth")
    assert code == 0, err
    assert "prove_int8" in rows[0]["stages"]
    said = json.loads(place.run("report", "--json")[1])["models"][0]["proof"]["int8"]
    assert said["layers"] == 2
    assert said["least_db"] > LEAST_DB
    assert list(said["in_float"]) == ["4.weight"]
    assert said["in_float"]["4.weight"] < LEAST_DB
    assert said["measured"]["output_db"] == pytest.approx(rows[0]["output_db"], abs=1)
    assert "on int8, 2 layers and 1 in float, outputs" in place.run("inspect", "net")[1].replace("\n", " ")

    space: dict = {}
    exec(NET, space)
    kinds = {}
    for compute in ("float", "int8", "proven"):
        model = space["net"]()
        load_into(model, "net", compute=compute)  # type: ignore[arg-type]
        kinds[compute] = [type(layer) for layer in model if not isinstance(layer, nn.Tanh | space["Heavy"])]
    assert kinds["int8"] == [Int8HyperLinear] * 3
    assert kinds["proven"] == [Int8HyperLinear, Int8HyperLinear, HyperLinear]
    assert kinds["float"] == [HyperLinear] * 3

    monkeypatch.chdir(tmp_path)
    lost = {}
    for compute in kinds:
        words = ["evaluate", "net", "--against", "net.pth", "--inputs", "net.py:batches", "--builder", "net.py:net"]
        code, out, err = place.run(*words, "--compute", compute, "--json")
        assert code == 0, err
        lost[compute] = json.loads(out)["outputs"][0]["sqnr_db"]
    assert lost["proven"] == said["measured"]["output_db"] > lost["int8"] + 1
    assert lost["float"] >= lost["proven"]


def test_what_was_not_proven_is_not_loaded_so(place: Place, net: str, tmp_path: Path) -> None:  # noqa: F811
    assert place.compress(net, name="net", source=tmp_path / "net.pth")[0] == 0
    space: dict = {}
    exec(NET, space)
    with pytest.raises(CodecError, match="was not measured on int8: publish it with `compute: int8`"):
        load_into(space["net"](), "net", compute="proven")
    # Asked for from now on, the version without is no longer what would be published.
    _, rows, _ = place.compress(f"{net}, compute: int8", name="net", source=tmp_path / "net.pth")
    assert rows[0]["status"] == "published"
    _, rows, _ = place.compress(f"{net}, compute: int8", name="net", source=tmp_path / "net.pth")
    assert rows[0]["status"] == "up to date"


def test_masks_on_int8_are_measured_and_counted_by_a_budget(place: Place) -> None:  # noqa: F811
    said = "max_bytes: 600KiB, floor_db: 6, profile: fast, floor_agreement: 0, compute: int8"
    code, rows, err = place.compress(said)
    assert code == 0, err
    assert rows[0]["stored_bytes"] <= 600 << 10
    proof = json.loads(place.run("report", "--json")[1])["models"][0]["proof"]
    assert proof["int8"]["layers"] + len(proof["int8"]["in_float"]) > 10
    assert proof["int8"]["measured"]["agreement_mean"] == pytest.approx(proof["measured"]["agreement_mean"], abs=0.03)


def test_masks_on_int8_are_held_to_the_floor() -> None:
    found, lower = (Agreement(inputs=1, prompts=9, agreement_mean=mean) for mean in (0.9, 0.7))
    record = ProofRecord(adapter="sam", measured=found, int8=Int8Record(layers=3, measured=lower))
    terms = ProofTerms(floor_agreement=0.8, compute="int8")
    assert "masks on int8 with the original's is 0.7" in (terms.complaint(record) or "")
    assert not terms.met_by(record)
    assert ProofTerms(floor_agreement=0.8).complaint(record.model_copy(update={"int8": None})) is None
    assert not ProofTerms(compute="int8").met_by(record.model_copy(update={"int8": None}))
