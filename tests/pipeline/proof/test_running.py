"""What a model's run sets for its process, and sets back."""

import sys
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.proof import running
from birkhoff.pipeline.proof.running import heap_kept


def _mapped(nbytes: int) -> bool:
    """Whether the kernel maps memory for a tensor by itself: then nothing but the tensor is in it."""
    tensor = torch.ones(nbytes, dtype=torch.uint8)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "[heap]" not in rest
    raise AssertionError("the tensor is nowhere")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
def test_large_tensors_come_from_the_heap_inside_and_from_the_kernel_outside() -> None:
    nbytes = 80 << 20
    assert _mapped(nbytes)
    with heap_kept():
        assert not _mapped(nbytes)
    assert _mapped(nbytes)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.ctypes, "CDLL", lambda _: object())
    with heap_kept():
        assert torch.ones(3).sum() == 3
