"""The folders for state and caches on this machine."""

import os
from pathlib import Path

_VARIABLE = "BIRKHOFF_HOME"


def birkhoff_home() -> Path:
    """Return $BIRKHOFF_HOME, or `.birkhoff` in the current directory. The path is absolute and may not exist."""
    return Path(os.environ.get(_VARIABLE) or ".birkhoff").absolute()


def cache_folder() -> Path:
    """Return the folder of pulled blobs: below $BIRKHOFF_HOME if that is set, else in the user's cache."""
    if os.environ.get(_VARIABLE):
        return birkhoff_home() / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "birkhoff"


def source_cache() -> Path:
    """Return the folder of converted and unpacked sources."""
    return birkhoff_home() / "sources"
