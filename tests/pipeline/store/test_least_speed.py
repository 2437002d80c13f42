"""The least speed of answers: judged by injected waits, never by the clock of the machine."""

import itertools
import socket
import types
from functools import partial

import pytest
import requests
import urllib3

from birkhoff.pipeline.download.http import FetchSettings, HttpTransport
from birkhoff.pipeline.store import least_speed
from birkhoff.pipeline.store.base import StoreSettings
from birkhoff.pipeline.store.least_speed import LEAST_SPEED, Pace, PacedResponse, SlowError, paced, slowness
from birkhoff.pipeline.store.s3 import S3Credentials, connect


class TestPace:
    def test_a_byte_a_second_ends_after_the_first_stretch(self) -> None:
        held = Pace(60)
        for _ in range(59):
            held.took(1, 1.0)
        with pytest.raises(SlowError) as caught:
            held.took(1, 1.0)
        line = f"only 60 bytes came in 60.0 s, 1 bytes a second; the minimum is {LEAST_SPEED}"
        assert str(caught.value) == line

    def test_the_least_speed_is_enough(self) -> None:
        held = Pace(60)
        for _ in range(600):
            held.took(LEAST_SPEED, 1.0)

    def test_each_stretch_is_looked_at_by_itself(self) -> None:
        held = Pace(60)
        held.took(1 << 30, 61.0)
        with pytest.raises(SlowError, match="only 7 bytes came in 60"):
            held.took(7, 60.0)

    def test_one_long_wait_within_a_good_stretch_is_none(self) -> None:
        held = Pace(60)
        held.took(1, 59.0)
        held.took(1 << 20, 2.0)


def _answer(text: bytes, monkeypatch: pytest.MonkeyPatch) -> PacedResponse:
    """The answer that a socket holds, each read of which takes a hundred seconds."""
    ours, theirs = socket.socketpair()
    theirs.sendall(text)
    theirs.close()
    monkeypatch.setattr(least_speed, "time", types.SimpleNamespace(monotonic=itertools.count(0, 100).__next__))
    response = PacedResponse(ours, seconds=60.0)
    ours.close()  # the response holds its own
    return response


class TestPacedResponse:
    def test_the_wait_for_the_first_byte_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with _answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", monkeypatch) as response:
            response.begin()
            assert response.read() == b"ab"

    def test_a_slow_body_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n"
        with _answer(head + b"a" * 20_000, monkeypatch) as response:
            response.begin()  # the head came with the first bytes of the body
            with pytest.raises(SlowError, match="came in 100"):
                response.read()

    def test_so_is_a_slow_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head = b"HTTP/1.1 200 OK\r\n" + b"X: %s\r\n" % bytes(1000) * 50
        with _answer(head, monkeypatch) as response, pytest.raises(SlowError, match="came in 100"):
            response.begin()

    def test_an_answer_that_ends_is_not_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with _answer(b"HTTP/1.0 200 OK\r\n\r\nrest", monkeypatch) as response:
            response.begin()
            assert response.read() == b"rest"


def _held(pool: urllib3.HTTPConnectionPool) -> bool:
    made = pool.ConnectionCls.response_class
    return isinstance(made, partial) and made.func is PacedResponse


@pytest.mark.parametrize("scheme", ["http", "https"])
class TestEverybodyIsHeld:
    """Where the libraries' connections come from: what would go unnoticed if one of them moved it."""

    def test_a_store_direct_and_by_a_proxy(self, scheme: str) -> None:
        client = connect(StoreSettings(endpoint="http://127.0.0.1:9"), S3Credentials(access_key="a", secret_key="b"))
        session = client._endpoint.http_session
        for manager in (session._manager, session._get_proxy_manager("http://127.0.0.1:8")):
            assert _held(manager.connection_from_host("127.0.0.1", 9, scheme=scheme))

    def test_a_source_direct_and_by_a_proxy(self, scheme: str) -> None:
        transport = HttpTransport(FetchSettings())
        adapter = transport._session.get_adapter(f"{scheme}://host/file")
        assert isinstance(adapter, requests.adapters.HTTPAdapter)
        for manager in (adapter.poolmanager, *(adapter.proxy_manager_for("http://127.0.0.1:8") for _ in range(2))):
            assert _held(manager.connection_from_host("127.0.0.1", 9, scheme=scheme))
        transport.close()

    def test_and_nobody_else(self, scheme: str) -> None:
        connect(StoreSettings(endpoint="http://127.0.0.1:9"), S3Credentials(access_key="a", secret_key="b"))
        HttpTransport(FetchSettings()).close()
        assert not _held(urllib3.PoolManager().connection_from_host("127.0.0.1", 9, scheme=scheme))


def test_the_pool_that_was_there_stays_as_it_is() -> None:
    assert _held(paced(urllib3.HTTPConnectionPool, 1.0)("host"))
    assert not _held(urllib3.HTTPConnectionPool("host"))


def test_slowness_is_found_in_what_libraries_make_of_it() -> None:
    slow = SlowError("only 1 bytes")
    wrapped = RuntimeError("broken")
    wrapped.__context__ = ValueError("aborted")
    wrapped.__context__.__cause__ = slow
    assert slowness(wrapped) is slow
    assert slowness(RuntimeError("else")) is None
