"""Build a model to run beside a fleet's work, and choose its number of threads."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from birkhoff.codec.native.processors import processors
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.load.builders import built, config_of
from birkhoff.pipeline.proof.task import Subject

THREADED_BYTES = 32 << 20
"""Checkpoint size from which a model's operations profit from several threads. LiteMedSAM, 39 MB, takes 123 s on two
cores with them and 199 s without."""


def built_model(subject: Subject, checkpoint: Checkpoint) -> nn.Module:
    """Return an untrained model for a checkpoint, in evaluation mode. Raises BuilderError."""
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    upstream = Path(subject.upstream) if subject.upstream else None
    configs = [subject.config, config_of(checkpoint.path)]
    return built(str(checkpoint.path), shapes, subject.builder, configs, upstream).eval()


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
_MMAPS, _TRIM_BYTES = 65_536, 128 << 10
"""glibc's names and defaults for two settings of `mallopt`."""


@contextlib.contextmanager
def heap_kept() -> Iterator[None]:
    """Keep freed memory for the next tensor, and return it to the system at the end.

    Tensors of 32 MiB and more come from the kernel and go back to it, which maps and clears every page again: a fifth
    of the time of LiteMedSAM's statistics. Other threads get their memory from the same place, and other C libraries
    than glibc have no such settings.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MMAPS)
        libc.mallopt(_TRIM_THRESHOLD, int(os.environ.get("MALLOC_TRIM_THRESHOLD_", _TRIM_BYTES)))
        libc.malloc_trim(0)


@contextlib.contextmanager
def threads(nbytes: int) -> Iterator[None]:
    """Use every CPU for a large model, as only its proof is left to do, and one thread for a small model.

    Beside busy workers, the threads of a small operation wait for each other and take ten times as long as one thread.
    """
    before = torch.get_num_threads()
    if nbytes >= THREADED_BYTES:
        torch.set_num_threads(processors())
    try:
        yield
    finally:
        torch.set_num_threads(before)
