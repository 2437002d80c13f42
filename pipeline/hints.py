"""Commands that messages tell people to run, written so that they do the same as printed.

A hint carries what the command at hand was told beyond its arguments: how the program was called, which store was named
on its command line or in its manifest, and that plain http was allowed. The command line says so once (`remember`);
without it, as in a library, a hint is what the environment means.
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
    """Note `program`, `store` or `allow_http` of the command at hand; None leaves what is known."""
    _context.update({name: value for name, value in facts.items() if value is not None})


def forget() -> None:
    """A new command begins."""
    _context.clear()


def hint(*words: str) -> str:
    """A whole command line: `hint("history", "net")` is `birkhoff history net --store file:///models`."""
    line = [_context.get("program", _PROGRAM), *map(shlex.quote, words)]
    if words[0] not in _WITHOUT_STORE and "store" in _context:
        line += ["--store", shlex.quote(_context["store"])]
    if "allow_http" in _context:
        line.append("--allow-http")
    return " ".join(line)


def program() -> str:
    """How this process was called: `birkhoff` if that leads here, else as it was typed."""
    called = Path(sys.argv[0])
    if (called.parent.name, called.name) == (_PROGRAM, "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m birkhoff"
    found = shutil.which(_PROGRAM)
    if called.name != _PROGRAM or (found is not None and called.exists() and called.samefile(found)):
        return _PROGRAM
    return shlex.quote(sys.argv[0])
