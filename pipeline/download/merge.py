"""Read several checkpoints as one: some tensors of each, under new names."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor
from birkhoff.pipeline.download.cache import write_json
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import shown


def merge(parts: Sequence[tuple[SourcePart, Checkpoint]], folder: Path) -> Checkpoint:
    """Return the union of the parts' tensors, in the order of the parts.

    Its nesting is the parts' if they agree. Otherwise it is flat: one state dict under the new names.

    A small listing of what was taken from each part is written to `folder`. It is the `path` and the first of the
    `files`, so the digest of the checkpoint covers the choice as well as the bytes.

    Raises:
        SourceError: A glob matches nothing, or two parts have the same name.
        OSError: The listing cannot be written.
    """
    if len(parts) == 1 and parts[0][0].whole:
        return parts[0][1]
    chosen = [(checkpoint, _chosen(part, checkpoint)) for part, checkpoint in parts]
    _check_names(chosen)
    listing = _write_listing(parts, folder)
    sources = {checkpoint.path: checkpoint for checkpoint, _ in chosen}  # one file may serve two parts
    files = dict.fromkeys(file for checkpoint in sources.values() for file in checkpoint.files)
    first = parts[0][1]
    return Checkpoint(
        path=listing,
        files=(listing, *files),
        nbytes=sum(checkpoint.nbytes for checkpoint in sources.values()),
        format=first.format,
        tensors=tuple(tensor for _, tensors in chosen for tensor in tensors),
        nesting=first.nesting if all(checkpoint.nesting == first.nesting for checkpoint, _ in chosen) else (),
        skipped=_skipped([checkpoint for checkpoint, _ in chosen]),
    )


def _chosen(part: SourcePart, checkpoint: Checkpoint) -> list[StoredTensor]:
    """Return the tensors that `keep` selects, under their new names."""
    tensors = list(checkpoint.tensors)
    if part.keep is not None:
        for glob in part.keep:
            if not any(fnmatchcase(tensor.name, glob) for tensor in tensors):
                raise SourceError(
                    f"{checkpoint.path}: keep {glob!r} matches none of its {len(tensors)} tensors, such as "
                    f"{shown([tensor.name for tensor in tensors[:3]], 160)}; correct the glob"
                )
        tensors = [tensor for tensor in tensors if any(fnmatchcase(tensor.name, glob) for glob in part.keep)]
    return [replace(tensor, name=part.prefix + tensor.name) for tensor in tensors]


def _skipped(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[str, str], ...]:
    """Return entries that are not weights; for a file of several parts, those that no part took."""
    left: dict[Path, dict[tuple[str, str], None]] = {}
    for checkpoint in checkpoints:
        mine = dict.fromkeys(checkpoint.skipped)
        before = left.get(checkpoint.path, mine)
        left[checkpoint.path] = {entry: None for entry in before if entry in mine}
    return tuple(entry for entries in left.values() for entry in entries)


def _check_names(chosen: Sequence[tuple[Checkpoint, list[StoredTensor]]]) -> None:
    owners: dict[str, Path] = {}
    for checkpoint, tensors in chosen:
        for tensor in tensors:
            if tensor.name in owners:
                raise SourceError(
                    f"tensor {shown(tensor.name)} is in both {owners[tensor.name]} and {checkpoint.path}; "
                    "take it from one of them with `keep`, or tell them apart with `prefix`"
                )
            owners[tensor.name] = checkpoint.path


def _write_listing(parts: Sequence[tuple[SourcePart, Checkpoint]], folder: Path) -> Path:
    """Write the listing of what was taken from each file. It is the same on every machine; an existing one is left
    alone."""
    listing = {
        "parts": [
            {"file": checkpoint.path.name, "keep": part.keep, "prefix": part.prefix}
            | ({} if part.under is None else {"under": part.under})  # older listings keep their digests
            for part, checkpoint in parts
        ]
    }
    key = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
    names = "+".join(dict.fromkeys(checkpoint.path.name for _, checkpoint in parts))
    path = folder / key / f"{names[:120]}.json"
    if not path.is_file():
        write_json(path, listing)
    return path
