"""Digests of source files, remembered by path, size, inode and times, so that an unchanged fleet is not read again.

A file changed within the last seconds is not remembered: a second change in the same tick of its clock would go unseen.
"""

import hashlib
import json
from pathlib import Path

from birkhoff.pipeline.errors import OutputError, SourceError
from birkhoff.pipeline.files import file_state, is_settled, write_whole
from birkhoff.pipeline.home import birkhoff_home
from birkhoff.pipeline.source import Checkpoint, source_digest


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """`source_digest` of a checkpoint, remembered where its files have not changed. Raises SourceError, OutputError."""
    state = known_state(checkpoint)
    if state is None:
        return source_digest(checkpoint)
    found = _recall(checkpoint.path, state)
    if found is None:
        found = source_digest(checkpoint)
        if known_state(checkpoint) == state:
            _remember(_note(checkpoint.path), {"state": state, "sha256": found})
    return found


def recalled_digest(checkpoint: Checkpoint) -> str | None:
    """The digest if it is remembered; reads nothing of the checkpoint."""
    state = known_state(checkpoint)
    return None if state is None else _recall(checkpoint.path, state)


def checkpoint_state(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """`file_state` of a checkpoint's files, by their paths. Raises SourceError."""
    state = {}
    for file in checkpoint.files:
        try:
            state[str(file)] = file_state(file)
        except OSError as error:
            raise SourceError(f"{file}: {error.strerror}; put it back and run again") from None
    return state


def known_state(checkpoint: Checkpoint) -> dict[str, list[int]] | None:
    """`checkpoint_state`, or None while a later change might not show in it. Raises SourceError."""
    state = checkpoint_state(checkpoint)
    return state if all(map(is_settled, state.values())) else None


def _remember(note: Path, facts: dict[str, object]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{note.parent}: {error.strerror}; point BIRKHOFF_HOME at a folder that can be written"
        ) from None
    write_whole(note, json.dumps(facts).encode())


def _note(path: Path) -> Path:
    return birkhoff_home() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"


def _recall(path: Path, state: dict[str, list[int]]) -> str | None:
    try:
        note = json.loads(_note(path).read_bytes())
        return str(note["sha256"]) if note["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
