"""The executor starts beside the planning if a model is new, and not at all if nothing is to be made. Digests are taken
and versions published beside the encoding."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.errors import SourceError, WorkerError
from birkhoff.pipeline.interrupt import Interrupted, pause
from birkhoff.pipeline.plan.manifest import Manifest, load_manifest
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.registry.versions import Version, latest_version
from birkhoff.pipeline.run import compress as module
from birkhoff.pipeline.run.demand import Demand
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.store.base import Store, StoreAddress
from tests.patience import PATIENT_SECONDS


class Noting(InlineExecutor):
    """Says in `events` when it starts and ends, and who holds a lease when it ends."""

    def __init__(self, store: Store, events: list[str], started: threading.Event) -> None:
        super().__init__(store.address)
        self._opened, self._events = store, events
        events.append("start")
        started.set()

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        if len(queue):  # a run is continued, if only to see what was published meanwhile
            self._events.append("run")
        yield from super().run(queue)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        leases = [found.key for found in self._opened.list("runs/open/")]
        self._events.append("end, leased" if leases else "end")
        super().__exit__(kind, error, at)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name in "ab":
        save_file({"w": torch.randn(64, 64)}, tmp_path / f"{name}.safetensors")
    path = tmp_path / "m.yaml"
    path.write_text(
        "proof: false\nallocation: uniform\nmodels:\n"
        "  - {name: a, source: a.safetensors}\n  - {name: b, source: b.safetensors}\n"
    )
    return load_manifest(path)


def run(manifest: Manifest, store: Store, events: list[str], started: threading.Event) -> list[ModelRun]:
    with Progress(Console(quiet=True), models=2) as progress:
        return module.compress(manifest, store, lambda _: Noting(store, events, started), progress)


def test_the_executor_starts_while_models_are_looked_at(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled, events, started = Planned.scaled, list[str](), threading.Event()

    def waiting(planned: Planned) -> Planned:
        assert started.wait(PATIENT_SECONDS)
        return scaled(planned)

    monkeypatch.setattr(Planned, "scaled", waiting)
    assert [one.status for one in run(manifest, directory_store, events, started)] == ["published", "published"]
    assert events == ["start", "run", "end, leased"]


@pytest.mark.parametrize(
    ("lines", "gpu"),
    [("proof: false", False), ("proof: false\nprofile: match-paper", True), ("proof: true", True)],
)
def test_the_executor_is_told_what_the_run_asks_of_it(
    lines: str, gpu: bool, tmp_path: Path, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Demand] = []

    def start(demand: Demand) -> Noting:
        told.append(demand)
        return Noting(directory_store, [], threading.Event())

    save_file({"w": torch.randn(64, 64)}, tmp_path / "a.safetensors")
    (tmp_path / "m.py").write_text("def build(): ...\ndef inputs(): ...\n")
    path = tmp_path / "m.yaml"
    path.write_text(
        f"{lines}\nmodels:\n  - {{name: a, source: a.safetensors, builder: m.py:build, inputs: m.py:inputs}}\n"
    )
    with Progress(Console(quiet=True), models=1) as progress:
        module.compress(load_manifest(path), directory_store, start, progress)
    assert told == [Demand(nbytes=(tmp_path / "a.safetensors").stat().st_size, gpu=gpu)]


def test_what_can_begin_ahead_is_told_of_the_models_that_are_new(
    manifest: Manifest, directory_store: Store, tmp_path: Path
) -> None:
    told: list[int] = []

    def make(manifest: Manifest) -> list[ModelRun]:
        events, started = list[str](), threading.Event()
        start = lambda _: Noting(directory_store, events, started)  # noqa: E731
        with Progress(Console(quiet=True), models=2) as progress:
            return module.compress(manifest, directory_store, start, progress, ahead=told.append)

    make(manifest)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert told == [size, 2 * size]
    make(manifest)
    assert told == [size, 2 * size]


def test_nothing_starts_where_all_is_up_to_date(manifest: Manifest, directory_store: Store) -> None:
    run(manifest, directory_store, [], threading.Event())
    events: list[str] = []
    assert {one.status for one in run(manifest, directory_store, events, threading.Event())} == {"up to date"}
    assert events == []


def test_a_model_of_which_there_is_a_version_is_looked_at_first(
    manifest: Manifest, directory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(manifest, directory_store, [], threading.Event())
    save_file({"w": torch.randn(64, 64)}, tmp_path / "b.safetensors")
    digest, events, started = module.checkpoint_digest, list[str](), threading.Event()

    def seen(checkpoint: Checkpoint) -> str:
        assert not started.is_set()
        return digest(checkpoint)

    monkeypatch.setattr(module, "checkpoint_digest", seen)
    assert [one.status for one in run(manifest, directory_store, events, started)] == ["up to date", "published"]
    assert events == ["start", "run", "end, leased"]


def test_a_run_that_is_to_stop_begins_no_more_models(
    tmp_path: Path, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = 20 * processors()
    entries = [f"  - {{name: m{number}, source: m{number}.safetensors}}" for number in range(models)]
    path = tmp_path / "m.yaml"
    path.write_text("\n".join(["models:", *entries]))
    begun: list[str] = []

    def plan(_job: object, run: ModelRun, _plan: object) -> bool:
        begun.append(run.name)
        if len(begun) == 1:
            raise Interrupted
        time.sleep(0.1)
        return False

    monkeypatch.setattr(module, "_plan", plan)
    with pytest.raises(Interrupted):
        run(load_manifest(path), directory_store, [], threading.Event())
    assert len(begun) < models / 2


def test_an_executor_that_was_started_for_nothing_ends(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(planned: Planned) -> Planned:
        raise SourceError(f"{planned.checkpoint.path}: cannot be read")

    monkeypatch.setattr(Planned, "scaled", broken)
    events: list[str] = []
    assert {one.status for one in run(manifest, directory_store, events, threading.Event())} == {"failed"}
    assert events == ["start", "end"]


def test_new_models_are_encoded_while_their_digests_are_taken(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, take, encoded, order = module.checkpoint_digest, module._take, set[str](), list[str]()
    both = threading.Event()

    def waiting(checkpoint: Checkpoint) -> str:
        order.append(checkpoint.path.stem)
        assert both.wait(PATIENT_SECONDS)
        return digest(checkpoint)

    def note(one: ModelRun, outcome: Outcome) -> list[Task]:
        encoded.add(one.name)
        if encoded == {"a", "b"}:
            both.set()
        return take(one, outcome)

    monkeypatch.setattr(module, "checkpoint_digest", waiting)
    monkeypatch.setattr(module, "_take", note)
    save_file({"w": torch.randn(128, 64)}, manifest.models[0].source[0].urls[0])
    runs = run(manifest, directory_store, [], threading.Event())
    assert [one.status for one in runs] == ["published", "published"]
    assert order[0] == "b"  # the smaller one
    for one in runs:
        assert one.version is not None
        assert one.planned is not None
        assert one.version.manifest.source.sha256 == one.source_sha256 == digest(one.planned.checkpoint)


def test_a_model_is_published_while_others_are_encoded(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, publish, second = module._take, module.publish, threading.Event()
    taken: list[str] = []

    def note(one: ModelRun, outcome: Outcome) -> list[Task]:
        taken.append(one.name)
        if len(set(taken)) == 2:
            second.set()
        return take(one, outcome)

    def waiting(*arguments: Any, **options: Any) -> Version:
        assert second.wait(PATIENT_SECONDS)
        return publish(*arguments, **options)

    monkeypatch.setattr(module, "_take", note)
    monkeypatch.setattr(module, "publish", waiting)
    assert [one.status for one in run(manifest, directory_store, [], threading.Event())] == ["published", "published"]


def test_a_source_that_changes_while_its_digest_is_taken_is_not_published(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, take, encoded = module.checkpoint_digest, module._take, threading.Event()

    def late(checkpoint: Checkpoint) -> str:
        assert encoded.wait(PATIENT_SECONDS)
        if checkpoint.path.stem == "a":
            save_file({"w": torch.zeros(64, 64)}, checkpoint.path)
        return digest(checkpoint)

    def note(one: ModelRun, outcome: Outcome) -> list[Task]:
        try:
            return take(one, outcome)
        finally:
            encoded.set()

    monkeypatch.setattr(module, "checkpoint_digest", late)
    monkeypatch.setattr(module, "_take", note)
    first, second = run(manifest, directory_store, [], threading.Event())
    assert (first.status, second.status) == ("failed", "published")
    assert "changed while it was being compressed" in str(first.error)


@pytest.mark.parametrize("all_fail", [False, True])
def test_the_digest_of_a_model_that_failed_is_not_waited_for(
    manifest: Manifest, directory_store: Store, all_fail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, given_up = module.checkpoint_digest, threading.Event()

    def endless(checkpoint: Checkpoint) -> str:
        if checkpoint.path.stem != "a":
            return digest(checkpoint)
        try:
            while True:
                pause(0.01)
        finally:
            given_up.set()

    def fail(one: ModelRun, outcome: Outcome) -> list[Task]:
        if all_fail:
            raise WorkerError("no workers any more")
        if one.name == "a":
            one.fail(SourceError("a cannot be read"))
            return []
        return take(one, outcome)

    take = module._take
    monkeypatch.setattr(module, "checkpoint_digest", endless)
    monkeypatch.setattr(module, "_take", fail)
    if all_fail:
        with pytest.raises(WorkerError):
            run(manifest, directory_store, [], threading.Event())
    else:
        assert [one.status for one in run(manifest, directory_store, [], threading.Event())] == ["failed", "published"]
    assert given_up.is_set()


def test_what_is_whole_is_published_although_the_run_ends(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, go_on = module.publish, threading.Event()
    runs: list[ModelRun] = []

    class Dying(Noting):
        def run(self, queue: TaskQueue) -> Iterator[Outcome]:
            yield from super().run(queue)
            go_on.set()
            raise WorkerError("no workers any more")

    def waiting(*arguments: Any, **options: Any) -> Version:
        assert go_on.wait(PATIENT_SECONDS)
        return publish(*arguments, **options)

    monkeypatch.setattr(module, "publish", waiting)
    monkeypatch.setattr(module, "_PUBLISHERS", 1)
    with Progress(Console(quiet=True), models=2) as progress, pytest.raises(WorkerError):
        module.compress(
            manifest,
            directory_store,
            lambda _: Dying(directory_store, [], threading.Event()),
            progress,
            begun=runs.extend,
        )
    assert [(one.status, one.seconds > 0) for one in runs] == [("published", True)] * 2


def test_a_model_whose_digest_cannot_be_taken_is_not_published(
    manifest: Manifest, directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = module.checkpoint_digest

    def broken(checkpoint: Checkpoint) -> str:
        if checkpoint.path.stem == "a":
            raise SourceError(f"{checkpoint.path}: cannot be read")
        return digest(checkpoint)

    monkeypatch.setattr(module, "checkpoint_digest", broken)
    first, second = run(manifest, directory_store, [], threading.Event())
    assert (first.status, second.status) == ("failed", "published")
    assert "a.safetensors: cannot be read" in str(first.error)
    assert [name for name in ("a", "b") if latest_version(directory_store, name)] == ["b"]


def test_a_worker_starts_its_gpu_before_its_first_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from birkhoff.pipeline.run import worker

    started: list[tuple[str, torch.device]] = []
    told = threading.Event()

    def serves(device: torch.device) -> bool:
        started.append((threading.current_thread().name, device))
        told.set()
        return True

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(worker, "triton_serves", serves)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    address = StoreAddress.parse((tmp_path / "store").as_uri())
    worker.Worker(address)
    assert told.wait(PATIENT_SECONDS)
    assert started == [("warm-up", torch.device("cuda", 0))]


def test_a_worker_without_a_share_of_a_gpu_sees_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from birkhoff.pipeline.run.worker import Worker

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    address = StoreAddress.parse((tmp_path / "store").as_uri())
    Worker(address)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    Worker(address, gpu=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
