"""Where this package keeps what it needs on this host."""

import os
from pathlib import Path

_VARIABLE = "BIRKHOFF_HOME"


def birkhoff_home() -> Path:
    """$BIRKHOFF_HOME, or .birkhoff in the current directory; absolute, and not made here."""
    return Path(os.environ.get(_VARIABLE) or ".birkhoff").absolute()


def cache_folder() -> Path:
    """Where pulled blobs are kept: below $BIRKHOFF_HOME if set, else the user's cache, so that all folders share it."""
    if os.environ.get(_VARIABLE):
        return birkhoff_home() / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "birkhoff"


def source_cache() -> Path:
    """Where sources that must be converted or unpacked once are kept."""
    return birkhoff_home() / "sources"
