"""Keep Triton's digest of itself between processes.

The names of compiled kernels depend, among other things, on a digest of Triton's own files. For a process's first
kernel, Triton reads them all, which is most of a gigabyte if its library is large and takes a third of a second. The
digest changes only if the files do. So we keep it in Triton's cache, under a name that depends on all their paths,
sizes and modification times. If anything is unexpected, Triton computes the digest itself.
"""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import triton

_NAME = "triton_key"
_FOLDERS = "compiler", "backends", "language"
_KEY = re.compile(re.escape(triton.__version__) + r"[0-9a-f]{64}(-[0-9a-f]{64})*")


@cache
def keep_triton_key() -> None:
    """Let Triton read its digest of itself from its cache, in this process and for all kernels."""
    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("triton.") and callable(getattr(module, _NAME, None))
    ]
    if not holders:
        return
    original: Callable[[], str] = getattr(holders[0], _NAME)

    @cache
    def kept() -> str:
        return kept_key(original, Path(triton.knobs.cache.dir))

    for module in holders:
        setattr(module, _NAME, kept)


def kept_key(original: Callable[[], str], folder: Path) -> str:
    """Return the result of `original`: read it from a file in the folder, or compute it and store it there."""
    try:
        path = folder / f"birkhoff-{_NAME}-{_state(Path(triton.__file__).parent)}"
        text = path.read_text()
    except OSError:
        text = ""
    if _KEY.fullmatch(text):
        return text
    text = original()
    if _KEY.fullmatch(text):
        with contextlib.suppress(OSError):  # a cache that cannot be written is no error
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(text)
            Path(file.name).replace(path)
    return text


def _state(root: Path) -> str:
    """Return a digest of the paths, sizes and times of all files that Triton's digest covers. Raises OSError."""
    lines = []
    for path in sorted(_files(root)):
        facts = path.stat()
        lines.append(f"{path} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    yield root / "runtime" / "cache.py"
    yield root / "compiler" / "compiler.py"
    yield from root.joinpath("_C").glob("libtriton.*")
    for folder in _FOLDERS:
        for parent, _, names in os.walk(root / folder):
            yield from (Path(parent, name) for name in names if name.endswith(".py"))
