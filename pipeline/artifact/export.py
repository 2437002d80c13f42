"""Export a dense checkpoint that upstream code loads unchanged: original names, dtypes and nesting."""

import io
import json
import pickle
import struct
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, UntypedStorage, serialization

from birkhoff.codec.dtypes import DTYPES, TORCH_TO_SAFETENSORS
from birkhoff.pipeline.artifact.readers import Artifact, TensorRow, inspect
from birkhoff.pipeline.errors import IntegrityError, OutputError
from birkhoff.pipeline.files import atomic_output

_TORCH = (".pth", ".pt")
SUFFIXES = (".safetensors", *_TORCH)


def export(artifact: Artifact, path: Path) -> int:
    """Write a dense checkpoint, the same bytes every time; return its size in bytes.

    `.safetensors` has the flat state dict; `.pth` and `.pt` restore the nesting of the source (`{"model": ...}`). A
    model made of several files, or of several state dicts of one file, becomes one file: nested as its parts were if
    they agree, else flat, under the manifest's names.

    Memory holds one shard and one dense tensor at a time.

    Raises:
        OutputError: The suffix names no format, or the file cannot be written.
        IntegrityError: The artifact is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
    with atomic_output(path) as file:
        (_write_torch if path.suffix in _TORCH else _write_safetensors)(artifact, file)
        return file.tell()


def _write_torch(artifact: Artifact, file: BinaryIO) -> None:
    """Write the bytes that `torch.save` would write, from tensors without memory; `_Records` supplies the data.

    `torch.save` needs all tensors at once; the function below it accepts any writer of records.
    """
    rows = list(inspect(artifact))
    nested: dict[str, Any] = {row.name: torch.empty(row.shape, dtype=DTYPES[row.dtype]) for row in rows}
    for key in reversed(artifact.manifest.source.nesting):
        nested = {key: nested}
    kept = _KeptError(file)
    try:
        with serialization._open_zipfile_writer(
            cast(IO[bytes], kept)
        ) as writer:  # if it were given a path, the bytes would contain the name
            serialization._save(nested, _Records(writer, artifact, rows), pickle, serialization.DEFAULT_PROTOCOL, False)
    except RuntimeError:
        if kept.error is not None:
            raise kept.error from None
        raise


class _KeptError(io.RawIOBase):
    """A file that keeps its first write error, because torch's writer does not report the reason."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write to the file, or nowhere after a failure, because the writer closes its archive either way."""
        if self.error is not None:
            return len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


class _Records:
    """A record writer for torch that writes the artifact's data instead of a storage's."""

    def __init__(self, writer: Any, artifact: Artifact, rows: list[TensorRow]) -> None:
        self._writer, self._label = writer, artifact.label
        self._tensors = zip(rows, artifact.tensors(), strict=True)

    def write_record(self, name: str, data: object, size: int) -> None:
        """Write a record of `size` bytes. Storages, named `data/0`, `data/1`, ..., are in the order of the tensors."""
        if name.startswith("data/"):
            row, (stored, tensor) = next(self._tensors)
            if (stored, tuple(tensor.shape), tensor.dtype) != (row.name, tuple(row.shape), DTYPES[row.dtype]):
                raise IntegrityError(f"{self._label}: header and body disagree about {row.name}; publish it again")
            data = _storage(tensor)
        self._writer.write_record(name, data, size)


def _storage(tensor: Tensor) -> UntypedStorage:
    """Return the storage of this tensor alone, never a part of a larger one."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return (tensor if whole else tensor.clone()).untyped_storage()


def _write_safetensors(artifact: Artifact, file: BinaryIO) -> None:
    """Write the header, which `inspect` knows, then the data; wide types first, for readers that map files."""
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
