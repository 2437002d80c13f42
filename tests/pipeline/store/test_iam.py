"""The policies of manifests/iam, word for word, under the S3 server's own access control.

SeaweedFS serves AWS's IAM calls too: each role is a user with a key pair and one of the policies, of which only BUCKET
and PREFIX are filled in.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.store import seaweedfs_process
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer, use_embedded
from tests.pipeline.command import execute

POLICIES = Path(__file__).parents[3] / "manifests/iam"
PREFIX = "fleet"
ROLES = ("publisher", "puller", "collector")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A server and the key pair of each role; `root` may do everything."""

    server: EmbeddedServer
    pairs: dict[str, tuple[str, str]]

    def client(self, role: str, service: str = "s3") -> Any:
        key, secret = self.pairs[role]
        return boto3.client(
            service,
            endpoint_url=self.server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    usual = seaweedfs_process._arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seaweedfs_process, "_arguments", lambda *given: [*usual(*given), "-s3.iam.readOnly=false"])
        with use_embedded(tmp_path_factory.mktemp("home")) as server:
            pairs = {"root": (server.credentials.access_key, server.credentials.secret_key)}
            found = World(server=server, pairs=pairs)
            iam = found.client("root", "iam")
            for role in ROLES:
                policy = (POLICIES / f"{role}.json").read_text()
                policy = policy.replace("BUCKET", server.bucket).replace("PREFIX", PREFIX)
                iam.create_user(UserName=role)
                pair = iam.create_access_key(UserName=role)["AccessKey"]
                iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=policy)
                pairs[role] = (pair["AccessKeyId"], pair["SecretAccessKey"])
            yield found


@pytest.fixture
def command(
    world: World, no_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs a command as a role: (exit code, stdout, stderr)."""
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", f"s3://{world.server.bucket}/{PREFIX}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", world.server.endpoint)

    def run(role: str, *arguments: object) -> tuple[int, str, str]:
        key, secret = world.pairs[role]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        capsys.readouterr()
        code = execute(*map(str, arguments))
        out, err = capsys.readouterr()
        assert secret not in out + err
        return code, out, err

    return run


def _manifest(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_file({"a.weight": torch.randn(64, 64, generator=generator)}, folder / "net.safetensors")
    (folder / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    return folder / "m.yaml"


def test_each_role_does_its_work_and_no_other(world: World, command: Any, tmp_path: Path) -> None:
    def allowed(role: str, *arguments: object) -> Any:
        code, out, err = command(role, *arguments)
        assert code == 0, err
        return out

    def denied(role: str, *arguments: object) -> None:
        code, _, err = command(role, *arguments)
        last = err.strip().splitlines()[-1]
        assert code == 9, err
        assert "403" in last
        assert "check the key pair and its permissions" in last

    compress = ("compress", _manifest(tmp_path, 1), "--executor", "inline")
    denied("puller", *compress)
    denied("collector", *compress)
    allowed("publisher", *compress)
    _manifest(tmp_path, 2)
    allowed("publisher", *compress)
    allowed("publisher", "promote", "net@v1")
    denied("puller", "promote", "net@v2")
    denied("collector", "promote", "net@v2")
    denied("collector", "rollback", "net", "latest")

    for reader in ("puller", "publisher"):
        allowed(reader, "pull", "net@stable", "-o", tmp_path / f"pulled-{reader}")
        allowed(reader, "verify", "net")
    assert json.loads(allowed("puller", "list", "--json"))
    allowed("puller", "history", "net")

    for verb in (("label", "net", "licence=MIT"), ("remove", "net@stable")):
        denied("puller", *verb)
        denied("collector", *verb)
        allowed("publisher", *verb)
    elsewhere, archive = (tmp_path / "elsewhere").as_uri(), tmp_path / "net.tar"
    allowed("puller", "copy", "net", "--to", elsewhere)  # reading alone
    allowed("puller", "save", "net", "-o", archive)
    here = f"s3://{world.server.bucket}/{PREFIX}"
    for verb in (("load", archive), ("copy", "net", "--store", elsewhere, "--to", here)):
        denied("puller", *verb)
        denied("collector", *verb)
        allowed("publisher", *verb)

    for other in ("puller", "publisher"):
        denied(other, "gc", "--yes", "--grace", "0s")
    allowed("publisher", "promote", "net@v2")  # no lease of a refused collection holds it off
    allowed("collector", "gc", "--yes", "--grace", "0s", "--keep", 1)
    allowed("collector", "gc", "--yes", "--grace", "0s")
    code, _, err = command("puller", "pull", "net@v1", "-o", tmp_path / "gone")
    assert (code, "net" in err) == (10, True)
    allowed("puller", "verify", "net@v2")


def test_doctor_tells_who_may_only_read_from_who_may_not(world: World, command: Any, tmp_path: Path) -> None:
    def found(role: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = command(role, "doctor", "--json")
        return code, {row["check"]: row for row in json.loads(out)}

    assert command("publisher", "compress", _manifest(tmp_path, 3), "--executor", "inline")[0] == 0
    for role in ("puller", "collector"):
        code, rows = found(role)
        assert (code, rows["credentials"]["state"], rows["store"]["state"]) == (0, "ok", "note")
        assert "may be read, may not be written: `pull`" in rows["store"]["found"]
        assert "manifests/iam/publisher.json" in rows["store"]["advice"]
        assert "conditional writes" not in rows
    code, rows = found("publisher")
    assert (code, rows["store"]["state"], rows["conditional writes"]["state"]) == (0, "ok", "ok")
    world.pairs["stranger"] = (world.pairs["puller"][0], "x" * 40)
    code, rows = found("stranger")
    assert (code, rows["credentials"]["state"], "store" in rows) == (9, "fails", False)


@pytest.mark.parametrize(
    ("key", "publisher", "puller", "collector"),
    [
        ("models/m/names/v1.json", "rw-", "r--", "rwd"),
        ("models/m/aliases/latest.json", "rw-", "r--", "rw-"),
        ("models/m/versions/ab/manifest.json", "rw-", "r--", "r-d"),
        ("models/m/versions/ab/signatures/cd.json", "rw-", "r--", "r-d"),
        ("models/m/versions/ab/labels.json", "rw-", "r--", "r-d"),
        ("blobs/sha256/ab/cd", "rw-", "r--", "r-d"),
        ("shards/ab/cd.json", "rw-", "---", "r-d"),
        ("statistics/ab/cd.json", "rw-", "---", "r-d"),
        ("runs/open/x.json", "rwd", "r--", "r-d"),
        ("runs/turn/x.json", "rwd", "r--", "r-d"),
        ("runs/sweep/x.json", "r--", "r--", "rwd"),
        ("runs/condemned.json", "rw-", "r--", "rwd"),
        ("runs/20260101T000000/report.json", "rw-", "r--", "r-d"),
        ("probe/x", "rwd", "---", "---"),
        ("../elsewhere/x", "---", "---", "---"),
    ],
)
def test_what_each_role_may_do_with_an_object(
    world: World, no_aws: None, key: str, publisher: str, puller: str, collector: str
) -> None:
    full = key.removeprefix("../") if key.startswith("../") else f"{PREFIX}/{key}"
    root, bucket = world.client("root"), world.server.bucket
    for role, expected in zip(ROLES, (publisher, puller, collector), strict=True):
        client, found = world.client(role), ""
        calls: tuple[tuple[str, str, dict[str, bytes]], ...]
        calls = (("r", "get_object", {}), ("w", "put_object", {"Body": b"b"}), ("d", "delete_object", {}))
        for letter, method, more in calls:
            root.put_object(Bucket=bucket, Key=full, Body=b"a")
            try:
                getattr(client, method)(Bucket=bucket, Key=full, **more)
                found += letter
            except client.exceptions.ClientError as error:
                found += "-" if error.response["Error"]["Code"] == "AccessDenied" else "?"
        assert found == expected, role
    root.delete_object(Bucket=bucket, Key=full)
