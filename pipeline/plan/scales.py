"""The root mean squares of a checkpoint's tensors, from a sample of their weights.

A whole checkpoint would take seconds to read, and a target needs its root mean squares to a tenth of a dB only. Blocks
spread evenly over a tensor give that, whether its rows or its columns differ. The sample, and so every target, depends
on the bytes alone.
"""

import ctypes
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.survey import Survey, bulk, survey
from birkhoff.codec.profiles import unfit
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import read_tensor
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import first_line

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

BLOCKS = 64
BLOCK = 256
"""A tensor of more weights is known by this number of blocks, of this number of weights each: 16384 normal numbers tell
their root mean square to 0.05 dB."""


def scales_of(tensors: Iterable[StoredTensor]) -> dict[str, float]:
    """Return the root mean square of the bulk of each tensor's sample (see `metrics`), in the unit of its weights, by
    name. 0 if the sample says that the tensor will not be coded: it is constant, of whole numbers, out of range or not
    finite.

    Raises:
        SourceError: A file cannot be read.
    """
    by_file: defaultdict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        by_file[tensor.path].append(tensor)
    found: dict[str, float] = {}
    for path, inside in by_file.items():
        try:
            with Path(path).open("rb", buffering=0) as file:
                found |= {tensor.name: _scale(_sample(tensor, file.fileno())) for tensor in inside}
        except OSError as error:
            raise SourceError(f"{path}: cannot be read ({first_line(error)}); put it back") from error
    return found


def _scale(sample: Floats | Doubles) -> float:
    with np.errstate(all="ignore"):
        squares = np.square(sample, dtype=np.float64)
    energy = float(squares.sum())
    if not sample.size or not math.isfinite(energy):
        return 0.0
    seen = survey(sample) if _is_single(sample) else _doubles(sample, energy)
    if unfit(seen.low, seen.high, lambda: seen.whole) is not None:
        return 0.0

    def within(limit: float) -> float:
        return survey(sample, limit).energy if _is_single(sample) else float(squares[np.abs(sample) <= limit].sum())

    return math.sqrt(bulk(sample.size, energy, seen.greatest, within).energy / sample.size)


def _is_single(sample: Floats | Doubles) -> TypeGuard[Floats]:
    return sample.dtype == np.float32


def _doubles(sample: Floats | Doubles, energy: float) -> Survey:
    whole = bool((sample == np.trunc(sample)).all())
    return Survey(low=float(sample.min()), high=float(sample.max()), energy=energy, whole=whole)


def _sample(tensor: StoredTensor, file: int) -> Floats | Doubles:
    """Return weights of a tensor, [S]: as they lie in its file, or all of a view. Shorter types become float32."""
    if tensor.nbytes != tensor.dense_bytes:
        view = read_tensor(tensor).reshape(-1)
        return np.asarray(view if tensor.dtype == "float64" else view.float())
    size = ITEM_BYTES[tensor.dtype]
    body = _read(tensor, file, size)
    whole = body[: len(body) // size * size]  # all of it, unless the file became shorter
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(whole, np.uint16).astype(np.uint32) << 16).view(np.float32)
    found: Floats | Doubles = np.frombuffer(whole, tensor.dtype)
    return found.astype(np.float32) if tensor.dtype == "float16" else found


def _read(tensor: StoredTensor, file: int, size: int) -> bytearray:
    """Return the bytes of a sample of elements of `size` bytes. Raises OSError."""
    count, library = tensor.nbytes // size, native()
    if library is None or count <= BLOCKS * BLOCK:
        places = _places(tensor, size)
        return bytearray().join(os.pread(file, length, tensor.offset + start) for start, length in places)
    # One call for all blocks: threads that plan other models would each take the interpreter's lock in between.
    found: npt.NDArray[np.uint8] = np.empty(BLOCKS * BLOCK * size, dtype=np.uint8)
    length = library.birkhoff_sample(file, tensor.offset, count, size, BLOCKS, BLOCK * size, pointer(found))
    if length < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return bytearray(found[:length].tobytes())


def _places(tensor: StoredTensor, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield the place of each block, in bytes from the tensor's first, and its size in bytes."""
    count = tensor.nbytes // itemsize
    if count <= BLOCKS * BLOCK:
        yield 0, tensor.nbytes
        return
    for block in range(BLOCKS):
        yield (count - BLOCK) * block // (BLOCKS - 1) * itemsize, BLOCK * itemsize
