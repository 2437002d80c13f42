"""Sources from servers, mirrors and several files, against real servers on loopback."""

import hashlib
import json
import multiprocessing
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save, save_file

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.digests import checkpoint_digest
from birkhoff.pipeline.checkpoint.open import read_tensor, source_digest
from birkhoff.pipeline.download import resolve as fetch
from birkhoff.pipeline.download.http import FetchSettings
from birkhoff.pipeline.download.resolve import NotDownloaded
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.errors import PartialError, SourceError, exit_code
from birkhoff.pipeline.plan.estimate import plan_rows
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.plan.models import plan_entry
from birkhoff.pipeline.store.base import Store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import execute

QUICK = FetchSettings(connect_timeout=2, read_timeout=0.5, attempts=3, backoff=0.01)
WEIGHTS = {"image_encoder.w": torch.arange(60_000.0).reshape(300, 200), "mask_decoder.w": torch.ones(4, 4)}
BODY = save(WEIGHTS)
OTHER = save({name: tensor + 1 for name, tensor in WEIGHTS.items()})  # as many bytes


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class Origin:
    """What a server holds and how it misbehaves; `faults` are used up one by one, each by one GET."""

    body: bytes = BODY
    files: dict[str, bytes] = field(default_factory=dict)  # by name; every other name leads to `body`
    etag: str | None = '"one"'
    ranges: bool = True
    head: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    faults: list[Callable[["Handler"], None]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    @property
    def gets(self) -> list[str]:
        return [line for line in self.log if line.startswith("GET")]


class Handler(BaseHTTPRequestHandler):
    """A server of one file, with Range and If-Range."""

    origin: Origin
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def body(self) -> bytes:
        return self.origin.files.get(self.path.rpartition("/")[2].partition("?")[0], self.origin.body)

    def do_HEAD(self) -> None:
        self.origin.log.append("HEAD")
        self.answer(self.origin.head, str(len(self.body)), etag=self.origin.etag, **self.origin.headers)

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.origin.log.append(f"GET {asked}".strip())
        if self.origin.faults:
            self.origin.faults.pop(0)(self)
        else:
            self.serve()

    def serve(self, cut: int | None = None) -> None:
        """Answer as a good server does; break off after `cut` bytes."""
        origin, start = self.origin, 0
        body = self.body
        if origin.ranges and "Range" in self.headers and self.headers.get("If-Range") == origin.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        rest = body[start:]
        span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.answer(206 if start else 200, str(len(rest)), etag=origin.etag, **span, **origin.headers)
        origin.sent += len(rest[:cut])  # before a client can have it all and look
        self.wfile.write(rest[:cut])
        self.close_connection = cut is not None

    def answer(self, status: int, length: str | None, *, etag: str | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": length, "ETag": etag, **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def cut(nbytes: int) -> Callable[[Handler], None]:
    return lambda handler: handler.serve(cut=nbytes)


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(code, "0", **headers)


@pytest.fixture
def serve() -> Iterator[Callable[..., Origin]]:
    """Starts servers on loopback; each serves its origin at every path."""
    servers: list[ThreadingHTTPServer] = []

    def start(tls: ssl.SSLContext | None = None, **facts: Any) -> Origin:
        origin = Origin(**facts)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("OriginHandler", (Handler,), {"origin": origin}))
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # clients that hang up are part of the tests
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        origin.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/net.safetensors"
        return origin

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no mirror, and a home of the test's own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "BIRKHOFF_MIRROR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def part(*urls: str, **facts: Any) -> SourcePart:
    return SourcePart(urls=urls, **facts)


def resolve(*parts: SourcePart, settings: FetchSettings = QUICK, **arguments: Any) -> Checkpoint:
    return fetch.resolve(parts, cache=Path(os.environ["BIRKHOFF_HOME"]) / "sources", settings=settings, **arguments)


def peek(*parts: SourcePart, **arguments: Any) -> Checkpoint | NotDownloaded:
    return fetch.peek(parts, cache=Path(os.environ["BIRKHOFF_HOME"]) / "sources", settings=QUICK, **arguments)


def refused(*parts: SourcePart, match: str, **arguments: Any) -> str:
    """The one line of the error that `resolve` ends with."""
    with pytest.raises(SourceError, match=match) as caught:
        resolve(*parts, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nothing_kept(home: Path) -> bool:
    """Whether the cache holds neither downloads nor records nor partial files."""
    found = [path for path in (home / "downloads").rglob("*") if path.is_file() and path.parent.name != "locks"]
    return found == []


class TestDownload:
    def test_brings_the_file_and_records_its_first_sight(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve()
        seen: list[tuple[str, int, int | None]] = []
        checkpoint = resolve(part(origin.url), report=lambda *step: seen.append(step))
        assert checkpoint.path == home / "downloads" / sha256(BODY) / "net.safetensors"
        assert checkpoint.path.read_bytes() == BODY
        assert source_digest(checkpoint) == sha256(BODY)
        counts = [done for _, done, _ in seen]
        assert counts == sorted(counts)
        assert seen[-1] == ("net.safetensors", len(BODY), len(BODY))
        (record,) = (home / "downloads" / "seen").iterdir()
        facts = json.loads(record.read_text())
        assert (facts["url"], facts["sha256"], facts["size"]) == (origin.url, sha256(BODY), len(BODY))
        assert facts["etag"] == '"one"'

    def test_a_second_time_only_asks(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        first = resolve(part(origin.url))
        assert resolve(part(origin.url)) == first
        assert origin.log == ["GET", "HEAD"]

    def test_a_pinned_file_is_not_asked_about(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        pinned = part(origin.url, sha256=sha256(BODY))
        assert resolve(pinned) == resolve(pinned)
        assert origin.log == ["GET"]

    def test_a_pinned_file_is_found_whatever_address_brought_it(self, serve: Callable[..., Origin]) -> None:
        first, second = serve(), serve()
        resolve(part(first.url))
        found = resolve(part(second.url.replace("net.", "same."), sha256=sha256(BODY)))
        assert (found.path.name, found.path.read_bytes()) == ("same.safetensors", BODY)
        assert second.log == []

    def test_the_query_is_sent_and_kept_to_ourselves(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve()
        resolve(part(f"{origin.url}?part=geheim"))
        assert not [path for path in home.rglob("*") if path.is_file() and b"geheim" in path.read_bytes()]
        origin.faults = [status(404)]
        assert "geheim" not in refused(part(f"{origin.url}?part=geheim2"), match="404")

    def test_a_broken_link_is_resumed(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[cut(100_000), cut(50_000)])
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert origin.gets == ["GET", "GET bytes=100000-", "GET bytes=150000-"]
        assert origin.sent == len(BODY)

    def test_a_later_run_resumes(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[cut(100_000)])
        once = FetchSettings(attempts=1)
        refused(part(origin.url), match=f"broke off after 100000 of {len(BODY)} bytes", settings=once)
        assert resolve(part(origin.url), settings=once).path.read_bytes() == BODY
        assert origin.sent == len(BODY)

    def test_bytes_from_before_a_crash_of_the_machine_are_not_trusted(
        self, serve: Callable[..., Origin], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        origin = serve(faults=[cut(100_000)])
        once = FetchSettings(attempts=1)
        refused(part(origin.url), match="broke off", settings=once)
        monkeypatch.setattr("birkhoff.pipeline.download.cache._boot", lambda: "another")
        assert resolve(part(origin.url), settings=once).path.read_bytes() == BODY
        assert origin.gets == ["GET", "GET"]

    def test_attempts_that_bring_much_do_not_count(self, serve: Callable[..., Origin]) -> None:
        body = save({"w": torch.zeros(6 << 18)})
        origin = serve(body=body, faults=[cut(1 << 20)] * 5)
        assert resolve(part(origin.url)).nbytes == len(body)
        assert len(origin.gets) == 6

    @pytest.mark.parametrize("facts", [{"ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}], ids=str)
    def test_what_cannot_be_resumed_comes_anew(self, serve: Callable[..., Origin], facts: dict[str, Any]) -> None:
        origin = serve(faults=[cut(100_000)], **facts)
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert origin.sent == 100_000 + len(BODY)

    def test_a_file_that_changes_midway_comes_anew(self, serve: Callable[..., Origin]) -> None:
        def swap(handler: Handler) -> None:
            handler.origin.body, handler.origin.etag = OTHER, '"two"'
            handler.serve()

        origin = serve(faults=[cut(100_000), swap])
        assert resolve(part(origin.url)).path.read_bytes() == OTHER

    def test_a_rest_of_another_file_is_not_appended(self, serve: Callable[..., Origin]) -> None:
        def rest_of_another(handler: Handler) -> None:
            span = f"bytes 100000-{len(OTHER) - 1}/{len(OTHER)}"
            handler.answer(206, str(len(OTHER) - 100_000), etag='"two"', Content_Range=span)
            handler.wfile.write(OTHER[100_000:])

        origin = serve(faults=[cut(100_000), rest_of_another])
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_a_file_that_became_shorter_comes_anew(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[cut(100_000), status(416)])
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_a_wrong_length_never_passes(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve(headers={"Accept_Ranges": "none"}, ranges=False, faults=[cut(1000)] * 3)
        error = refused(part(origin.url), match=f"broke off after 1000 of {len(BODY)} bytes .*3 attempts")
        assert "BIRKHOFF_MIRROR" in error
        assert not list((home / "downloads").rglob("*.safetensors"))

    @pytest.mark.parametrize("code", [500, 502, 503, 429, 408])
    def test_what_may_pass_is_tried_again(self, serve: Callable[..., Origin], code: int) -> None:
        origin = serve(faults=[status(code), status(code)])
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_waits_as_long_as_the_server_asks(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[status(503, Retry_After="1")])
        start = time.monotonic()
        resolve(part(origin.url))
        assert time.monotonic() - start >= 1

    @pytest.mark.parametrize("code", [401, 403, 404, 410, 204])
    def test_what_does_not_pass_is_asked_for_once(self, serve: Callable[..., Origin], code: int, home: Path) -> None:
        origin = serve(faults=[status(code)])
        error = refused(part(origin.url), match=f"^net.safetensors: cannot be fetched: {origin.url}: {code}")
        assert "--mirror or BIRKHOFF_MIRROR, or run the same command again" in error
        assert origin.gets == ["GET"]
        assert nothing_kept(home)

    def test_the_next_address_is_tried(self, serve: Callable[..., Origin], caplog: pytest.LogCaptureFixture) -> None:
        gone, good = serve(faults=[status(404)]), serve()
        assert resolve(part(gone.url, good.url)).path.read_bytes() == BODY
        assert f"{gone.url}: 404 Not Found; trying {good.url}" in caplog.text

    def test_all_addresses_are_named_when_none_answers(self, serve: Callable[..., Origin]) -> None:
        gone = serve(faults=[status(404)])
        error = refused(
            part(gone.url, "http://127.0.0.1:9/net.safetensors"),
            match="404 Not Found; .*no answer .*refused.* \\(3 attempts\\)",
        )
        assert error.count("http://") == 2

    def test_a_crawl_is_given_up(self, serve: Callable[..., Origin]) -> None:
        def trickle(handler: Handler) -> None:
            handler.answer(200, str(len(BODY)), etag='"one"')
            for byte in BODY[:40]:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.02)
            handler.close_connection = True

        origin = serve(faults=[trickle])
        crawl = r"net.safetensors: broke off .*only \d+ bytes came in 0.\d s, \d+ bytes a second; the minimum is 1024"
        refused(part(origin.url), match=crawl, settings=FetchSettings(attempts=1, read_timeout=0.2))

    def test_a_crawl_then_a_good_link_is_resumed(self, serve: Callable[..., Origin]) -> None:
        def stall(handler: Handler) -> None:
            handler.answer(200, str(len(BODY)), etag='"one"')
            handler.wfile.write(BODY[:1000])
            time.sleep(0.8)  # longer than the read time-out
            handler.close_connection = True

        origin = serve(faults=[stall])
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert origin.gets == ["GET", "GET bytes=1000-"]

    def test_chunks_end_a_file_too(self, serve: Callable[..., Origin]) -> None:
        def chunked(*, whole: bool) -> Callable[[Handler], None]:
            def answer(handler: Handler) -> None:
                handler.answer(200, None, Transfer_Encoding="chunked")
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(BODY), BODY) + (b"0\r\n\r\n" if whole else b"2"))
                handler.close_connection = True

            return answer

        origin = serve(faults=[chunked(whole=False), chunked(whole=True)])
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_a_file_without_an_end_is_refused(self, serve: Callable[..., Origin]) -> None:
        def endless(handler: Handler) -> None:
            handler.answer(200, None)
            handler.close_connection = True

        refused(part(serve(faults=[endless]).url), match="does not say how long the file is")

    def test_an_encoded_file_is_refused(self, serve: Callable[..., Origin]) -> None:
        refused(part(serve(headers={"Content_Encoding": "gzip"}).url), match="comes encoded as gzip")

    def test_a_page_is_no_checkpoint_and_not_recorded(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve(body=b"<!DOCTYPE html><title>Log in</title>")
        refused(part(origin.url), match=f"{origin.url}: is an HTML page, not a checkpoint")
        assert nothing_kept(home)

    def test_a_full_disk_is_seen_before(
        self, serve: Callable[..., Origin], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        origin = serve()
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        monkeypatch.setattr("birkhoff.pipeline.files.shutil.disk_usage", lambda _: usage)
        refused(part(origin.url), match=rf"needs {len(BODY)} bytes in .* 1000 are free; make room")
        assert nothing_kept(home)

    def test_a_cache_that_cannot_be_written_is_named(self, serve: Callable[..., Origin], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        refused(part(serve().url), match=rf"{tmp_path}/file/.*BIRKHOFF_HOME", downloads=tmp_path / "file" / "x")


class TestRedirects:
    def test_they_are_followed(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[status(302, Location="/elsewhere/net.safetensors?signature=1")])
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_a_resumed_download_starts_from_the_first_address(self, serve: Callable[..., Origin]) -> None:
        moved = status(307, Location="/signed")
        origin = serve(faults=[moved, cut(100_000), moved])
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert origin.gets == ["GET", "GET", "GET bytes=100000-", "GET bytes=100000-"]

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("http://192.0.2.1/net.safetensors", "plain http can be read and changed"),
            ("http://me:secret@127.0.0.1/x", "credentials"),
            ("file:///etc/passwd", "redirected to 'file', expected http or https"),
        ],
    )
    def test_not_everywhere(self, serve: Callable[..., Origin], target: str, message: str) -> None:
        origin = serve(faults=[status(302, Location=target)])
        assert "secret" not in refused(part(origin.url), match=message)

    def test_not_for_ever(self, serve: Callable[..., Origin]) -> None:
        origin = serve(faults=[status(302, Location="/again")] * 20)
        refused(part(origin.url), match="more than 10 redirects")
        assert len(origin.gets) == 11


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *words.split(), "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    return folder / "cert.pem", folder / "key.pem"


class TestTls:
    @pytest.fixture
    def origin(self, serve: Callable[..., Origin], certificate: tuple[Path, Path]) -> Origin:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        return serve(tls=context)

    def test_an_unknown_certificate_is_refused(self, origin: Origin) -> None:
        refused(part(origin.url), match="TLS failed .*certificate.*REQUESTS_CA_BUNDLE")
        assert origin.log == []

    def test_a_trusted_one_is_not(
        self, origin: Origin, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
        assert resolve(part(origin.url)).path.read_bytes() == BODY

    def test_encryption_is_not_given_up(
        self,
        origin: Origin,
        serve: Callable[..., Origin],
        certificate: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
        plain = serve()
        origin.faults = [status(302, Location=plain.url)]
        refused(part(origin.url, allow_http=True), match="redirected from https to plain http at 127.0.0.1")
        assert plain.log == []


class TestDigests:
    def test_another_digest_than_the_manifest_says(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve(body=OTHER)
        message = f"has sha256 {sha256(OTHER)}, expected {sha256(BODY)} as the manifest says"
        refused(part(origin.url, sha256=sha256(BODY)), match=message)
        assert nothing_kept(home)

    def test_the_address_with_the_right_digest_is_taken(self, serve: Callable[..., Origin]) -> None:
        wrong, right = serve(body=OTHER), serve()
        found = resolve(part(wrong.url, right.url, sha256=sha256(BODY)))
        assert found.path.read_bytes() == BODY

    def test_another_size_is_noticed_without_a_download(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve()
        resolve(part(origin.url))
        origin.body, origin.etag = save({"w": torch.zeros(2)}), '"two"'
        error = refused(part(origin.url), match=rf"changed since it was first seen .* it had {len(BODY)} bytes and has")
        assert len(origin.gets) == 1
        assert Path(error.rpartition("delete ")[2]).is_file()

    def test_another_etag_is_followed_up(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        resolve(part(origin.url))
        origin.etag = '"the same bytes from another server"'
        resolve(part(origin.url))
        resolve(part(origin.url))
        assert origin.log == ["GET", "HEAD", "GET", "HEAD"]

    def test_other_bytes_are_refused_until_accepted(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        resolve(part(origin.url))
        origin.body, origin.etag = OTHER, '"two"'
        for _ in range(2):
            refused(part(origin.url), match=f"it had sha256 {sha256(BODY)} and {origin.url} has {sha256(OTHER)}")
        assert resolve(part(origin.url, sha256=sha256(OTHER))).path.read_bytes() == OTHER
        assert resolve(part(origin.url)).path.read_bytes() == OTHER

    def test_a_second_address_is_held_to_the_first_sight(self, serve: Callable[..., Origin], home: Path) -> None:
        first, second = serve(), serve(body=OTHER)
        shutil.rmtree(resolve(part(first.url)).path.parent)
        first.faults = [status(404)]
        refused(part(first.url, second.url), match=f"{first.url}: has changed since .*{second.url} has {sha256(OTHER)}")

    def test_without_the_server_the_copy_serves(
        self, serve: Callable[..., Origin], caplog: pytest.LogCaptureFixture
    ) -> None:
        origin = serve()
        first = resolve(part(origin.url))
        origin.head = 404
        assert resolve(part(origin.url)) == first
        assert "404 Not Found; using the copy of 20" in caplog.text

    def test_a_damaged_copy_is_replaced(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        copy = resolve(part(origin.url)).path
        copy.chmod(0o644)
        copy.write_bytes(OTHER)
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert len(origin.gets) == 2

    def test_a_touched_copy_is_kept(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        os.utime(resolve(part(origin.url)).path, (1, 1))
        assert resolve(part(origin.url)).path.read_bytes() == BODY
        assert len(origin.gets) == 1

    def test_a_damaged_record_is_named(self, serve: Callable[..., Origin], home: Path) -> None:
        origin = serve()
        resolve(part(origin.url))
        (record,) = (home / "downloads" / "seen").iterdir()
        record.write_text("{")
        refused(part(origin.url), match=f"{record}: not a record of a download .*delete it")

    def test_a_local_file_is_checked_too(self, tmp_path: Path) -> None:
        path = tmp_path / "net.safetensors"
        path.write_bytes(BODY)
        assert resolve(part(str(path), sha256=sha256(BODY))).path == path
        path.write_bytes(OTHER)
        refused(part(str(path), sha256=sha256(BODY)), match=f"{path}: has sha256 {sha256(OTHER)}, expected")

    def test_digests_of_settled_local_files_are_remembered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("birkhoff.pipeline.files._SETTLED_SECONDS", -1.0)
        path = tmp_path / "net.safetensors"
        path.write_bytes(BODY)
        pinned = part(str(path), sha256=sha256(BODY))
        resolve(pinned)
        with monkeypatch.context() as patch:
            patch.setattr("birkhoff.pipeline.download.cache.file_sha256", lambda path: pytest.fail("hashed again"))
            resolve(pinned)
        path.write_bytes(OTHER)
        refused(pinned, match="has sha256")


def _resolve_into(url: str, answers: Any) -> None:
    answers.put(str(resolve(part(url)).path))


def test_two_processes_download_once(serve: Callable[..., Origin]) -> None:
    def slowly(handler: Handler) -> None:
        time.sleep(0.3)
        handler.serve()

    origin = serve(faults=[slowly, slowly])
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    processes = [fork.Process(target=_resolve_into, args=(origin.url, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert len({answers.get(timeout=PATIENT_SECONDS) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert origin.log == ["GET"]


class TestMirror:
    @pytest.fixture
    def mirror(self, tmp_path: Path) -> Path:
        (tmp_path / "mirror").mkdir()
        (tmp_path / "mirror" / "net.safetensors").write_bytes(BODY)
        return tmp_path / "mirror"

    def test_it_wins_over_the_network(self, serve: Callable[..., Origin], mirror: Path) -> None:
        origin = serve(body=OTHER)
        assert resolve(part(origin.url), mirror=mirror).path == mirror / "net.safetensors"
        assert peek(part(origin.url), mirror=mirror) == resolve(part(origin.url), mirror=mirror)
        assert origin.log == []

    def test_the_environment_names_it(self, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BIRKHOFF_MIRROR", str(mirror))
        found = resolve(part("https://192.0.2.1/gone.pth", "s3://bucket/models/net.safetensors"))
        assert found.path == mirror / "net.safetensors"

    def test_what_it_lacks_comes_from_the_network(self, serve: Callable[..., Origin], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert resolve(part(serve().url), mirror=tmp_path / "empty").path.read_bytes() == BODY

    def test_its_files_are_checked(self, serve: Callable[..., Origin], mirror: Path) -> None:
        origin = serve(body=OTHER)
        refused(part(origin.url, sha256=sha256(OTHER)), match=f"{mirror}/net.* expected {sha256(OTHER)}", mirror=mirror)
        resolve(part(origin.url))
        refused(part(origin.url), match=f"{mirror}/net.* first seen at {origin.url}", mirror=mirror)

    def test_it_must_be_a_folder(self, tmp_path: Path) -> None:
        refused(part("https://a.org/x.pth"), match=f"mirror {tmp_path}/no: expected a folder", mirror=tmp_path / "no")

    def test_paths_are_not_looked_up_in_it(self, mirror: Path, tmp_path: Path) -> None:
        refused(part(str(tmp_path / "net.safetensors")), match="no such file", mirror=mirror)


class TestPeek:
    def test_says_what_a_download_would_bring(self, serve: Callable[..., Origin], home: Path) -> None:
        one, two = serve(), serve(head=405)
        found = peek(part(one.url), part(two.url, prefix="b."))
        assert found == NotDownloaded(missing=(one.url, two.url), nbytes=2 * len(BODY))
        assert str(found).endswith(f"not downloaded yet ({2 * len(BODY)} bytes); `compress` will")
        assert one.log == ["HEAD"]
        assert nothing_kept(home)

    def test_asks_nobody_about_what_is_here(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        first = resolve(part(origin.url))
        assert peek(part(origin.url)) == first
        assert origin.log == ["GET"]

    def test_a_server_that_does_not_answer_is_no_error(self, serve: Callable[..., Origin]) -> None:
        found = peek(part("http://127.0.0.1:9/x.pth"))
        assert isinstance(found, NotDownloaded)
        assert found.nbytes is None
        assert "Connection refused" in found.problem

    def test_planning_downloads_nothing(self, serve: Callable[..., Origin]) -> None:
        origin = serve()
        manifest = Manifest(models=[{"name": "net", "source": origin.url}])
        (row,), (error,) = plan_rows(manifest, None, None)
        assert (row["status"], error) == ("to be downloaded", None)
        assert f"not downloaded yet ({len(BODY)} bytes)" in str(row["note"])
        assert origin.log == ["HEAD"]
        plan_entry(manifest, manifest.models[0])
        (row,), (error,) = plan_rows(manifest, None, None)
        assert (row["status"], row["source_bytes"], error) == ("new", len(BODY), None)

    def test_what_no_server_has_is_an_error_of_the_plan(self, serve: Callable[..., Origin]) -> None:
        gone = serve(faults=[status(404)] * 2, head=404)
        manifest = Manifest(models=[{"name": "net", "source": gone.url}])
        (row,), (error,) = plan_rows(manifest, None, None)
        assert row["status"] == "failed"
        assert isinstance(error, SourceError)
        assert f"cannot be downloaded: {gone.url}: 404" in str(row["error"])


class TestS3:
    def test_objects_come_through_the_store(self, s3_store: Store, s3_environment: str, home: Path) -> None:
        s3_store.put("net.safetensors", BODY)
        url = f"{s3_environment}/net.safetensors"
        assert peek(part(url)) == NotDownloaded(missing=(url,), nbytes=len(BODY))
        seen: list[int] = []
        checkpoint = resolve(part(url), report=lambda name, done, total: seen.append(done))
        assert (checkpoint.path.read_bytes(), seen[-1]) == (BODY, len(BODY))
        assert resolve(part(url)) == checkpoint
        s3_store.put("net.safetensors", OTHER)
        refused(part(url), match=f"it had sha256 {sha256(BODY)} and {url} has {sha256(OTHER)}")

    def test_they_come_in_ranges_and_are_resumed(
        self, s3_store: Store, s3_environment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("birkhoff.pipeline.download.bucket._RANGE_BYTES", 100_000)
        s3_store.put("net.safetensors", BODY)
        url = f"{s3_environment}/net.safetensors"
        seen: list[int] = []

        def interrupt(name: str, done: int, total: int | None) -> None:
            seen.append(done)
            if done == 100_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            resolve(part(url), report=interrupt)
        assert resolve(part(url), report=interrupt).path.read_bytes() == BODY
        assert seen == [100_000, 200_000, len(BODY)]

    def test_an_object_that_changes_midway_is_not_mixed(
        self, s3_store: Store, s3_environment: str, monkeypatch: pytest.MonkeyPatch, home: Path
    ) -> None:
        monkeypatch.setattr("birkhoff.pipeline.download.bucket._RANGE_BYTES", 100_000)
        s3_store.put("net.safetensors", BODY)
        url = f"{s3_environment}/net.safetensors"
        change = lambda name, done, total: s3_store.put("net.safetensors", OTHER)  # noqa: E731
        refused(part(url), match="has changed while it was being downloaded", report=change)
        assert nothing_kept(home)

    def test_trouble_is_the_sources(self, s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
        refused(part(f"{s3_environment}/none.pth"), match="none.pth: cannot be fetched: .*no such object")
        refused(part("s3://no-such-bucket-here/none.pth"), match="no bucket 'no-such-bucket-here'")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused(part(f"{s3_environment}/none.pth"), match="403 .*check the key pair")


class TestShards:
    SHARDS: ClassVar = {f"net {i}.safetensors": save({name: WEIGHTS[name]}) for i, name in enumerate(WEIGHTS)}
    INDEX = json.dumps({"weight_map": dict(zip(WEIGHTS, SHARDS, strict=True))}).encode()

    @pytest.fixture
    def origin(self, serve: Callable[..., Origin]) -> Origin:
        files = {name.replace(" ", "%20"): body for name, body in self.SHARDS.items()}
        origin = serve(files={**files, "net.index.json": self.INDEX})
        origin.url = origin.url.replace("net.safetensors", "net.index.json?download=true")
        return origin

    def test_an_index_brings_its_shards(self, origin: Origin) -> None:
        checkpoint = resolve(part(origin.url, sha256=sha256(self.INDEX)))
        held = {tensor.name: read_tensor(tensor) for tensor in checkpoint.tensors}
        assert all(torch.equal(held[name], WEIGHTS[name]) for name in WEIGHTS)
        assert [file.name for file in checkpoint.files] == ["net.index.json", *self.SHARDS]
        assert resolve(part(origin.url)) == checkpoint
        assert len(origin.gets) == 3

    def test_peek_asks_for_those_that_lack(self, origin: Origin) -> None:
        origin.faults = [lambda handler: handler.serve(), status(404)]
        refused(part(origin.url), match="net 0.safetensors: cannot be fetched")
        found = peek(part(origin.url))
        assert isinstance(found, NotDownloaded)
        assert found.nbytes == sum(map(len, self.SHARDS.values()))
        checkpoint = resolve(part(origin.url))
        assert peek(part(origin.url)) == checkpoint

    def test_from_a_mirror_they_lie_beside_it(self, origin: Origin, tmp_path: Path) -> None:
        for name, body in {**self.SHARDS, "net.index.json": self.INDEX}.items():
            (tmp_path / name).write_bytes(body)
        assert resolve(part(origin.url), mirror=tmp_path).path == tmp_path / "net.index.json"
        assert origin.log == []

    @pytest.mark.parametrize(
        "index", [b'{"weight_map": {"w": "../x"}}', b'{"weight_map": {"w": 3}}', b'{"a": 1}', b"{"]
    )
    def test_a_forged_index_leads_nowhere(self, origin: Origin, index: bytes) -> None:
        origin.files["net.index.json"] = index
        refused(part(origin.url), match=r"net\.index\.json: ")
        assert len(origin.gets) == 1


class TestSeveralFiles:
    @pytest.fixture
    def halves(self, tmp_path: Path) -> tuple[str, str]:
        save_file(WEIGHTS, tmp_path / "a.safetensors")
        torch.save({"model": {"mask_decoder.w": torch.zeros(4, 4), "iou.w": torch.ones(3)}}, tmp_path / "b.pth")
        return str(tmp_path / "a.safetensors"), str(tmp_path / "b.pth")

    def test_they_make_one_checkpoint(self, halves: tuple[str, str]) -> None:
        a, b = halves
        merged = resolve(part(a, keep=("image_encoder.*",)), part(b, prefix="decoder."))
        held = {tensor.name: read_tensor(tensor) for tensor in merged.tensors}
        assert list(held) == ["image_encoder.w", "decoder.mask_decoder.w", "decoder.iou.w"]
        assert torch.equal(held["image_encoder.w"], WEIGHTS["image_encoder.w"])
        assert torch.equal(held["decoder.mask_decoder.w"], torch.zeros(4, 4))
        assert merged.nbytes == Path(a).stat().st_size + Path(b).stat().st_size
        assert merged.path.name == "a.safetensors+b.pth.json"
        assert merged.nesting == ()

    def test_the_digest_covers_names_bytes_and_choice(self, halves: tuple[str, str], tmp_path: Path) -> None:
        a, b = halves
        choices = [
            (part(a, keep=("image_encoder.*",)), part(b)),
            (part(a), part(b, keep=("iou*",))),
            (part(a, keep=("image_encoder.*",)), part(b, prefix="x.")),
            (part(a, prefix="x."),),
            (part(a),),
        ]
        digests = [checkpoint_digest(resolve(*choice)) for choice in choices]
        assert len(set(digests)) == len(choices)
        assert [checkpoint_digest(resolve(*choice)) for choice in choices] == digests
        assert digests[-1] == sha256(Path(a).read_bytes())
        merged = resolve(*choices[0])
        listing = "".join(f"{sha256(file.read_bytes())}  {file.name}\n" for file in merged.files)
        assert digests[0] == sha256(listing.encode())
        assert [file.name for file in merged.files[1:]] == ["a.safetensors", "b.pth"]

    def test_one_file_may_serve_twice(self, halves: tuple[str, str]) -> None:
        a, _ = halves
        merged = resolve(part(a, keep=("image*",)), part(a, keep=("mask*",), prefix="second."))
        assert [tensor.name for tensor in merged.tensors] == ["image_encoder.w", "second.mask_decoder.w"]
        assert merged.nbytes == Path(a).stat().st_size

    def test_they_come_from_anywhere(self, serve: Callable[..., Origin], halves: tuple[str, str]) -> None:
        merged = resolve(part(serve().url, keep=("image*",)), part(halves[1]))
        assert [tensor.name for tensor in merged.tensors] == ["image_encoder.w", "mask_decoder.w", "iou.w"]

    def test_a_name_twice_names_both_files(self, halves: tuple[str, str]) -> None:
        error = refused(*map(part, halves), match=r"tensor 'mask_decoder.w' is in both .*`keep`.*`prefix`")
        assert all(path in error for path in halves)

    def test_a_glob_that_matches_nothing(self, halves: tuple[str, str]) -> None:
        keep = ("image_encoder.*", "image_encodr.*")
        refused(part(halves[0], keep=keep), match="keep 'image_encodr.*' matches none of its 2 tensors, such as")

    def test_a_missing_one_is_named(self, halves: tuple[str, str], tmp_path: Path) -> None:
        refused(part(halves[0]), part(str(tmp_path / "none.pth")), match="none.pth: no such file")


def test_one_unreachable_model_leaves_the_others(
    serve: Callable[..., Origin], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, gone = serve(), serve(faults=[status(404)] * 9)
    tail = tmp_path / "tail.safetensors"
    save_file({"tail.w": torch.randn(64, 64)}, tail)
    models = [
        {"name": "good", "source": good.url},
        {"name": "gone", "source": gone.url},
        {"name": "merged", "source": [{"urls": [good.url], "keep": ["image*"]}, {"urls": [tail.name]}]},
    ]
    manifest = tmp_path / "m.yaml"
    manifest.write_text(json.dumps({"store": (tmp_path / "store").as_uri(), "models": models}))  # JSON is YAML

    def compress() -> tuple[int, dict[str, dict[str, Any]], str]:
        words = ["compress", str(manifest), "--executor", "inline", "--json"]
        code = execute(*words)
        out, err = capsys.readouterr()
        return code, {row["model"]: row for row in json.loads(out)}, err

    code, rows, err = compress()
    assert code == exit_code(PartialError())
    assert [rows[name]["status"] for name in ("good", "gone", "merged")] == ["published", "failed", "published"]
    assert f"{gone.url}: 404 Not Found; put the file into a folder" in err
    assert rows["merged"]["source_bytes"] == len(BODY) + tail.stat().st_size
    assert len(good.gets) == 1
    gone.faults.clear()
    _, rows, _ = compress()
    assert [rows[name]["status"] for name in ("good", "gone", "merged")] == ["up to date", "published", "up to date"]
