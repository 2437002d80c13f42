"""Debian's docker-registry on loopback, with or without TLS and a login; started by the tests, as SeaweedFS is."""

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.patience import PATIENT_SECONDS

USER, PASSWORD = "user", "right"
HTPASSWD = "user:$2y$05$wEFmkapluo9HwkWHc0ocOe2iuGivceAOxqqyXnudd/O.LKqoisyZC"
"""Of that user and password, by bcrypt."""


@dataclass(frozen=True)
class RunningRegistry:
    host: str
    folder: Path

    def blobs(self) -> set[str]:
        """Digests that it stores, each once."""
        return {path.parent.name for path in self.folder.glob("docker/registry/v2/blobs/sha256/*/*/data")}


@contextmanager
def running(
    folder: Path,
    *,
    tls: tuple[Path, Path] | None = None,
    login: bool = False,
    token: Mapping[str, object] | None = None,
) -> Iterator[RunningRegistry]:
    """A registry until the block ends, with a login or the tokens of a server (`tokens`).

    Skips the test where none is installed: apt install docker-registry.
    """
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed: apt install docker-registry")
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    http: dict[str, object] = {"addr": host}
    if tls is not None:
        http["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": http,
    }
    if login:
        (folder / "htpasswd").write_text(HTPASSWD + "\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    if token is not None:
        config["auth"] = {"token": dict(token)}
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        _wait(host, process, folder / "log", tls=tls is not None)
        yield RunningRegistry(host=host, folder=folder / "data")
    finally:
        process.terminate()
        process.wait(PATIENT_SECONDS)


def _wait(host: str, process: subprocess.Popen[bytes], log: Path, *, tls: bool) -> None:
    end = time.monotonic() + PATIENT_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            requests.get(f"{'https' if tls else 'http'}://{host}/v2/", timeout=5, verify=False)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError(f"no answer: {log.read_text()}")


def login_file(folder: Path, host: str, password: str = PASSWORD) -> Path:
    """What `skopeo login` leaves."""
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path = folder / "auth.json"
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path
