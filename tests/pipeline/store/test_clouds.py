"""Google's and Azure's stores: what their answers come to, what doctor says of them, and whole commands on them.

Odd answers are made by a proxy in front of the emulators. Each is named in one line with what to do next.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreConflictError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings
from birkhoff.pipeline.store.open import open_address, open_store
from birkhoff.pipeline.store.probe import check_store
from tests.harness.faults.catalogue import Answer, Before, Break, Fault
from tests.harness.faults.proxy import Proxy, Rule
from tests.pipeline.command import captured
from tests.pipeline.emulators import ACCOUNT, KEY, Emulator

Capture = pytest.CaptureFixture[str]
CLOUDS = ("gcs", "azure")
REQUESTS = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "LIST")
BODY = b"0123456789"


@dataclass
class Place:
    """An emulator by way of the proxy, which answers as it is told to."""

    proxy: Proxy
    url: str
    endpoint: str

    def speaks(
        self,
        before: Before | None = None,
        after: Callable[[Answer], None] | None = None,
        methods: tuple[str, ...] = REQUESTS,
        times: int = 10**6,
    ) -> None:
        """Answer these methods so from now on."""
        late = None if after is None else lambda answer, _: after(answer)
        self.proxy.arm(Rule(fault=Fault(name="odd", before=before, after=late), methods=methods, key="", times=times))

    def open(self, **settings: object) -> Store:
        """A new store."""
        chosen = {"endpoint": self.endpoint, "attempts": 1, "anonymous": self.url.startswith("gs"), **settings}
        return open_store(self.url, StoreSettings(**chosen))  # type: ignore[arg-type]


@pytest.fixture(params=CLOUDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    url = request.getfixturevalue(f"{request.param}_environment")
    emulator: Emulator = request.getfixturevalue(f"{request.param}_emulator")
    proxy = Proxy(target=int(emulator.endpoint.split(":")[2].partition("/")[0]))
    endpoint = proxy.endpoint if request.param == "gcs" else f"{proxy.endpoint}/{ACCOUNT}"
    yield Place(proxy, url, endpoint)
    proxy.close()


def _google(status: int, reason: str) -> Answer:
    error = {"code": status, "message": f"about {reason}", "errors": [{"reason": reason, "message": f"about {reason}"}]}
    headers = [("Content-Type", "application/json"), ("Retry-After", "0")]
    return Answer(status=status, reason="x", headers=headers, body=json.dumps({"error": error}).encode())


def _microsoft(status: int, code: str) -> Answer:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>about {code}</Message></Error>"
    headers = [("Content-Type", "application/xml"), ("x-ms-error-code", code), ("Retry-After", "0")]
    return Answer(status=status, reason="x", headers=headers, body=text.encode())


ANSWERS = [
    ("gcs", 401, "authError", StoreDeniedError, "application-default login"),
    ("gcs", 403, "forbidden", StoreDeniedError, "roles of these credentials"),
    ("gcs", 403, "rateLimitExceeded", StoreUnreachableError, "try again later"),
    ("gcs", 403, "retentionPolicyNotMet", StoreError, "retention policy or a hold"),
    ("gcs", 403, "accountDisabled", StoreError, "billing and the quotas"),
    ("gcs", 400, "userProjectMissing", StoreError, "billing and the quotas"),
    ("gcs", 409, "conflict", StoreConflictError, "other writers are busy"),
    ("gcs", 412, "conditionNotMet", PreconditionError, "gone"),
    ("gcs", 429, "rateLimitExceeded", StoreUnreachableError, "try again later"),
    ("gcs", 503, "backendError", StoreUnreachableError, "STORAGE_EMULATOR_HOST"),
    ("gcs", 400, "invalid", StoreError, "manual for invalid"),
    ("azure", 403, "AuthenticationFailed", StoreDeniedError, "AZURE_STORAGE_KEY"),
    ("azure", 403, "AuthorizationPermissionMismatch", StoreDeniedError, "roles of this identity"),
    ("azure", 404, "ContainerNotFound", StoreError, "no container 'birkhoff'; create it"),
    ("azure", 409, "BlobImmutableDueToPolicy", StoreError, "a policy, a hold, a lease"),
    ("azure", 412, "LeaseIdMissing", StoreError, "a policy, a hold, a lease"),
    ("azure", 409, "AccountBeingCreated", StoreConflictError, "other writers are busy"),
    ("azure", 412, "ConditionNotMet", PreconditionError, "gone"),
    ("azure", 400, "Md5Mismatch", StoreUnreachableError, "try again later"),
    ("azure", 503, "ServerBusy", StoreUnreachableError, "try again later"),
    ("azure", 500, "OperationTimedOut", StoreUnreachableError, "AZURE_STORAGE_"),
    ("azure", 400, "InvalidUri", StoreError, "manual for InvalidUri"),
]


@pytest.mark.parametrize(("place", "status", "code", "kind", "text"), ANSWERS, indirect=["place"])
def test_answers_become_errors_with_a_remedy(
    place: Place, status: int, code: str, kind: type[StoreError], text: str
) -> None:
    made = _google if place.url.startswith("gs") else _microsoft
    place.speaks(lambda *_: made(status, code), methods=("PUT", "POST"))
    with place.open() as store, pytest.raises(kind, match=text) as caught:
        store.replace("some/key", b"", tag="1")
    assert type(caught.value) is kind
    assert f"{place.url}/some/key" in str(caught.value)
    if kind is not PreconditionError:
        assert f"at {place.endpoint}: {status} {code}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_passes_is_tried_again_and_a_lost_answer_is_no_loss(place: Place) -> None:
    busy = _google(503, "backendError") if place.url.startswith("gs") else _microsoft(503, "ServerBusy")

    def lost(_: Answer) -> None:
        raise Break(reset=True)

    with place.open(attempts=3) as store:
        place.speaks(lambda *_: busy, times=2)
        tag = store.put("a", BODY)
        place.speaks(after=lost, times=1)
        assert store.create("b", BODY) == store.head("b").tag
        place.speaks(after=lost, times=1)
        assert store.replace("a", b"new", tag=tag) == store.head("a").tag
        place.speaks(lambda *_: busy, times=1, methods=("LIST", "GET"))
        assert [info.key for info in store.list()] == ["a", "b"]


@pytest.mark.parametrize("place", ["gcs"], indirect=True)  # Azure has no permission that only overwriting takes
def test_who_may_not_overwrite_still_loses_or_finds_its_own_body(place: Place) -> None:
    with place.open() as store:
        store.put("a", BODY)
        place.speaks(lambda *_: _google(403, "forbidden"), methods=("POST",))
        assert store.create("a", BODY) == store.head("a").tag
        with pytest.raises(PreconditionError, match="another body"):
            store.create("a", b"other")
        with pytest.raises(StoreDeniedError):
            store.create("b", BODY)
        with pytest.raises(StoreDeniedError):
            store.put("a", BODY)


def test_a_changed_body_is_no_object(place: Place) -> None:
    def flip(answer: Answer) -> None:
        answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])

    with place.open() as store:
        store.put("a", BODY)
        place.speaks(after=flip, methods=("GET",))
        with pytest.raises(IntegrityError, match="publish it again"):
            store.get("a")


def test_a_trickle_ends_in_bounded_time(place: Place) -> None:
    def trickle(answer: Answer) -> None:
        answer.pieces, answer.pause = 50, 0.1

    with place.open(read_timeout=0.4) as store:
        store.put("a", bytes(200))
        place.speaks(after=trickle, methods=("GET",))
        started = time.monotonic()
        with pytest.raises(StoreUnreachableError):
            store.get("a")
        assert time.monotonic() - started < 10


def test_what_is_no_object_store_is_called_unreachable(place: Place) -> None:
    page = Answer(status=200, reason="OK", headers=[("Content-Type", "text/html")], body=b"<html>Sign in</html>")
    place.speaks(lambda *_: page)
    with place.open() as store:
        for call in (lambda: store.put("a", b""), lambda: store.read("a"), lambda: store.head("a"), store.list):
            with pytest.raises(StoreUnreachableError):
                call()


def test_nothing_there_is_unreachable_in_bounded_time(place: Place) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, then says nothing
        for port in (1, silent.getsockname()[1]):
            nobody = place.endpoint.replace(place.proxy.endpoint, f"http://127.0.0.1:{port}")
            with place.open(endpoint=nobody, connect_timeout=1, read_timeout=0.3, attempts=2) as store:
                for call in (lambda: check_store(store), store.list, lambda: store.get("a")):
                    with pytest.raises(StoreUnreachableError, match="check the network"):
                        call()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_missing_bucket_is_named(cloud: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{cloud}_environment")
    with open_store(url.replace("birkhoff", "no-such-bucket"), StoreSettings(attempts=1)) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: store.put("a", b""),
            lambda: store.delete("a"),
            lambda: store.list(),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=r"no (bucket|container) 'no-such-bucket'") as caught:
                call()
            assert not isinstance(caught.value, ObjectNotFoundError)


def test_wrong_credentials_are_denied(
    azure_environment: str, monkeypatch: pytest.MonkeyPatch, signed_gcs_store: Store
) -> None:
    anonymous = StoreSettings(endpoint=signed_gcs_store.address.settings.endpoint, anonymous=True)
    with open_store(signed_gcs_store.url, anonymous) as store, pytest.raises(StoreDeniedError, match="401 required"):
        store.put("a", b"")
    right, wrong = os.environ["AZURE_STORAGE_CONNECTION_STRING"], KEY.swapcase()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", right.replace(KEY, wrong))
    with open_store(azure_environment) as store:
        for call in (lambda: store.put("a", b""), lambda: store.head("a"), store.list):
            with pytest.raises(StoreDeniedError, match=r"403 .*AZURE_STORAGE_KEY") as caught:
                call()
            assert wrong not in str(caught.value)


def test_no_credentials_are_denied(no_clouds: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip("azure.storage.blob")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreDeniedError, match="gcloud auth application-default login"):
        open_store("gs://bucket")
    with pytest.raises(StoreDeniedError, match="AZURE_STORAGE_CONNECTION_STRING"):
        open_store("az://container")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "not one")
    with pytest.raises(StoreError, match="NAME=VALUE"):
        open_store("az://container")


def test_the_account_is_found_as_the_command_line_of_azure_finds_it(
    no_clouds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("azure.storage.blob")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "fleet")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    with open_store("az://models/x/") as store:
        assert store.address.settings.endpoint == "https://fleet.blob.core.windows.net"
        assert KEY not in repr(store.address)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT")
        with open_address(store.address) as elsewhere:  # a worker without that variable
            assert elsewhere.url == "az://models/x"
    with pytest.raises(StoreError, match="plain http"):
        open_store("az://models", StoreSettings(endpoint="http://192.0.2.1/fleet"))


@pytest.mark.parametrize("url", ["gs://key:hunter2@bucket/a", "az://account:hunter2@container"])
def test_credentials_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match="without credentials") as caught:
        StoreAddress.parse(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket", "gcs"), ("az://container", "azure")])
def test_a_missing_library_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("birkhoff.pipeline.store.gcs", "google.cloud"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(("birkhoff.pipeline.store.azure", "azure."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    monkeypatch.setitem(sys.modules, "azure.core", None)
    with pytest.raises(StoreError, match=rf"pip install 'birkhoff-compression\[{extra}\]'"):
        open_store(url)


# --- whole commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_model_is_published_pulled_promoted_and_collected(
    cloud: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    url = request.getfixturevalue(f"{cloud}_environment")
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", url)

    def run(*arguments: object) -> str:
        code, out, err = captured(capsys, *map(str, arguments))
        assert code == 0, err
        return out

    with open_store(url) as store:
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            save_file({"a.weight": torch.randn(64, 64, generator=generator)}, tmp_path / "net.safetensors")
            store.put(f"sources/{seed}/net.safetensors", (tmp_path / "net.safetensors").read_bytes())
            source = f"{url}/sources/{seed}/net.safetensors"
            (tmp_path / "m.yaml").write_text(f"models: [{{name: net, source: '{source}'}}]\n")
            run("compress", tmp_path / "m.yaml", "--executor", "inline")
        run("promote", "net@v2")
        run("pull", "net@stable", "-o", tmp_path / "pulled")
        run("verify", "net@v1")
        before = {info.key for info in store.list("blobs/")}
        run("gc", "--yes", "--grace", "0s", "--keep", 1)
        run("gc", "--yes", "--grace", "0s")
        assert {info.key for info in store.list("blobs/")} < before
    run("verify", "net@v2")
    rows = {row["check"]: row for row in json.loads(run("doctor", "--json"))}
    assert rows["store"]["found"] == f"{url}: written, read, replaced, deleted"
    assert rows["conditional writes"]["state"] == "ok"
    assert rows["late deletions"]["state"] == ("note" if cloud == "gcs" else "ok")
    assert rows[cloud]["state"] == "ok"
    assert KEY not in json.dumps(rows)


def test_doctor_names_the_remedy_of_each_cloud(
    no_clouds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("google.cloud.storage")
    pytest.importorskip("azure.storage.blob")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for url, text in (("gs://bucket", "gcloud auth"), ("az://container", "az login")):
        code, out, _ = captured(capsys, "doctor", "--json", "--store", url)
        rows: dict[str, Any] = {row["check"]: row for row in json.loads(out)}
        assert (code, rows["credentials"]["state"]) == (9, "fails")
        assert text in rows["credentials"]["advice"]
