"""One thread for torch in every test (threads that wait for each other cost more than they give on two cores), the same
random numbers, Triton's interpreter where there is no GPU, no waiting for the disk, and a cache of pulled blobs that is
the run's own."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processor_time import ProcessorTime

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read by triton.jit when a kernel's module is imported, so it must stand here, before any test imports one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Tests that draw without a generator of their own draw the same each time, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True, scope="session")
def not_forced_to_disk() -> Iterator[None]:
    """No test cuts the power, and some 50,000 files of a run would wait for the disk one after another.

    Processes that tests start do wait. That a write fails where its file cannot be forced, `test_store` holds.
    """

    def fsync(file: int) -> None:
        os.fstat(file)  # it must be open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processor-time", type=int, metavar="FILES", help="list the files that take most of it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--processor-time"):
        config.pluginmanager.register(ProcessorTime(config.getoption("--processor-time")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two processes more than there are processors: many tests wait, for servers, for Ray, for a signal to arrive."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files that come last by name come first, the slowest of all before them: else they are waited for alone."""
    slow = {
        item.path for item in items if item.get_closest_marker("slow") and item.path.parent == Path(__file__).parent
    }
    items.sort(key=lambda item: (item.path.name != "test_pages.py", item.path not in slow))


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """What a command sets for its process, such as BIRKHOFF_ALLOW_HTTP, ends with its test.

    So do handlers of the root logger: `logging.info` makes one, as sam2's predictor calls it, over the test's stderr.
    """
    before = dict(os.environ)
    yield
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each store of the conformance suite can do, a row each."""
    reports = terminalreporter.getreports("passed")
    rows = [value for report in reports for name, value in report.user_properties if name == "capabilities"]
    if rows:
        terminalreporter.section("stores")
    for row in rows:
        terminalreporter.write_line(", ".join(f"{name}: {value}" for name, value in row.items()))
