"""Where this package keeps what it needs on this host."""

import os
from pathlib import Path


def birkhoff_home() -> Path:
    """$BIRKHOFF_HOME, or .birkhoff in the current directory; absolute, and not made here."""
    return Path(os.environ.get("BIRKHOFF_HOME") or ".birkhoff").absolute()
