"""Back to a dense checkpoint that unmodified upstream code loads: original names, dtypes and nesting."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from birkhoff.codec.dtypes import TORCH_TO_SAFETENSORS
from birkhoff.pipeline.artifacts import Artifact, inspect
from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.files import whole_file
from birkhoff.pipeline.source_types import DTYPES

_TORCH = (".pth", ".pt")
SUFFIXES = (".safetensors", *_TORCH)


def export(artifact: Artifact, path: Path) -> int:
    """Write a dense checkpoint, the same bytes every time; returns its size.

    `.safetensors` holds the flat state dict; `.pth` and `.pt` restore the nesting of the source (`{"model": ...}`).
    A model that was made of several files, or of several state dicts of one, comes back as one file: nested as they
    were where they agree, else flat, under the names that the manifest gave.

    A `.safetensors` file is written tensor by tensor; a `.pth` file holds the dense model in memory once.

    Raises:
        OutputError: the suffix names no format, or the file cannot be written.
        IntegrityError: the artifact is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
    with whole_file(path) as file:
        (_write_torch if path.suffix in _TORCH else _write_safetensors)(artifact, file)
        return file.tell()


def _write_torch(artifact: Artifact, file: BinaryIO) -> None:
    nested: dict[str, Any] = dict(artifact.tensors())
    for key in reversed(artifact.manifest.source.nesting):
        nested = {key: nested}
    torch.save(nested, file)  # given a path, torch would make its name part of the bytes


def _write_safetensors(artifact: Artifact, file: BinaryIO) -> None:
    """Header first, which `inspect` gives without the data; wide types first, as readers that map files like it."""
    rows = sorted(inspect(artifact), key=lambda row: -DTYPES[row.dtype].itemsize)
    header: dict[str, object] = {}
    places: dict[str, int] = {}
    end = 0
    for row in rows:
        places[row.name], start = end, end
        end += prod(row.shape) * DTYPES[row.dtype].itemsize
        header[row.name] = {
            "dtype": TORCH_TO_SAFETENSORS[DTYPES[row.dtype]],
            "shape": list(row.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in artifact.tensors():
        file.seek(8 + len(text) + places[name])
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.seek(8 + len(text) + end)
