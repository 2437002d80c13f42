import functools
import logging
import os
import signal
import socket
from typing import Any

import pytest

from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.run.cluster import Cluster


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_an_address_where_nobody_listens_is_refused_at_once(form: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = form.format(taken.getsockname()[1])
        with pytest.raises(WorkerError) as raised:
            Cluster(address)
    assert str(raised.value).startswith(f"cannot reach the Ray cluster at {address}: ")
    assert str(raised.value).endswith("; try --executor inline")


def test_while_ray_starts_its_handler_of_sigterm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def start(self: Cluster) -> None:
        utils.set_sigterm_handler(lambda *_: pytest.fail("Ray's"))
        seen.append(signal.getsignal(signal.SIGTERM))

    seen, utils = list[Any](), ray._private.utils
    own, install = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    monkeypatch.setattr(Cluster, "_start", start)
    with Cluster(None):
        assert seen == [own]
        assert utils.set_sigterm_handler is install  # for the program's own use of Ray
    assert signal.getsignal(signal.SIGTERM) is own


@pytest.mark.slow
def test_a_node_that_dies_while_it_starts_is_started_again_and_a_restart_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    def fail(self: Cluster) -> None:
        raise RuntimeError("no room")

    services, raylets = ray._private.services, list[int]()
    start_raylet = services.start_raylet

    @functools.wraps(start_raylet)
    def first_dies(*arguments: Any, **named: Any) -> Any:
        made = start_raylet(*arguments, **named)
        raylets.append(made.process.pid)
        if len(raylets) == 1:
            os.kill(made.process.pid, signal.SIGKILL)
        return made

    monkeypatch.setattr(services, "start_raylet", first_dies)
    with caplog.at_level(logging.WARNING, "birkhoff.cluster"), Cluster(None) as cluster:  # closed once more at the end
        assert len(raylets) == 2
        assert "Ray did not start (NodeDiedError: its node ended with exit code -9 while it started)" in caplog.text
        assert not cluster.lost()
        monkeypatch.setattr(Cluster, "_start", fail)
        with pytest.raises(WorkerError, match=r"cannot reach Ray on this machine: .*no room; try --executor inline"):
            cluster.restart()
