import socket

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


@pytest.mark.slow
def test_a_restart_that_fails_is_one_line_and_leaves_nothing_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Cluster) -> None:
        raise RuntimeError("no room")

    with Cluster(None) as cluster:  # closed once more at the end
        assert not cluster.lost()
        monkeypatch.setattr(Cluster, "_start", fail)
        with pytest.raises(WorkerError, match=r"cannot reach Ray on this machine: .*no room; try --executor inline"):
            cluster.restart()
