"""Any module by the user's own code: compared by `evaluate`, and proven before it is published."""

import json
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.proof import outputs
from tests.pipeline.command import captured

TEXT = '''
import torch
from torch import nn

class Encoder(nn.Module):
    """A text encoder: token ids and a mask to one vector a text."""
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    def forward(self, ids, mask):
        hidden = self.layer(self.embed(ids), src_key_padding_mask=~mask)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"hidden": hidden * mask[..., None], "pooled": nn.functional.normalize(mean, dim=-1), "ids": ids}

def build():
    torch.manual_seed(0)
    return Encoder()

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        mask = torch.arange(7)[None] < torch.tensor([[7], [5], [3], [6]])
        yield {"ids": torch.randint(0, 50, (4, 7), generator=generator), "mask": mask}

def similarity(original, compressed):
    """How far the texts' similarities among each other have moved."""
    pairs = [(a["pooled"] @ a["pooled"].T, b["pooled"] @ b["pooled"].T) for a, b in zip(original, compressed)]
    return {"similarity_moved": max(float((a - b).abs().max()) for a, b in pairs)}
'''

SCENES = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(32, 5, 1))

def batches():
    return [torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(number)) for number in range(2)]

def same_class(original, compressed):
    pairs = list(zip(original, compressed))
    return sum(float((a.argmax(1) == b.argmax(1)).float().mean()) for a, b in pairs) / len(pairs)
"""


class Place:
    """A folder with a user's code, its weights, and a store."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        for name, code in (("text", TEXT), ("scenes", SCENES)):
            (folder / f"{name}.py").write_text(code)
            scope: dict = {}
            exec(code, scope)
            torch.save(scope["build"]().state_dict(), folder / f"{name}.pth")

    def run(self, *arguments: str) -> tuple[int, str, str]:
        return captured(self._capsys, *arguments)

    def compress(self, name: str, said: str = "") -> tuple[int, dict, str]:
        code = f"builder: '{name}.py:build', inputs: '{name}.py:batches'"
        text = f"profile: fast\nmodels:\n  - {{name: {name}, source: {name}.pth, {code}{said}}}\n"
        (self.folder / "m.yaml").write_text(text)
        status, out, err = self.run("compress", str(self.folder / "m.yaml"), "--executor", "inline", "--json")
        return status, json.loads(out)[0], err

    def evaluate(self, name: str, *more: str) -> tuple[int, str, str]:
        code = str(self.folder / f"{name}.py")
        against = ("--against", str(self.folder / f"{name}.pth"), "--builder", f"{code}:build")
        return self.run("evaluate", name, *against, "--inputs", f"{code}:batches", *more)


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
    return Place(tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "metric", "names"),
    [("text", "similarity", ["hidden", "pooled"]), ("scenes", "same_class", ["output"])],
)
def test_a_model_of_the_users_is_proven_and_evaluated(place: Place, name: str, metric: str, names: list[str]) -> None:
    code, row, err = place.compress(name, f", metric: '{name}.py:{metric}'")
    assert code == 0, err
    assert row["output_db"] > 20
    assert row["agreement_mean"] is None
    title = place.run("inspect", name)[1].splitlines()[0]
    assert f"outputs {row['output_db']:.1f} dB, cosine 0.99" in title
    found = json.loads(place.evaluate(name, "--metric", f"{place.folder / name}.py:{metric}", "--json")[1])
    assert [line["output"] for line in found["outputs"]] == names
    # The proof runs decoded weights, `evaluate` HyperLinear: the same to rounding.
    assert min(line["sqnr_db"] for line in found["outputs"]) == pytest.approx(row["output_db"], abs=0.2)
    assert found["batches"] == {"text": 3, "scenes": 2}[name]
    (value,) = found["metrics"].values()
    assert value < 0.1 if name == "text" else value > 0.9
    assert f"{next(iter(found['metrics']))} {value:g}"[:12] in title
    assert "SQNR dB" in place.evaluate(name)[1]


def test_a_target_for_the_outputs_is_found(place: Place) -> None:
    code, row, err = place.compress("scenes", ", target_output_db: 40, allocation: header")
    assert code == 0, err
    assert row["profile"] == "output 40 dB"
    assert 40 <= row["output_db"] < 41
    assert place.compress("scenes", ", target_output_db: 40, allocation: header")[1]["status"] == "up to date"


def test_a_floor_for_the_outputs_refuses(place: Place) -> None:
    code, row, err = place.compress("scenes", ", floor_output_db: 60")
    assert (code, row["status"]) == (12, "failed")
    assert "dB, floor_output_db is 60" in err


def test_batches_may_be_tensors_arguments_or_names() -> None:
    model = torch.nn.Bilinear(3, 4, 2)
    a, b = torch.ones(5, 3), torch.ones(5, 4)
    by_place, by_name = outputs.outputs_of(model, [(a, b), {"input1": a, "input2": b}])
    assert torch.equal(by_place, by_name)
    found = outputs.scores([by_place], [by_place])
    assert found["output"].row("output") == {"output": "output", "sqnr_db": None, "cosine": 1.0}


def test_a_known_error_has_its_figures() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    (score,) = outputs.scores([first], [first + torch.tensor([[0.0, 0.1], [0.2, 0.0]])]).values()
    assert score.row("o")["sqnr_db"] == 20.0
    assert score.cosine == pytest.approx(1 / 1.01**0.5, abs=1e-4)


BROKEN = """
import torch
def build(): return torch.nn.Linear(3, 3)
def nothing(): return []
def wrong(): return [torch.ones(2, 7)]
def fails(): raise KeyError("data")
def batches(): return [torch.ones(2, 3)]
def nan(original, compressed): return float("nan")
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "expected batches, got none"),
        ("wrong", "Linear fails on batch 0: RuntimeError"),
        ("fails", "KeyError: 'data'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_code_that_does_not_do_it_is_said(tmp_path: Path, function: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(BuilderError, match=said):
        outputs.outputs_of(torch.nn.Linear(3, 3), outputs.batches_of(f"{tmp_path / 'broken'}.py:{function}"))


def test_a_metric_that_is_no_number_and_outputs_without_any_are_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(BuilderError, match="expected finite numbers"):
        outputs.metrics_of(f"{tmp_path / 'broken'}.py:nan", [], [])
    with pytest.raises(BuilderError, match="no real tensors"):
        outputs.scores([torch.ones(3, dtype=torch.int64)], [torch.ones(3, dtype=torch.int64)])


def test_options_that_do_not_go_together_are_refused(place: Place) -> None:
    for more in (("--images", "x"), ("--fail-below", "0.5")):
        assert place.evaluate("text", *more)[0] == 2
    assert place.run("evaluate", "text", "--against", "x", "--images", "x", "--metric", "m:f")[0] == 2
