"""Triton's digest of itself, kept between processes.

Triton names what it has compiled by, among other things, a digest of its own files. At a process's first kernel it
reads all of them for that, most of a gigabyte where its library is large: a third of a second before anything runs. The
digest is the same as long as the files are, so it is kept in Triton's cache, under a name made of all their paths,
sizes and times of change. Whatever is not as expected, Triton makes it anew.
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
    """Let Triton take its digest of itself from its cache, in this process and for everybody's kernels."""
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
    """What `original` returns: from a file in the folder, or made and kept there."""
    try:
        path = folder / f"birkhoff-{_NAME}-{_state(Path(triton.__file__).parent)}"
        text = path.read_text()
    except OSError:
        text = ""
    if _KEY.fullmatch(text):
        return text
    text = original()
    if _KEY.fullmatch(text):
        with contextlib.suppress(OSError):  # a cache that cannot be written serves nobody
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(text)
            Path(file.name).replace(path)
    return text


def _state(root: Path) -> str:
    """A digest of the paths, sizes and times of all files that Triton's digest covers. Raises OSError."""
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
