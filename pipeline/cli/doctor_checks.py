"""The checks of `birkhoff doctor`: what a run would use on this machine, whether it works, and what to do if not.

Each check tries the real thing: it writes to the store under `probe/` and cleans up, runs an unused embedded server in
a temporary folder, and decodes on the GPU with Triton. Nothing is left behind.
"""

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.errors import StoreDeniedError, StoreError, StoreUnreachableError, exit_code
from birkhoff.pipeline.files import SPARE_BYTES
from birkhoff.pipeline.hints import hint
from birkhoff.pipeline.paths import birkhoff_home, cache_folder
from birkhoff.pipeline.store.base import Store, store_folder
from birkhoff.pipeline.store.default import DEFAULT_STORE, default_store_url, open_default_store
from birkhoff.pipeline.store.probe import check_store, ends_permits
from birkhoff.pipeline.text import size

State = Literal["ok", "note", "fails"]

MINIMUM_PYTHON = (3, 11)
_LOW_DISK_BYTES = 10 << 30
"""A published SAM-H takes 2.6 GB as fetched, and about 0.4 GB stored."""


EXTRAS = {
    "hub": ("huggingface_hub", "sources on the Hugging Face Hub (hf://)"),
    "gcs": ("google.cloud.storage", "stores on Google Cloud Storage (gs://)"),
    "azure": ("azure.storage.blob", "stores on Azure Blob Storage (az://)"),
    "oms": ("model_signing", "signatures that other tools check (birkhoff oms)"),
}
"""Optional parts: the module that each needs, and what is missing without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of a check. `code` is the exit code of a failure, 0 otherwise."""

    check: str
    state: State
    found: str
    advice: str = ""
    code: int = 0


def examine(store: str | None = None) -> Iterator[Finding]:
    """Run all checks, those that others depend on first; `store` as in `--store`."""
    yield _python()
    yield _native()
    yield from _torch()
    yield _ray()
    yield from (_extra(name) for name in EXTRAS)
    yield from _folders()
    yield from _store(default_store_url(store))


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if sys.version_info < MINIMUM_PYTHON:
        return _fails("python", found, "create the environment again with Python 3.11 or newer")
    return Finding(check="python", state="ok", found=found)


def _native() -> Finding:
    from birkhoff.codec.native.library import describe

    used, found = describe()
    advice = "" if used else "coding takes several times as long; install a C compiler and run `make setup` again"
    return Finding(check="native codec", state="ok" if used else "note", found=found, advice=advice)


def _torch() -> Iterator[Finding]:
    broken = _import("torch")
    if broken is not None:
        yield _fails("torch", broken, "run `make setup`, or: pip install torch")
        return
    import torch

    yield Finding(check="torch", state="ok", found=f"{torch.__version__}, {processors()} processors")
    yield _cuda()
    yield _triton()


def _cuda() -> Finding:
    import torch

    from birkhoff.kernels.runtime.device import gpu_in_sight

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(check="gpu", state="ok", found=f"{', '.join(names)}: one worker each")
    if gpu_in_sight():
        return Finding(
            check="gpu",
            state="note",
            found=f"there is one, but torch {torch.__version__} cannot use it",
            advice="install the torch build for the driver that `nvidia-smi` names; until then the CPU serves",
        )
    return Finding(
        check="gpu",
        state="note",
        found=f"none: {processors()} workers on the CPU",
        advice="nothing to do: results are the same, and slower; for fleets use --profile fast, or --address of a "
        "Ray cluster with GPUs",
    )


def _triton() -> Finding:
    import torch

    from birkhoff.kernels.decode.serving import obstacle
    from birkhoff.kernels.runtime.device import HAS_TRITON

    if not HAS_TRITON:
        return Finding(
            check="triton",
            state="note",
            found="not installed: the eager kernels are used",
            advice="pip install triton" if torch.cuda.is_available() else "nothing to do without a GPU",
        )
    shown = version("triton")
    if not torch.cuda.is_available():
        return Finding(check="triton", state="ok", found=f"{shown}, idle without a GPU; the eager kernels are used")
    reason = obstacle(torch.device("cuda", 0))
    if reason is None:
        return Finding(check="triton", state="ok", found=f"{shown}; a trial decode on the GPU is exact")
    return Finding(
        check="triton",
        state="note",
        found=f"{shown}, not used: {reason}",
        advice="the slower eager kernels serve; Triton needs a C compiler and compute capability 8.0",
    )


def _ray() -> Finding:
    if find_spec("ray") is None:
        return _fails(
            "ray", "not installed", "run `make setup`, or: pip install 'ray[default]'; or use --executor inline"
        )
    address = os.environ.get("RAY_ADDRESS")
    found = (
        f"{version('ray')}; used for several GPUs, above 4 GiB of weights, and by --executor ray; started for the run "
        "unless --address names a cluster"
    )
    if address:
        return Finding(
            check="ray",
            state="note",
            found=found,
            advice=f"RAY_ADDRESS={address} is not followed: say --address {address} to join that cluster",
        )
    return Finding(check="ray", state="ok", found=found)


def _extra(name: str) -> Finding:
    module, purpose = EXTRAS[name]
    if not _is_installed(module):
        advice = f"for {purpose}: pip install 'birkhoff-compression[{name}]'"
        return Finding(check=name, state="note", found="not installed", advice=advice)
    return Finding(check=name, state="ok", found=f"{module} {version(re.sub(r'[._]', '-', module))}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing too
        return False


def _folders() -> Iterator[Finding]:
    for check, folder, variable in (
        ("home", birkhoff_home(), "BIRKHOFF_HOME"),
        ("cache", cache_folder(), "BIRKHOFF_HOME or XDG_CACHE_HOME"),
    ):
        yield _folder(check, folder, variable)


def _folder(check: str, folder: Path, variable: str) -> Finding:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {size(free)} free"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return _fails(
            check, f"{folder} cannot be written", f"point {variable} at a folder that can be written", code=16
        )
    if free < SPARE_BYTES:
        return _fails(check, found, f"free some space, or point {variable} at a larger disk", code=16)
    if free < _LOW_DISK_BYTES:
        advice = f"large checkpoints may not fit: `{hint('cache', 'prune')}` frees what was not used lately"
        return Finding(check=check, state="note", found=found, advice=advice)
    return Finding(check=check, state="ok", found=found)


def _store(url: str) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryDirectory(prefix="birkhoff-doctor-", ignore_cleanup_errors=True) as trial:
            unused = url == DEFAULT_STORE and not (birkhoff_home() / "embedded").exists()
            with open_default_store(f"embedded://{trial}" if unused else url, create=True) as opened:
                shown = f"embedded, not used yet; a trial in {trial} worked" if unused else opened.url
                yield from _opened(opened, shown)
    except BirkhoffError as error:
        yield _of_error(url, error)


def _opened(store: Store, shown: str) -> Iterator[Finding]:
    if (scheme := store.url.partition("://")[0]) in _CREDENTIALS:
        yield Finding(check="credentials", state="ok", found=_CREDENTIALS[scheme](store))
    try:
        capabilities = check_store(store)
    except StoreDeniedError as refusal:
        yield _read_only(store, refusal)
        return
    yield Finding(check="store", state="ok", found=f"{shown}: written, read, replaced, deleted")
    if capabilities.conditional_writes:
        yield Finding(check="conditional writes", state="ok", found="honoured: several publishers are safe")
    else:
        yield Finding(
            check="conditional writes",
            state="note",
            found=f"none: this store {capabilities.problem}",
            advice="let one machine publish, one run at a time, or use another store",
        )
    if ends_permits(store):
        yield Finding(
            check="late deletions", state="ok", found="refused: what a stopped collection left can be taken over"
        )
    else:
        yield Finding(
            check="late deletions",
            state="note",
            found="accepted: a collection that stops midway blocks publishing what it was about to delete",
            advice="then end its process for good, and delete runs/condemned.json (pipeline/registry/PROTOCOL.md)"
            + _SIGNING.get(store.url.partition("://")[0], ""),
        )


def _read_only(store: Store, refusal: StoreDeniedError) -> Finding:
    """Return the finding for a store that can be read but not written. Raises the refusal if it cannot be read
    either."""
    try:
        first = next(iter(store.list("models/")), None)
        if first is not None:
            store.get(first.key, length=1)
    except StoreError:
        raise refusal from None
    folder = store_folder(store.url)
    if folder is not None and not folder.is_dir():
        raise refusal
    publishing = "the policy manifests/iam/publisher.json (`gc --yes`: collector.json)"
    return Finding(
        check="store",
        state="note",
        found=f"{store.url}: may be read, may not be written: `pull`, `verify` and loading work",
        advice=f"nothing to do for pulling; publishing needs {'write access to it' if folder else publishing}",
    )


def _aws(_: Store) -> str:
    """Return where the AWS chain found credentials. Only the store can tell whether they are right."""
    from boto3.session import Session

    found = Session().get_credentials()
    if found is None:
        raise StoreDeniedError("no AWS credentials were found")
    return f"from the AWS chain: {found.method}"


def _google(store: Store) -> str:
    from birkhoff.pipeline.store.gcs import who

    return f"Google's: {who(store.address.settings)}"


def _azure(store: Store) -> str:
    from birkhoff.pipeline.store.azure import who

    return f"Azure's: {who(store.address.settings)}"


_CREDENTIALS: dict[str, Callable[[Store], str]] = {"s3": _aws, "gs": _google, "az": _azure}
"""Returns whose credentials open a store, by scheme."""

_SIGNING = {
    "gs": "; credentials that can sign, such as a service account's key file, make the store refuse them",
    "az": "; an account's key, AZURE_STORAGE_KEY, makes the store refuse them",
}

_ALLOWED = "of a user who may read and write there (manifests/iam has the least policy)"
_OTHERWISE = "`make store-up` starts a store on this machine, and --store file:///DIR needs none"
_ADVICE = {
    "s3": (
        f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, {_ALLOWED}",
        f"see that the server runs and AWS_ENDPOINT_URL_S3 names it; {_OTHERWISE}",
    ),
    "gs": (
        f"run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file, {_ALLOWED}",
        "see that this machine reaches storage.googleapis.com, and that STORAGE_EMULATOR_HOST is not set; "
        f"{_OTHERWISE}",
    ),
    "az": (
        "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY, or run `az login`, "
        f"{_ALLOWED}",
        f"see that this machine reaches the account that the AZURE_STORAGE_* variables name; {_OTHERWISE}",
    ),
}
"""What to do if credentials are not enough, and if nothing answers."""


def _of_error(url: str, error: BirkhoffError) -> Finding:
    """Return the finding for a store that refused or did not answer."""
    denied, unreachable = _ADVICE.get(url.partition("://")[0], _ADVICE["s3"])
    if isinstance(error, StoreDeniedError):
        check, advice = "credentials", denied
    elif isinstance(error, StoreUnreachableError):
        check, advice = "store", unreachable
    else:
        check, advice = "store", "mend what it says; --store file:///DIR needs no server"
    if url.startswith("file://"):
        check, advice = "store", "name a folder on a local disk that you can write"
    return _fails(check, f"{url}: {error}", advice, code=exit_code(error))


def _fails(check: str, found: str, advice: str, *, code: int = 1) -> Finding:
    return Finding(check=check, state="fails", found=found, advice=advice, code=code)


def _import(module: str) -> str | None:
    """Return why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a missing shared library may raise anything
        return f"{type(error).__name__}: {error}"
    return None
