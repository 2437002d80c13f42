"""The hardware and software of a process: versions, processors, memory. For reports and diagnosis."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.documents import Document

_PACKAGES = ("birkhoff-compression", "torch", "ray", "triton", "numpy", "boto3", "safetensors")


class Environment(Document):
    """One host, as seen by the process that drove a run."""

    host: str
    system: str
    python: str
    packages: dict[str, str]
    """Versions of the installed packages that affect results."""
    processor: str
    cpus: int
    """Logical processors available to this process."""
    memory_bytes: int
    gpus: tuple[str, ...]
    """Name and memory of every GPU of the run's workers."""


def environment(gpus: Iterable[str] = ()) -> Environment:
    """Return this host's environment, with the GPUs of workers."""
    return Environment(
        host=platform.node(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages={name: found for name in _PACKAGES if (found := _version(name))},
        processor=processor(),
        cpus=processors(),
        memory_bytes=memory_bytes(),
        gpus=tuple(gpus),
    )


def memory_bytes() -> int:
    """Total memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
