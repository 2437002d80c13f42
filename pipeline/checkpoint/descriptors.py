"""Descriptors of a checkpoint: what planner and worker need to know about a tensor without loading it.

A descriptor takes a few hundred bytes, can be pickled, and suffices to read its tensor in any process that sees the
file. Byte counts are plain integers; offsets count from the start of the named file.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import shown

CheckpointFormat = Literal["torch-zip", "torch-legacy", "safetensors"]

# PyTorch's kernels support at most 64 dimensions.
_MAX_DIMS = 64
# An expanded view of 4 bytes can claim terabytes. Real checkpoints expand their tensors by less than this in total.
_MAX_EXPANDED_BYTES = 256 << 20
# Names that share the same bytes: a model that applies one layer many times stores it once.
_MAX_SHARING = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of a tensor in a file, and how to read it."""

    name: str
    """State-dict key after unnesting, such as `image_encoder.blocks.0.attn.qkv.weight`."""
    dtype: str
    """Name of the torch dtype without `torch.`, a key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements. Contiguous in nearly all files, but `.pth` files can contain views."""
    offset: int
    """Bytes from the start of `path` to element 0."""
    nbytes: int
    """Bytes from element 0 to the end of the last element, which have to be read."""
    path: str
    """Absolute path of the file that holds the bytes."""
    crc32: int | None = None
    """Checksum of the `nbytes` bytes, if the file has one."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the elements without gaps."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers were read."""

    path: Path
    """The file that was opened, or the index of a sharded checkpoint. Absolute."""
    files: tuple[Path, ...]
    """Source files whose bytes make up the checkpoint: `path`, and the shards of an index."""
    nbytes: int
    """Size of all source files together."""
    format: CheckpointFormat
    tensors: tuple[StoredTensor, ...]
    """In the order of the file. Tied weights are listed under each of their names."""
    nesting: tuple[str, ...] = ()
    """Keys that lead to the state dict: `("model",)` for `checkpoint["model"]`."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(key, type) of the entries that are not weights, such as `("epoch", "int")`."""
    origin: tuple[str, ...] = ()
    """Public addresses of its files, each pinned to a commit: `hf://ORG/REPO@COMMIT/FILE`."""

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Groups of two or more names with the same bytes: tied weights."""
        groups: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.nbytes:
                groups[tensor.path, tensor.offset, tensor.nbytes].append(tensor.name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the row-major strides of `shape` in elements, as torch does (an empty dimension counts as 1)."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


def extent_bytes(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Return bytes from element 0 to the end of the last element of a strided tensor; 0 for an empty one."""
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)))


def check_tensor(path: Path, name: str, dtype: str, shape: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse a tensor that no checkpoint of weights contains.

    Raises:
        SourceError: Its name is not text, its dtype unknown, its dimensions too many, or it is a view that expands to
            an absurd size.
    """
    label = f"{path}: tensor {shown(name)}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SourceError(f"{label} has a name that is not valid text; the file is forged")
    if dtype not in ITEM_BYTES:  # complex, quantised and packed 4-bit types
        raise SourceError(f"{label} is {dtype}, expected a dense real dtype; convert it and save again")
    if len(shape) > _MAX_DIMS:
        raise SourceError(f"{label} has {len(shape)} dimensions, at most {_MAX_DIMS} exist; the file is forged")
    itemsize = ITEM_BYTES[dtype]
    full = itemsize * math.prod(shape)
    if full > max(extent_bytes(shape, stride, itemsize), _MAX_EXPANDED_BYTES):
        raise SourceError(
            f"{label} expands few stored bytes to {full}, at most {_MAX_EXPANDED_BYTES} are allowed;"
            " save a contiguous copy of it"
        )


def check_total(path: Path, dense_bytes: Iterable[int], nbytes: int) -> None:
    """Refuse a checkpoint whose tensors, of `dense_bytes` each, expand far beyond the `nbytes` of its files.

    Raises:
        SourceError: Views that expand, or names that share bytes, add up to an absurd size.
    """
    total, most = sum(dense_bytes), _MAX_SHARING * nbytes + _MAX_EXPANDED_BYTES
    if total > most:
        raise SourceError(
            f"{path}: its tensors expand {nbytes} bytes to {total}, at most {most} are allowed; save contiguous copies,"
            " each under one name"
        )
