"""Commands that messages recommend, complete enough to run as printed.

A hint includes how the program was called, the store of the command line or manifest, and whether plain http is
allowed. The command line notes them once (`remember`). Without it, as in a library, a hint relies on the environment.
"""

import shlex
import shutil
import sys
from pathlib import Path

_PROGRAM = "birkhoff"
_WITHOUT_STORE = {"cache", "key", "store"}
"""Commands that read no store."""

_context: dict[str, str] = {}


def remember(**facts: str | None) -> None:
    """Note `program`, `store` or `allow_http` of the current command; None keeps what is known."""
    _context.update({name: value for name, value in facts.items() if value is not None})


def forget() -> None:
    """Forget the previous command."""
    _context.clear()


def hint(*words: str) -> str:
    """Return a whole command line: `hint("history", "net")` is `birkhoff history net --store file:///models`."""
    line = [_context.get("program", _PROGRAM), *map(shlex.quote, words)]
    if words[0] not in _WITHOUT_STORE and "store" in _context:
        line += ["--store", shlex.quote(_context["store"])]
    if "allow_http" in _context:
        line.append("--allow-http")
    return " ".join(line)


def program() -> str:
    """Return how this process was called: `birkhoff` if that resolves to it, else as typed."""
    called = Path(sys.argv[0])
    if (called.parent.name, called.name) == (_PROGRAM, "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m birkhoff"
    found = shutil.which(_PROGRAM)
    if called.name != _PROGRAM or (found is not None and called.exists() and called.samefile(found)):
        return _PROGRAM
    return shlex.quote(sys.argv[0])
