import socket

import pytest

from birkhoff.pipeline.cluster import Cluster
from birkhoff.pipeline.errors import WorkerError


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_an_address_where_nobody_listens_is_refused_at_once(form: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = form.format(taken.getsockname()[1])
        with pytest.raises(WorkerError) as raised:
            Cluster(address)
    assert str(raised.value).startswith(f"cannot reach the Ray cluster at {address}: ")
    assert str(raised.value).endswith("; try --executor inline")
