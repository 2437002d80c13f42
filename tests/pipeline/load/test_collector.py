"""The collector's pause ends with the last load, whatever that came to, and leaves the program's choice alone."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from birkhoff.pipeline.errors import ArtifactNotFoundError
from birkhoff.pipeline.load.collector import without_collections
from birkhoff.pipeline.load.load import load_into, load_state_dict
from tests.patience import PATIENT_SECONDS


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_collector_runs_again_after_an_error() -> None:
    def fail() -> None:
        with without_collections():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()


def test_a_program_without_the_collector_stays_without_it() -> None:
    gc.disable()
    with without_collections():
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_ends_the_pause() -> None:
    inside, go = threading.Event(), threading.Event()

    def load() -> None:
        with without_collections():
            inside.set()
            assert go.wait(PATIENT_SECONDS)

    thread = threading.Thread(target=load)
    with without_collections():
        thread.start()
        assert inside.wait(PATIENT_SECONDS)
    assert not gc.isenabled()
    go.set()
    thread.join()
    assert gc.isenabled()


def test_loads_that_fail_leave_the_collector_as_it_was(tmp_path: Path) -> None:
    for load in (lambda: load_state_dict(tmp_path / "no"), lambda: load_into(nn.Linear(2, 2), tmp_path / "no")):
        with pytest.raises(ArtifactNotFoundError):
            load()
        assert gc.isenabled()
