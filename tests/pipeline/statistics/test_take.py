"""Statistics of a small model: taken once, found again, and never of another model than the checkpoint's."""

from dataclasses import replace

import pytest
import torch

from birkhoff.codec.errors import TensorError
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.packing import unpack
from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.registry.documents import blob_key, statistics_key
from birkhoff.pipeline.statistics import take
from birkhoff.pipeline.statistics.take import take_statistics
from birkhoff.pipeline.statistics.task import COUNTS, key_of
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.memory import MemoryStore
from tests.pipeline.statistics.places import HESSIANS, Place

CPU = torch.device("cpu")


@pytest.fixture
def kept() -> Store:
    return MemoryStore()


def test_what_is_taken_is_kept_and_found_by_the_next(
    place: Place, kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = place.task()
    found = take_statistics(task, kept, CPU)
    record = found.record
    assert (found.reused, record.pictures, record.probes, record.device) == (False, 3, COUNTS[-1].pictures // 3, "cpu")
    assert record.key == key_of(task.source_sha256, task.subject, COUNTS[-1])
    assert {"build", "read", "statistics", "upload"} <= found.stages.keys()
    tensors = {tensor.name for tensor in task.checkpoint.tensors}
    assert record.sensitivities.keys() == record.rms.keys() == tensors
    assert all(value > 0 for value in record.sensitivities.values())
    assert {name: one.columns for name, one in record.hessians.items()} == HESSIANS
    for one in record.hessians.values():
        hessian = unpack(kept.get(blob_key(one.blob)), one.columns, one.rows)
        for factor in (hessian.columns, hessian.rows):
            assert factor is not None
            assert float(torch.linalg.eigvalsh(factor.double()).min()) > -1e-4
            assert float(factor.diagonal().mean()) == pytest.approx(1, rel=1e-2)
    monkeypatch.setattr(take, "built_model", lambda *_: pytest.fail("built again"))
    for reuse in ("trust", "prove", "revalidate"):
        again = take_statistics(place.task(reuse=reuse), kept, CPU)
        assert (again.reused, again.record) == (True, record)


def test_taken_twice_they_are_the_same_bytes(place: Place, kept: Store) -> None:
    first = take_statistics(place.task(), kept, CPU).record
    again = take_statistics(place.task(reuse="never"), kept, CPU)
    assert (again.reused, again.record) == (False, first)
    body = kept.get(statistics_key(first.key))
    other = MemoryStore()
    assert take_statistics(place.task(), other, CPU).record.to_bytes() == body


def test_those_of_a_better_device_are_taken_where_they_are(place: Place, kept: Store) -> None:
    task = place.task()
    ours = take_statistics(task, kept, CPU).record
    better = ours.model_copy(update={"key": key_of(task.source_sha256, task.subject, COUNTS[0]), "device": "cuda"})
    kept.create(statistics_key(better.key), better.to_bytes())
    assert take_statistics(task, kept, CPU).record == better


@pytest.mark.parametrize("wrong", ["a tensor is missing", "a Hessian of another shape", "a Hessian of no tensor"])
def test_those_of_other_tensors_are_named_and_taken_anew(
    place: Place, kept: Store, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = place.task()
    record = take_statistics(task, kept, CPU).record
    if wrong == "a tensor is missing":
        forged = {"rms": {name: value for name, value in record.rms.items() if name != "2.weight"}}
    else:
        hessian = record.hessians["4.weight"]
        forged = {"hessians": {"2.weight" if wrong.endswith("shape") else "5.weight": hessian}}  # type: ignore[dict-item]
    kept.put(statistics_key(record.key), record.model_copy(update=forged).to_bytes())
    again = take_statistics(task, kept, CPU)
    assert (again.reused, again.record) == (False, record)
    assert "are of other tensors than" in caplog.text
    assert kept.get(statistics_key(record.key)) == record.to_bytes()


def test_names_that_a_wrapper_has_put_a_prefix_before_are_felt(place: Place, kept: Store) -> None:
    state = torch.load(place.folder / "net.pth", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, place.folder / "net.pth")
    record = take_statistics(place.task(), kept, CPU).record
    assert {name: one.columns for name, one in record.hessians.items()} == {
        f"module.{name}": columns for name, columns in HESSIANS.items()
    }
    assert record.sensitivities.keys() == {f"module.{name}" for name in state}


def test_one_parameter_under_two_names_is_felt_under_both(place: Place, kept: Store) -> None:
    (place.folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first = nn.Linear(48, 48, bias=False)\n"
        "        self.second = nn.Linear(48, 48, bias=False)\n"
        "        self.second.weight = self.first.weight\n"
        "        self.register_buffer('table', torch.rand(40, 40))\n"
        "    def forward(self, x):\n"
        "        return self.second(torch.relu(self.first(x)))\n\n"
        "def build():\n    torch.manual_seed(0)\n    return Tied()\n\n"
        "def batches():\n    return [torch.rand(5, 48)]\n"
    )
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    state = {"first.weight": weight, "second.weight": weight.clone(), "table": torch.rand(40, 40)}
    torch.save(state, place.folder / "net.pth")
    record = take_statistics(place.task(), kept, CPU).record
    assert record.hessians.keys() == {"first.weight", "second.weight"}
    assert record.hessians["first.weight"] == record.hessians["second.weight"]
    assert record.sensitivities.keys() == {"first.weight", "second.weight"}
    assert record.rms.keys() == state.keys()


def test_a_model_that_does_not_run_is_refused_with_the_way_out(place: Place, kept: Store) -> None:
    def refused(task: object, match: str) -> None:
        with pytest.raises(BuilderError, match=match + r".*or name another `allocation`, which needs no code"):
            take_statistics(task, kept, CPU)  # type: ignore[arg-type]

    refused(place.task(replace(place.subject, builder=f"{place.folder}/net.py:absent")), "no function 'absent'")
    (place.folder / "net.py").write_text(
        "from torch import nn\nimport torch\n"
        "def build():\n    return nn.Linear(3, 4)\n\ndef batches():\n    return [torch.rand(2, 3)]\n"
    )
    refused(place.task(), "does not fit the model")
    assert not list(kept.list())


def test_weights_that_are_not_finite_are_named(place: Place, kept: Store) -> None:
    state = torch.load(place.folder / "net.pth", weights_only=True)
    state["4.weight"][0, 0] = torch.inf
    torch.save(state, place.folder / "net.pth")
    with pytest.raises(TensorError, match=r"'4\.weight' holds NaN or Inf"):
        take_statistics(place.task(), kept, CPU)


def test_of_an_interrupted_pass_no_record_is_left(place: Place, kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = take.keep_hessian

    def dies(store: Store, hessian: Hessian) -> object:
        if len(hessian.columns) == HESSIANS["4.weight"]:
            raise KeyboardInterrupt
        return keep(store, hessian)

    monkeypatch.setattr(take, "keep_hessian", dies)
    with pytest.raises(KeyboardInterrupt):
        take_statistics(place.task(), kept, CPU)
    assert [info.key.split("/")[0] for info in kept.list()] == ["blobs"]
    monkeypatch.setattr(take, "keep_hessian", keep)
    assert not take_statistics(place.task(), kept, CPU).reused


def test_one_hessian_is_in_memory_beside_those_of_the_pass(
    place: Place, kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is packed, stored and given up before the next is made, however many there are."""
    import weakref

    alive: list[weakref.ref] = []
    keep = take.keep_hessian

    def counted(store: Store, hessian: Hessian) -> object:
        assert not [other for other in alive if other() is not None]
        alive.append(weakref.ref(hessian.columns))
        return keep(store, hessian)

    monkeypatch.setattr(take, "keep_hessian", counted)
    take_statistics(place.task(), kept, CPU)
    assert len(alive) == len(HESSIANS)
