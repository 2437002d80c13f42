"""Which executor a run gets, and when Ray starts for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.errors import ClusterError
from birkhoff.pipeline.plan.manifest import SHARD_SECONDS, load_manifest
from birkhoff.pipeline.run import choice as module
from birkhoff.pipeline.run import demand, inline, ray
from birkhoff.pipeline.run.choice import Choice
from birkhoff.pipeline.run.demand import START_BYTES, Demand, Outlook, look_ahead
from birkhoff.pipeline.store.base import Store, StoreAddress

SMALL, LARGE = Demand(nbytes=START_BYTES, gpu=False), Demand(nbytes=START_BYTES + 1, gpu=False)


class Cluster:
    """Stands for Ray's."""

    def __init__(self) -> None:
        self.closed = False
        self.asked: list[int | None] = []

    def start_processes(self, _store: StoreAddress, asked: int | None) -> None:
        self.asked.append(asked)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """Every cluster that was started. Executors are what they were made with."""
    started: list[Cluster] = []

    def start(_address: str | None) -> Cluster:
        started.append(Cluster())
        return started[-1]

    monkeypatch.setattr(module, "start_cluster", start)
    monkeypatch.setattr(ray, "RayExecutor", lambda _, **given: ("ray", given))
    monkeypatch.setattr(inline, "InlineExecutor", lambda _, **given: ("threads", given))
    return started


def choice(tmp_path: Path, **given: Any) -> Choice:
    usual: dict[str, Any] = {
        "ray": None,
        "address": None,
        "workers": None,
        "shard_seconds": None,
        "told": lambda reason: pytest.fail(reason),
    }
    return Choice(StoreAddress.parse(tmp_path.as_uri()), **{**usual, **given})


def kind(executor: Any) -> str:
    return str(executor[0])


@pytest.mark.parametrize(
    ("given", "small", "large"),
    [
        ({}, "threads", "ray"),
        ({"ray": True}, "ray", "ray"),
        ({"ray": False}, "threads", "threads"),
        ({"ray": False, "workers": 3}, "threads", "threads"),
        ({"workers": 3}, "ray", "ray"),
        ({"address": "here:1"}, "ray", "ray"),
        ({"shard_seconds": 9.0}, "ray", "ray"),
    ],
)
@pytest.mark.usefixtures("clusters")
def test_threads_run_what_they_suffice_for(tmp_path: Path, given: dict[str, Any], small: str, large: str) -> None:
    assert [kind(choice(tmp_path, **given).start(demand)) for demand in (SMALL, LARGE)] == [small, large]


def test_ray_starts_ahead_once_enough_is_planned(tmp_path: Path, clusters: list[Cluster]) -> None:
    with choice(tmp_path) as chosen:
        chosen.ahead(SMALL.nbytes)
        assert not clusters
        chosen.ahead(LARGE.nbytes, workers=True)
        chosen.ahead(2 * LARGE.nbytes, workers=True)
        executor: Any = chosen.start(Demand(nbytes=3 * LARGE.nbytes, gpu=True))
    (cluster,) = clusters
    assert executor == ("ray", {"cluster": cluster, "workers": None, "shard_seconds": SHARD_SECONDS, "gpu": True})
    assert not cluster.closed  # that is the executor's part
    assert cluster.asked == [None]  # once


def test_workers_start_ahead_only_if_they_need_not_wait(tmp_path: Path, clusters: list[Cluster]) -> None:
    with choice(tmp_path, workers=3) as chosen:
        chosen.ahead(LARGE.nbytes)
    with choice(tmp_path, workers=3) as chosen:
        chosen.ahead(LARGE.nbytes, workers=True)
    assert [cluster.asked for cluster in clusters] == [[], [3]]


def test_ray_that_has_started_is_used_although_less_is_left(tmp_path: Path, clusters: list[Cluster]) -> None:
    with choice(tmp_path) as chosen:
        chosen.ahead(LARGE.nbytes)
        assert kind(chosen.start(SMALL)) == "ray"
    assert len(clusters) == 1


def test_a_cluster_that_no_executor_took_ends(tmp_path: Path, clusters: list[Cluster]) -> None:
    with choice(tmp_path, ray=True) as chosen:
        chosen.ahead(1)
    assert [cluster.closed for cluster in clusters] == [True]


def test_threads_never_start_ray_ahead(tmp_path: Path, clusters: list[Cluster]) -> None:
    with choice(tmp_path, ray=False) as chosen:
        chosen.ahead(2 * LARGE.nbytes)
        assert kind(chosen.start(LARGE)) == "threads"
    assert not clusters


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("ahead", [True, False])
def test_threads_take_over_if_ray_does_not_start(tmp_path: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, told = list[None](), list[str]()

    def fail(_address: str | None) -> Cluster:
        tries.append(None)
        raise ClusterError("Ray on this machine", "no room")

    monkeypatch.setattr(module, "start_cluster", fail)
    with choice(tmp_path, told=told.append) as chosen:
        for _ in range(2 * ahead):
            chosen.ahead(LARGE.nbytes)
        assert kind(chosen.start(LARGE)) == "threads"
    assert (told, len(tries)) == (["no room"], 1)
    for needs in ({"ray": True}, {"address": "here:1"}):
        with choice(tmp_path, **needs) as chosen, pytest.raises(ClusterError, match="no room"):
            chosen.start(LARGE)


def test_what_is_new_and_here_is_counted_before_anything_is_opened(tmp_path: Path, directory_store: Store) -> None:
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "there.safetensors").write_bytes(bytes(70))
    (tmp_path / "own.bin").write_bytes(bytes(5))
    path = tmp_path / "m.yaml"
    path.write_text(
        "models:\n"
        "  - {name: a, source: own.bin}\n"
        "  - {name: b, source: https://nowhere.invalid/there.safetensors}\n"
        "  - {name: c, source: https://nowhere.invalid/missing.safetensors}\n"
        "  - {name: d, source: gone.bin}\n"
    )
    manifest = load_manifest(path)
    assert look_ahead(manifest, directory_store, folder) == Outlook(new_bytes=75, complete=False)
    assert look_ahead(manifest, directory_store, None) == Outlook(new_bytes=5, complete=False)
    here = manifest.model_copy(update={"models": manifest.models[:2]})
    assert look_ahead(here, directory_store, folder) == Outlook(new_bytes=75, complete=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demand, "latest_version", lambda _store, name: name == "a" or None)
        assert look_ahead(here, directory_store, folder) == Outlook(new_bytes=70, complete=True)


PLANNED = """
import sys, threading, time
from pathlib import Path
from birkhoff.pipeline.cli.app import notes
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.run.compress import compress
from birkhoff.pipeline.store.default import open_default_store

def loading(frame):
    while frame and (frame.f_globals.get("__name__"), frame.f_code.co_name) != ("torch", "<module>"):
        frame = frame.f_back
    return frame is not None

def ahead(_):
    for _ in range(200):  # until a thread is in the midst of it
        if any(map(loading, sys._current_frames().values())):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("no thread loads torch")
    with LOADING:
        assert not any(map(loading, sys._current_frames().values()))
    raise KeyboardInterrupt

manifest, store = Path(sys.argv[1]), sys.argv[2]
with open_default_store(store, create=True) as opened:
    try:
        compress(load_manifest(manifest), opened, None, Progress(notes(), models=2, quiet=True), ahead=ahead)
    except KeyboardInterrupt:
        print("apart")
"""


def test_a_planning_thread_loads_torch_apart_from_the_start_of_ray(tmp_path: Path) -> None:
    save_file({"lin.weight": torch.randn(64, 128)}, tmp_path / "first.safetensors")
    torch.save({"lin.weight": torch.randn(64, 129)[:, :128]}, tmp_path / "view.pt")
    (tmp_path / "m.yaml").write_text("models: [{name: a, source: first.safetensors}, {name: b, source: view.pt}]\n")
    words = [sys.executable, "-c", PLANNED, str(tmp_path / "m.yaml"), (tmp_path / "store").as_uri()]
    environment = {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert ran.stdout == "apart\n", ran.stderr


@pytest.mark.parametrize("executor", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_only_what_runs_tasks_imports_torch(executor: str, tmp_path: Path) -> None:
    stored = {"lin.weight": torch.randn(64, 128), "half.weight": torch.randn(96, 128).half(), "bias": torch.randn(5)}
    torch.save(stored, tmp_path / "net.pt")
    save_file({"lin.weight": torch.randn(64, 128).bfloat16()}, tmp_path / "other.safetensors")
    (tmp_path / "m.yaml").write_text("models: [{name: a, source: net.pt}, {name: b, source: other.safetensors}]\n")
    program = """
import sys
from birkhoff.pipeline.cli.main import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    words = ["compress", str(tmp_path / "m.yaml"), "--store", (tmp_path / "store").as_uri(), "--executor", executor]
    environment = {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home")}
    imported = []
    for _ in range(2):  # the second time there is nothing to do
        ran = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        imported.append(ran.stdout.splitlines()[-1])
    assert imported == [str(executor == "inline"), "False"]


@pytest.mark.slow
def test_sigterm_ends_a_run_in_order_while_ray_that_started_ahead_is_not_used_yet(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from pathlib import Path
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.run.choice import Choice
from birkhoff.pipeline.store.base import StoreAddress
interrupt.install()
given = dict(ray=True, address=None, workers=None, shard_seconds=None, told=print)
try:
    with Choice(StoreAddress.parse({(tmp_path / "store").as_uri()!r}), **given) as choice:
        choice.ahead(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except interrupt.Interrupted as error:
    sys.exit(error.exit_code)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    # Ray's own threads may complain that it ends as soon as it has started; its compiled handler prints a stack.
    assert (ran.returncode, "SIGTERM received" in ran.stderr) == (143, False), ran.stderr
