"""What commands import: a pull, a listing or a page of help waits for no library that it does not use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.publishing import publish_tensors

PROGRAM = (
    "import atexit, json, sys\n"
    "atexit.register(lambda: print('LOADED', json.dumps(sorted({name.partition('.')[0] for name in sys.modules}))))\n"
    "from birkhoff.__main__ import main\n"
    "main()\n"
)
HEAVY = {"boto3", "botocore", "cryptography", "numpy", "pydantic", "ray", "rich", "torch", "yaml"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    with open_store((tmp_path / "store").as_uri()) as store:
        publish_tensors(store, "net", {"w": torch.randn(64, 64)})
        return {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home"), "BIRKHOFF_STORE": store.url}


def loaded(environment: dict[str, str], *arguments: str) -> set[str]:
    """Which of the heavy libraries a command has imported by its end."""
    program = [sys.executable, "-c", PROGRAM, *arguments]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    line = next(line for line in ran.stdout.splitlines() if line.startswith("LOADED "))
    return HEAVY & set(json.loads(line.removeprefix("LOADED ")))


def test_help_needs_no_library_but_the_parser(environment: dict[str, str]) -> None:
    assert loaded(environment, "--help") == set()
    assert loaded(environment, "pull", "--help") <= {"pydantic"}  # with which the parser checks arguments


def test_a_pull_needs_the_documents_and_no_more(environment: dict[str, str], tmp_path: Path) -> None:
    assert loaded(environment, "pull", "net", "-o", str(tmp_path / "out")) == {"pydantic"}
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_pull_ends_before_the_first_collection(environment: dict[str, str], tmp_path: Path) -> None:
    program = (
        "import atexit, gc\n"
        "from birkhoff.__main__ import main\n"
        "found = []\n"
        "gc.callbacks.append(lambda phase, _: found.append(phase))\n"
        "atexit.register(lambda: print('COLLECTIONS', len(found)))\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "pull", "net", "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "COLLECTIONS 0"


def test_a_listing_adds_its_table(environment: dict[str, str]) -> None:
    assert loaded(environment, "list") == {"pydantic", "rich"}


def test_inspect_reads_headers_without_torch(environment: dict[str, str], tmp_path: Path) -> None:
    assert loaded(environment, "inspect", "net") == {"pydantic", "rich"}
    assert loaded(environment, "inspect", "net", "--json") <= {"pydantic", "rich"}
    assert loaded(environment, "pull", "net", "-o", str(tmp_path / "out")) == {"pydantic"}
    assert loaded(environment, "inspect", str(tmp_path / "out")) == {"pydantic", "rich"}


def test_boto3_comes_with_the_first_s3_store_and_without_its_transfer_manager(environment: dict[str, str]) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    program = (
        "import sys\nfrom birkhoff.pipeline.store.base import StoreSettings\n"
        "from birkhoff.pipeline.store.open import open_store\n"
        "seen = {'boto3', 'botocore', 'boto3.s3.transfer', 'boto3.s3.inject', 'cryptography'}\n"
        "def show(): print(*sorted(seen & set(sys.modules)))\n"
        "open_store('file:///tmp').close()\nshow()\n"
        "store = open_store('s3://bucket', StoreSettings(endpoint='http://127.0.0.1:9'))\nshow()\n"
        "print(hasattr(store.inner.inner._client, 'upload_file'))\n"
        "import urllib3.contrib.pyopenssl, botocore.httpsession as http\n"
        "print(http.SSLContext is urllib3.contrib.pyopenssl.orig_util_SSLContext)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment | keys, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["", "boto3 botocore", "False", "True"]


def test_a_pull_draws_its_bar_on_a_terminal_only(environment: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "birkhoff", "pull", "net", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment | {"TERM": "xterm"}, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=PATIENT_SECONDS) == 0
    assert b"net@v1" in shown
    assert b"KiB" in shown
    plain = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert plain.stderr == b""
