"""OMS signatures against the OpenSSF's own tool, which signs and verifies on the other side.

`fixtures/oms` holds its public test vectors: scripts/tests of github.com/sigstore/model-transparency at e343073,
Apache-2.0, by its authors.
"""

import ipaddress
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from birkhoff.pipeline.artifact.oms import OmsKey, attached, oms_key, sign_folder, verify_folder
from birkhoff.pipeline.artifact.statements import bill_of_materials, provenance
from birkhoff.pipeline.errors import ArtifactNotFoundError, TrustError, exit_code
from birkhoff.pipeline.registry.documents import SourceRecord, VersionManifest
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.command import captured, execute
from tests.pipeline.publishing import publish_tensors

VECTORS = Path(__file__).parent / "fixtures" / "oms"


@pytest.fixture
def tool() -> None:
    pytest.importorskip("model_signing.signing", reason="model-signing is not installed")


def theirs(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The OpenSSF's command."""
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, text=True)


def key_pair(folder: Path, name: str) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def certified(folder: Path, address: str | None = None) -> OmsKey:
    """A key with a certificate of a root of our own, `root.crt`: to sign code, or for a server at an address."""
    root, leaf = key_pair(folder, "root"), key_pair(folder, "leaf")
    now = datetime.now(UTC)
    for name, key, authority in (("root", root, True), ("leaf", leaf, False)):
        usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
        )
        if not authority:
            purpose = ExtendedKeyUsageOID.CODE_SIGNING if address is None else ExtendedKeyUsageOID.SERVER_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            if address is not None:
                names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
                builder = builder.add_extension(names, critical=False)
        (folder / f"{name}.crt").write_bytes(builder.sign(root, hashes.SHA256()).public_bytes(Encoding.PEM))
    return OmsKey(key=folder / "leaf.pem", certificate=folder / "leaf.crt", chain=(folder / "root.crt",))


@pytest.fixture
def pulled(tool: None, tmp_path: Path, directory_store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", directory_store.url)
    torch.manual_seed(0)
    publish_tensors(directory_store, "net", {"w": torch.randn(64, 64), "v": torch.randn(64, 64)}, shard_weights=4096)
    assert execute("pull", "net", "-o", str(tmp_path / "folder")) == 0
    return tmp_path / "folder"


def flip(path: Path) -> None:
    """One bit of a file, which may be a link into the cache."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.unlink()
    path.write_bytes(body)


def test_their_tool_accepts_a_pulled_folder_and_no_flipped_byte(pulled: Path, tmp_path: Path) -> None:
    key_pair(tmp_path, "oms")
    assert execute("oms", "sign", str(pulled), "--key", str(tmp_path / "oms.pem")) == 0
    words = ("verify", "key", "--signature", pulled / "model.sig", "--public_key", tmp_path / "oms.pub", pulled)
    accepted = theirs(*words)
    assert accepted.returncode == 0, accepted.stderr
    assert execute("oms", "verify", str(pulled), "--key", str(tmp_path / "oms.pub")) == 0
    assert execute("pull", "net", "-o", str(pulled)) == 0  # what is no weight may change
    flip(next(pulled.glob("shard-00002*")))
    refused = theirs(*words)
    assert refused.returncode != 0
    assert "mismatch" in refused.stdout + refused.stderr


def test_a_version_carries_its_signature_into_every_folder(
    pulled: Path, tmp_path: Path, directory_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    key_pair(tmp_path, "oms")
    code, text, _ = captured(capsys, "oms", "sign", "net@v1", "--key", str(tmp_path / "oms.pem"), "--json")
    assert (code, json.loads(text)["version"]) == (0, "v1")
    assert attached(directory_store, "net", resolve(directory_store, "net").digest)
    for folder in (pulled, tmp_path / "fresh"):  # an old folder gets it too
        assert execute("pull", "net", "-o", str(folder)) == 0
        assert theirs(
            "verify", "key", "--signature", folder / "model.sig", "--public_key", tmp_path / "oms.pub", folder
        ).returncode == 0  # fmt: skip
    copied = (tmp_path / "copy").as_uri()
    assert execute("copy", "net", "--to", copied) == 0
    assert execute("pull", "net", "--store", copied, "-o", str(tmp_path / "from-copy")) == 0
    verify_folder(tmp_path / "from-copy", OmsKey(key=tmp_path / "oms.pub"))
    publish_tensors(directory_store, "net", {"w": torch.zeros(64, 64)})
    assert execute("pull", "net", "-o", str(pulled)) == 0
    assert not (pulled / "model.sig").exists()  # the old version's goes


def test_offline_a_folder_carries_the_signature_that_its_last_pull_brought(
    pulled: Path, tmp_path: Path, directory_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    key_pair(tmp_path, "oms")
    trusted, again = OmsKey(key=tmp_path / "oms.pub"), ("pull", "net", "-o")
    assert execute(*again, str(tmp_path / "unsigned"), "--offline") == 0
    assert not (tmp_path / "unsigned/model.sig").exists()
    assert execute("oms", "sign", "net", "--key", str(tmp_path / "oms.pem")) == 0
    assert execute(*again, str(pulled)) == 0
    online = [captured(capsys, name, "net") for name in ("bom", "provenance")]
    (tmp_path / "store").rename(tmp_path / "gone")
    assert execute(*again, str(tmp_path / "signed"), "--offline") == 0
    verify_folder(tmp_path / "signed", trusted)
    assert (tmp_path / "signed/model.sig").read_bytes() == (pulled / "model.sig").read_bytes()
    assert [captured(capsys, name, "net", "--offline") for name in ("bom", "provenance")] == online
    (tmp_path / "gone").rename(tmp_path / "store")
    digest = resolve(directory_store, "net").digest
    directory_store.delete(oms_key("net", digest))
    assert execute(*again, str(pulled)) == 0  # the store has none any more, and this machine knows it
    assert execute(*again, str(tmp_path / "signed"), "--offline") == 0
    assert not (tmp_path / "signed/model.sig").exists()


def test_certificates(pulled: Path, tmp_path: Path) -> None:
    signer = certified(tmp_path)
    bundle = sign_folder(pulled, signer)
    verify_folder(pulled, OmsKey(chain=signer.chain))
    accepted = theirs("verify", "certificate", "--signature", bundle, "--certificate_chain", signer.chain[0], pulled)
    assert accepted.returncode == 0, accepted.stderr
    (tmp_path / "other").mkdir()
    with pytest.raises(TrustError, match="its signature does not hold"):
        verify_folder(pulled, OmsKey(chain=certified(tmp_path / "other").chain))


@pytest.mark.parametrize(
    "change", ["flipped", "added", "removed", "renamed", "another key", "bundle", "manifest", "no bundle"]
)
def test_whatever_differs_is_refused(
    pulled: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key_pair(tmp_path, "oms")
    sign_folder(pulled, OmsKey(key=tmp_path / "oms.pem"))
    shard = next(pulled.glob("shard-00001*"))
    trusted = tmp_path / "oms.pub"
    if change == "flipped":
        flip(shard)
    elif change == "added":
        (pulled / "more.txt").write_text("x")
    elif change == "removed":
        shard.unlink()
    elif change == "renamed":
        shard.rename(pulled / "shard-9.safetensors")
    elif change == "another key":
        key_pair(tmp_path, "other")
        trusted = tmp_path / "other.pub"
    elif change == "bundle":
        flip(pulled / "model.sig")
    elif change == "manifest":
        flip(pulled / "manifest.json")
    else:
        (pulled / "model.sig").unlink()
    code, _, err = captured(capsys, "oms", "verify", str(pulled), "--key", str(trusted))
    kind = ArtifactNotFoundError("") if change == "no bundle" else TrustError("")
    assert code == exit_code(kind)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["key", "certificate"])
def test_the_public_test_vectors_hold(tool: None, kind: str, tmp_path: Path) -> None:
    folder = VECTORS / ("v1.1.0-elliptic-key" if kind == "key" else "v1.1.0-certificate")
    trusted = OmsKey(key=VECTORS / "signing-key-pub.pem") if kind == "key" else OmsKey(chain=(VECTORS / "ca-cert.pem",))
    verify_folder(folder, trusted, ignored=[folder / "ignore-me"])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    flip(copy / "signme-1")
    with pytest.raises(TrustError, match="does not hold"):
        verify_folder(copy, trusted, ignored=[copy / "ignore-me"])


def test_keys_that_cannot_sign_are_one_line(pulled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("key", "new", str(tmp_path / "ed25519.key")) == 0
    for name in ("ed25519.key", "absent.pem"):
        code, _, err = captured(capsys, "oms", "sign", str(pulled), "--key", str(tmp_path / name))
        assert code == exit_code(TrustError(""))
        assert "openssl ecparam -name prime256v1" in err
    assert captured(capsys, "oms", "verify", str(pulled))[0] == 2
    assert captured(capsys, "oms", "sign", "./absent", "--key", "k")[0] == exit_code(ArtifactNotFoundError(""))


def version(origin: tuple[str, ...] | None, store: Store) -> VersionManifest:
    found = publish_tensors(store, "net", {"w": torch.randn(64, 64)}).manifest
    source = SourceRecord(file="x.pth", sha256="a" * 64, bytes=9, format="torch-zip", origin=origin)
    return found.model_copy(update={"source": source})


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("origin", [None, (f"hf://org/net@{COMMIT}/x.pth",)])
def test_provenance_is_an_in_toto_statement(tool: None, memory_store: Store, origin: tuple[str, ...] | None) -> None:
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    manifest = version(origin, memory_store)
    found = provenance(manifest)
    Statement.copy_from_pb(ParseDict(found, Message())).validate()
    dependencies: list[dict[str, Any]] = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert dependencies[0]["digest"] == {"sha256": "a" * 64}
    assert [entry["digest"]["gitCommit"] for entry in dependencies[1:]] == ([COMMIT] if origin else [])
    assert found["subject"][0]["digest"] == {"sha256": manifest.digest}
    assert {entry["digest"]["sha256"] for entry in found["subject"][1:]} == {r.blob for r in manifest.stored}
    assert provenance(manifest) == found


@pytest.mark.parametrize("origin", [None, (f"hf://org/net@{COMMIT}/x.pth",)])
def test_a_bill_of_materials_is_cyclonedx(memory_store: Store, origin: tuple[str, ...] | None) -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = bill_of_materials(version(origin, memory_store))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(found)) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps({**found, "version": "x"})) is not None


def test_statements_are_commands(pulled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, key in (("provenance", "predicateType"), ("bom", "bomFormat")):
        stored = json.loads(captured(capsys, command, "net@v1")[1])
        assert stored[key]
        assert json.loads(captured(capsys, command, str(pulled))[1]) == stored
