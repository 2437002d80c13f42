"""The command line against a real S3 server: the whole path, and every way in which a store can refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import captured


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(96, 128, generator=generator), "a.bias": torch.randn(96, generator=generator)}
    save_file(tensors, tmp_path / "net.safetensors")
    (tmp_path / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    return tmp_path / "m.yaml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return captured(capsys, *arguments)


def test_s3_from_compress_to_export(s3_environment: str, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", s3_environment]
    code, out, err = run(capsys, "compress", str(manifest), "--executor", "inline", "--json", *store)
    assert code == 0, err
    assert json.loads(out)[0]["version"] == "v1"
    assert run(capsys, "verify", "net", "--against", str(manifest.parent / "net.safetensors"), *store)[0] == 0
    assert run(capsys, "pull", "net", "-o", str(manifest.parent / "p"), *store)[0] == 0
    assert run(capsys, "export", "net", "-o", str(manifest.parent / "x.safetensors"), *store)[0] == 0
    assert json.loads(run(capsys, "list", "--json", *store)[1])[0]["aliases"] == ["latest"]


def refused(capsys: pytest.CaptureFixture[str], manifest: Path, store: str, expected: int, *words: str) -> None:
    code, out, err = run(capsys, "compress", str(manifest), "--executor", "inline", "--store", store)
    lines = err.strip().splitlines()
    assert (code, len(lines)) == (expected, 1), err
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in err + out


def test_a_wrong_key(
    s3_environment: str, manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a")
    refused(capsys, manifest, s3_environment, 9, "AWS_")


def test_no_credentials(no_aws: None, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, manifest, "s3://some-bucket/x", 9, "AWS_ACCESS_KEY_ID")


def test_a_missing_bucket(s3_environment: str, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, manifest, "s3://no-such-bucket/x", 7, "no-such-bucket")


def test_nobody_answers(
    s3_environment: str, manifest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    refused(capsys, manifest, s3_environment, 8, "127.0.0.1:9")


def test_secrets_in_the_url_are_refused_and_not_repeated(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, manifest, "s3://key:canary-7f3a@bucket/x", 7, "AWS_SECRET_ACCESS_KEY")
    code, out, err = run(capsys, "list", "--store", "s3://key:canary-7f3a@bucket/x")
    assert "canary" not in out + err
    assert code == 7


def test_usage_errors_exit_with_2_and_no_traceback() -> None:
    command = [str(Path(sys.executable).with_name("birkhoff"))]
    for arguments in (["compress"], ["nonsense"], ["pull"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()


def test_up_and_down_are_commands(embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # the fixture's server is in use, so `down` must leave it alone
    monkeypatch.setenv("BIRKHOFF_HOME", str(embedded_server.home))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("birkhoff")), "store", "env"], capture_output=True, text=True, check=True
    )
    assert f"export AWS_ENDPOINT_URL_S3={embedded_server.endpoint}" in done.stdout


def test_env_leads_other_tools_there(
    s3_store: Store, embedded_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by the variables that it reads, in a shell that has no others."""
    s3_store.put("a/b", b"1")
    birkhoff = str(Path(sys.executable).with_name("birkhoff"))
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "BIRKHOFF_HOME": str(embedded_server.home)}
    if "PYTHONPATH" in os.environ:
        bare["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def shell(script: str) -> str:
        script = f'set -e; eval "$({birkhoff} store env)"; {script}'
        done = subprocess.run(
            ["bash", "-c", script], env=bare, capture_output=True, text=True, check=True, timeout=PATIENT_SECONDS
        )
        return done.stdout

    found = json.loads(
        subprocess.run(
            [birkhoff, "store", "env", "--json"], env=bare, capture_output=True, text=True, check=True
        ).stdout
    )
    assert found["S3_ENDPOINT_URL"] == found["AWS_ENDPOINT_URL_S3"] == embedded_server.endpoint
    assert found["BIRKHOFF_STORE"] == f"s3://{embedded_server.bucket}"
    exported = shell("env")
    assert [name for name, value in found.items() if f"{name}={value}\n" not in exported] == []

    folder = s3_store.url.removeprefix("s3://")
    boto3 = f"import boto3; print(boto3.client('s3').list_objects_v2(Bucket='{embedded_server.bucket}')['KeyCount'])"
    assert int(shell(f'{sys.executable} -c "{boto3}"')) >= 1
    programs = {name: which(name) or Path(sys.executable).with_name(name) for name in ("rclone", "s5cmd")}
    if Path(programs["rclone"]).exists():
        assert shell(f"{programs['rclone']} lsf -R --files-only birkhoff:{folder}").split() == ["a/b"]
    if Path(programs["s5cmd"]).exists():
        assert "a/b" in shell(f"{programs['s5cmd']} ls 's3://{folder}/*'")
