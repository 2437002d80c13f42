"""Versions in a real registry, Debian's docker-registry, and copied by skopeo."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

import birkhoff
from birkhoff.pipeline.artifact import oci_client
from birkhoff.pipeline.artifact.oci import MODEL_TYPE, PATH_KEY, WEIGHT_TYPE, OciPushed, OciStore
from birkhoff.pipeline.artifact.oci_client import OciReference, Registry
from birkhoff.pipeline.errors import (
    ArtifactNotFoundError,
    IntegrityError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreError,
    exit_code,
)
from birkhoff.pipeline.registry.labels import change_labels
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.artifact.registries import PASSWORD, USER, RunningRegistry, login_file, running
from tests.pipeline.artifact.test_oms import certified
from tests.pipeline.artifact.tokens import REFRESH, TokenServer, token_server
from tests.pipeline.command import captured, execute
from tests.pipeline.publishing import publish_tensors


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RunningRegistry]:
    with running(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def published(tmp_path: Path, directory_store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", directory_store.url)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    torch.manual_seed(0)
    tensors = {"w": torch.randn(64, 64), "v": torch.randn(64, 64)}
    version = publish_tensors(directory_store, "net", tensors, shard_weights=4096)
    change_labels(directory_store, "net", version.digest, {"licence": "MIT"})
    return directory_store


def _is_there(registry: RunningRegistry, repository: str, manifest: str) -> bool:
    accept = {"Accept": oci_client.MANIFEST_TYPE}
    return requests.head(f"http://{registry.host}/v2/{repository}/manifests/{manifest}", headers=accept).ok


def pushed(registry: RunningRegistry, tag: str = "v1") -> OciPushed:
    done = birkhoff.push("net", f"oci://{registry.host}/team/net:{tag}")
    assert isinstance(done, OciPushed)
    return done


def test_a_version_copied_by_skopeo_has_the_same_digest(
    registry: RunningRegistry, published: Store, tmp_path: Path
) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed: apt install skopeo")
    done = pushed(registry)
    with running(tmp_path / "second") as second:
        here, there = f"docker://{registry.host}/team/net:v1", f"docker://{second.host}/other/net:copied"
        flags = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        subprocess.run(["skopeo", "copy", *flags, here, there], check=True, capture_output=True)
        shown = subprocess.run(
            ["skopeo", "inspect", "--raw", "--tls-verify=false", there], check=True, capture_output=True
        ).stdout
        assert json.loads(shown)["artifactType"] == MODEL_TYPE
        assert _is_there(second, "other/net", done.manifest)
        back = birkhoff.pull(f"oci://{second.host}/other/net:copied", tmp_path / "back")
    assert back.digest == done.digest == resolve(published, "net").digest
    assert (back.model, back.version) == ("net", "v1")
    birkhoff.pull("net", tmp_path / "direct")
    for path in sorted((tmp_path / "direct").iterdir()):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert set(birkhoff.load_state_dict(tmp_path / "back")) == {"w", "v"}


def test_what_oras_pulls_is_a_folder_of_ours(registry: RunningRegistry, published: Store, tmp_path: Path) -> None:
    client = pytest.importorskip("oras.client", reason="oras is not installed")
    done = pushed(registry)
    names = client.OrasClient(insecure=True).pull(f"{registry.host}/team/net:v1", outdir=str(tmp_path / "by-oras"))
    birkhoff.pull("net", tmp_path / "by-us")
    ours = {str(path.relative_to(tmp_path / "by-us")) for path in (tmp_path / "by-us").rglob("*") if path.is_file()}
    assert {str(Path(name).relative_to(tmp_path / "by-oras")) for name in names} == ours
    for name in ours - {"version.json"}:  # which says how a folder was made
        assert (tmp_path / "by-oras" / name).read_bytes() == (tmp_path / "by-us" / name).read_bytes()
    assert execute("verify", str(tmp_path / "by-oras")) == 0
    assert set(birkhoff.load_state_dict(tmp_path / "by-oras")) == {"w", "v"}
    assert done.digest == resolve(published, "net").digest


def test_layers_are_our_blobs_and_stored_once(registry: RunningRegistry, published: Store) -> None:
    first = pushed(registry)
    assert first.copied == first.blobs == 2
    stored = registry.blobs()
    assert {shard.blob for shard in resolve(published, "net").manifest.shards} <= stored
    again = pushed(registry, "again")
    assert (again.copied, again.manifest, registry.blobs()) == (0, first.manifest, stored)
    body = requests.get(
        f"http://{registry.host}/v2/team/net/manifests/v1", headers={"Accept": oci_client.MANIFEST_TYPE}
    ).json()
    paths = {layer["annotations"][PATH_KEY]: layer["mediaType"] for layer in body["layers"]}
    assert paths["shard-00001-of-00002.safetensors"] == WEIGHT_TYPE
    config = requests.get(f"http://{registry.host}/v2/team/net/blobs/{body['config']['digest']}").json()
    assert config["descriptor"]["licenses"] == ["MIT"]
    assert config["config"]["precision"] == "int8"
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in body["layers"]]


def test_an_image_is_a_store_to_read(registry: RunningRegistry, published: Store) -> None:
    pushed(registry)
    with OciStore(OciReference.parse(f"oci://{registry.host}/team/net:v1")) as image:
        (listed,) = birkhoff.list("net", store=image)
        assert (listed.reference, listed.labels, listed.problem) == ("net@v1", {"licence": "MIT"}, None)
        assert set(birkhoff.load_state_dict("net@v1", image)) == {"w", "v"}
        with pytest.raises(StoreDeniedError, match="accepts whole versions only"):
            image.put("x", b"")
        with pytest.raises(ObjectNotFoundError):
            image.get("x")


def test_commands(
    registry: RunningRegistry, published: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"oci://{registry.host}/team/net:v1"
    code, text, _ = captured(capsys, "push", "net@v1", url, "--json")
    assert (code, json.loads(text)["copied_blobs"]) == (0, 2)
    code, text, _ = captured(capsys, "pull", url, "-o", str(tmp_path / "out"), "--json")
    assert (code, json.loads(text)["version"]) == (0, "v1")
    digest = json.loads(captured(capsys, "push", "net", url, "--json")[1])["manifest"]
    assert execute("pull", f"oci://{registry.host}/team/net@{digest}", "-o", str(tmp_path / "by-digest")) == 0
    for reference in (f"oci://{registry.host}/team/net:v9", f"oci://{registry.host}/absent:v1"):
        code, _, err = captured(capsys, "pull", reference, "-o", str(tmp_path / "no"))
        assert (code, "the registry has no manifest" in err) == (exit_code(ObjectNotFoundError("")), True)
    assert captured(capsys, "pull", url, "-o", str(tmp_path / "no"), "--offline")[0] == exit_code(
        ArtifactNotFoundError("")
    )
    assert captured(capsys, "push", "net", "s3://bucket")[0] == exit_code(StoreError(""))


def test_a_login_is_asked_for_and_used(published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path / "closed", login=True) as closed:
        with pytest.raises(StoreDeniedError, match="log in with `skopeo login`"):
            pushed(closed)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, closed.host, "wrong")))
        with pytest.raises(StoreDeniedError):
            pushed(closed)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, closed.host)))
        assert birkhoff.pull(pushed(closed).to, tmp_path / "in").version == "v1"


def test_tokens_are_asked_for_by_scope_and_renewed(
    published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's own token authentication: anybody pulls, only a login pushes."""
    with token_server(tmp_path) as tokens, running(tmp_path / "closed", token=tokens.config) as closed:
        target = f"oci://{closed.host}/team/net:v1"
        with pytest.raises(StoreDeniedError, match="skopeo login"):
            birkhoff.push("net", target)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, closed.host)))
        done = birkhoff.push("net", target)
        assert {scope for how, scope in tokens.asked if how == "login"} == {
            "repository:team/net:pull",
            "repository:team/net:pull,push",
        }
        monkeypatch.delenv("REGISTRY_AUTH_FILE")
        assert birkhoff.pull(target, tmp_path / "back").digest == done.digest
        assert ("nobody", "repository:team/net:pull") in tokens.asked
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, closed.host, password="wrong")))
        with pytest.raises(StoreDeniedError, match="skopeo login"):
            birkhoff.pull(target, tmp_path / "wrong")
        if shutil.which("skopeo") is not None:  # takes the same tokens
            flags = ["--tls-verify=false", "--creds", f"{USER}:{PASSWORD}"]
            asked = ["skopeo", "inspect", "--raw", *flags, f"docker://{closed.host}/team/net:v1"]
            assert (
                json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)["artifactType"] == MODEL_TYPE
            )


def test_a_token_that_ended_is_renewed_in_the_middle(
    published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with token_server(tmp_path) as tokens, running(tmp_path / "closed", token=tokens.config) as closed:
        reference = OciReference.parse(f"oci://{closed.host}/team/net:v1")
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, closed.host)))
        birkhoff.push("net", reference.url)
        registry = Registry(reference)
        first = registry.manifest("v1")
        before = len(tokens.asked)
        registry._token = f"Bearer {_ended(tokens)}"
        assert registry.manifest("v1") == first
        assert len(tokens.asked) == before + 1
        registry.close()


def _ended(tokens: TokenServer) -> str:
    tokens.seconds, held = -120, tokens.seconds
    token = tokens.token("repository:team/net:pull", known=True)
    tokens.seconds = held
    return token


def test_a_login_by_refresh_token_is_used(published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker login` leaves it for registries of clouds: an identity token in the place of a password."""
    with token_server(tmp_path) as tokens, running(tmp_path / "closed", token=tokens.config) as closed:
        for refresh in (REFRESH, "wrong"):
            found = {"auths": {closed.host: {"auth": "MDAwMDAwMDA6", "identitytoken": refresh}}}
            (tmp_path / "auth.json").write_text(json.dumps(found))
            monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
            if refresh == REFRESH:
                birkhoff.push("net", f"oci://{closed.host}/team/net:v1")
                assert ("refresh_token", "repository:team/net:pull,push") in tokens.asked
            else:
                with pytest.raises(StoreDeniedError) as caught:
                    birkhoff.push("net", f"oci://{closed.host}/team/net:v2")
                assert refresh not in str(caught.value)


@pytest.mark.parametrize("named", ["credHelpers", "credsStore"])
@pytest.mark.parametrize(("user", "secret"), [(USER, PASSWORD), ("<token>", REFRESH)])
def test_a_helper_is_asked_for_the_login(
    published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, user: str, secret: str
) -> None:
    """A program as the clouds' registries bring it, which keeps what is not to stand in a file."""
    with token_server(tmp_path) as tokens, running(tmp_path / "closed", token=tokens.config) as closed:
        program = tmp_path / "bin" / "docker-credential-tests"
        program.parent.mkdir()
        answer = json.dumps({"ServerURL": closed.host, "Username": user, "Secret": secret})
        program.write_text(f"#!/bin/sh\n[ \"$1 $(cat)\" = 'get {closed.host}' ] || exit 1\necho '{answer}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        config = {"auths": {closed.host: {}}, named: {closed.host: "tests"} if named == "credHelpers" else "tests"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        birkhoff.push("net", f"oci://{closed.host}/team/net:v1")
        program.write_text("#!/bin/sh\nexit 1\n")
        with pytest.raises(StoreDeniedError, match="docker login"):
            birkhoff.push("net", f"oci://{closed.host}/team/net:v2")


def test_tls_is_checked(published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = certified(tmp_path, address="127.0.0.1")
    assert signer.certificate is not None
    assert signer.key is not None
    with running(tmp_path / "secure", tls=(signer.certificate, signer.key)) as secure:
        with pytest.raises(StoreError, match=r"TLS fails .* REQUESTS_CA_BUNDLE"):
            pushed(secure)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(signer.chain[0]))
        assert birkhoff.pull(pushed(secure).to, tmp_path / "in").version == "v1"


def test_an_upload_goes_on_where_it_stands(
    registry: RunningRegistry, published: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci_client, "_PIECE_BYTES", 1000)
    sent: list[str] = []
    real = requests.Session.request

    def request(self: requests.Session, method: str, url: str, **more: object) -> requests.Response:
        if method == "PATCH":
            sent.append(dict(more["headers"])["Content-Range"])  # type: ignore[call-overload]
            if len(sent) == 2:
                raise requests.ConnectionError("cut before it was sent")
            if len(sent) == 4:
                real(self, method, url, **more)  # type: ignore[arg-type]
                raise requests.ConnectionError("its answer was lost")
        return real(self, method, url, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(requests.Session, "request", request)
    reference = OciReference.parse(f"oci://{registry.host}/team/net:v1")
    client, body = Registry(reference), bytes(range(256)) * 20
    digest = f"sha256:{oci_client.sha256(body)}"
    client.put_blob(digest, body)
    assert client.blob(digest) == body
    assert client.blob(digest, start=5000, length=50) == body[5000:5050]
    assert sent[:4] == ["0-999", "1000-1999", "1000-1999", "2000-2999"]  # goes on after the cut
    assert sent[4] in ("0-999", "3000-3999")  # this registry forgets an upload whose answer was lost
    with pytest.raises(StoreError, match="answer 400"):
        client.put_blob("sha256:" + "0" * 64, b"other bytes")


def test_what_the_registry_changed_is_noticed(
    registry: RunningRegistry, published: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pushed(registry)
    (first, _) = resolve(published, "net").manifest.shards
    path = next(registry.folder.glob(f"docker/registry/v2/blobs/sha256/*/{first.blob}/data"))
    body = bytearray(path.read_bytes())
    body[100] ^= 1
    path.write_bytes(body)
    with pytest.raises(IntegrityError, match=first.blob):
        birkhoff.pull(done.to, tmp_path / "in")
    assert not (tmp_path / "in" / "manifest.json").exists()


def test_an_image_of_somebody_else_is_one_line(registry: RunningRegistry, published: Store) -> None:
    reference = OciReference.parse(f"oci://{registry.host}/team/x:v1")
    client = Registry(reference)
    empty = f"sha256:{oci_client.sha256(b'{}')}"
    client.put_blob(empty, b"{}")
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": empty, "size": 2}
    for layers in ([], [{**config, "annotations": {PATH_KEY: "manifest.json"}}], [config]):
        manifest = {"schemaVersion": 2, "mediaType": oci_client.MANIFEST_TYPE, "config": config, "layers": layers}
        client.put_manifest("v1", json.dumps(manifest).encode())
        with pytest.raises(IntegrityError, match="not a version of birkhoff"):
            OciStore(reference)


@pytest.mark.parametrize(
    "text",
    [
        "oci://",
        "oci://host",
        "oci://user:secret@host/a:b",
        "oci://host/UPPER:v1",
        "oci://host/a:b:c",
        "oci://h/a@sha256:1",
    ],
)
def test_references_that_name_nothing(text: str) -> None:
    with pytest.raises(StoreError, match="expected oci://HOST/REPOSITORY:TAG"):
        OciReference.parse(text)
    assert OciReference.parse("oci://host:5000/a/b").url == "oci://host:5000/a/b:latest"
    with pytest.raises(StoreError, match=r"does not answer"):
        Registry(OciReference.parse("oci://127.0.0.1:9/a:b")).manifest("b")
