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
from typing import Any

import numpy as np
import numpy.typing as npt

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.native.survey import Survey, Surveying, bulk
from birkhoff.codec.profiles import unfit
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.checkpoint.open import read_tensor
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import first_line

Stored = npt.NDArray[Any]
"""float16, float32, float64, or uint16 for bfloat16."""
Floats = npt.NDArray[Any]
"""float32 or float64."""

_CHUNK = 1 << 20
"""Weights that are converted together."""

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


def _scale(sample: Stored) -> float:
    if not sample.size:
        return 0.0
    with np.errstate(all="ignore"):
        energy = sum(float(np.square(part, dtype=np.float64).sum()) for part in _parts(sample))
    if not math.isfinite(energy):
        return 0.0
    seen = _survey(sample)
    if unfit(seen.low, seen.high, lambda: seen.whole) is not None:
        return 0.0
    found = bulk(sample.size, energy, seen.greatest, lambda limit: _survey(sample, limit).energy)
    return math.sqrt(found.energy / sample.size)


def _survey(sample: Stored, limit: float = math.inf) -> Survey:
    """Return the survey of finite weights."""
    if sample.dtype == np.float64:
        each = [_survey_doubles(part, limit) for part in _parts(sample)]
        lows, highs, energies, whole = zip(*each, strict=True)
        return Survey(low=min(lows), high=max(highs), energy=sum(energies), whole=all(whole))
    found = Surveying(limit)
    for part in _parts(sample):
        found.add(part)
    return found.survey()


def _survey_doubles(part: Floats, limit: float) -> Survey:
    energy = float(np.square(part[np.abs(part) <= limit]).sum())
    whole = bool((part == np.trunc(part)).all())
    return Survey(low=float(part.min()), high=float(part.max()), energy=energy, whole=whole)


def _parts(sample: Stored) -> Iterator[Floats]:
    """Yield all weights in order, in parts that take little memory: as float32, or float64 if they are."""
    for first in range(0, sample.size, _CHUNK):
        part = sample[first : first + _CHUNK]
        if part.dtype == np.uint16:  # bfloat16, the upper half of a float32
            yield (part.astype(np.uint32) << 16).view(np.float32)
        else:
            yield part if part.dtype == np.float64 else part.astype(np.float32, copy=False)


def _sample(tensor: StoredTensor, file: int) -> Stored:
    """Return weights of a tensor, [S], as they are stored: as they lie in its file, or all of a view. Numpy has no
    bfloat16, so those are uint16."""
    kind = "uint16" if tensor.dtype == "bfloat16" else tensor.dtype
    if tensor.nbytes != tensor.dense_bytes:
        dense = read_tensor(tensor).reshape(-1)
        import torch  # as `read_tensor` has

        found: Stored = dense.view(torch.uint8).numpy().view(kind)
        return found
    size = ITEM_BYTES[tensor.dtype]
    body = _read(tensor, file, size)
    # All of it, unless the file became shorter.
    return np.frombuffer(body[: len(body) // size * size], kind)


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
