"""Digests of source files, remembered by path, size, inode and times, so that an unchanged fleet is not read again.

A file that changed within the last seconds is not remembered, because a second change within one tick of its clock
would not be seen.
"""

import hashlib
from pathlib import Path

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import source_digest
from birkhoff.pipeline.errors import OutputError, SourceError
from birkhoff.pipeline.files import file_state, recalled_digest, remembered_digest
from birkhoff.pipeline.paths import birkhoff_home


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return the `source_digest` of a checkpoint, remembered while its files stay the same. Raises SourceError,
    OutputError."""
    note = _note(checkpoint.path)
    try:
        return remembered_digest(note, lambda: checkpoint_state(checkpoint), lambda: source_digest(checkpoint))
    except OSError as error:
        raise OutputError(
            f"{note.parent}: {error.strerror}; point BIRKHOFF_HOME at a folder that can be written"
        ) from None


def known_digest(checkpoint: Checkpoint) -> str | None:
    """Return the digest if it is remembered, without reading the checkpoint. Raises SourceError."""
    return recalled_digest(_note(checkpoint.path), checkpoint_state(checkpoint))


def checkpoint_state(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Return the `file_state` of a checkpoint's files, by path. Raises SourceError."""
    state = {}
    for file in checkpoint.files:
        try:
            state[str(file)] = file_state(file)
        except OSError as error:
            raise SourceError(f"{file}: {error.strerror}; put it back and run again") from None
    return state


def _note(path: Path) -> Path:
    return birkhoff_home() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
