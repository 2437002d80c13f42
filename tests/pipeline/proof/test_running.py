"""What a model's run sets for its process, and sets back."""

import subprocess
import sys

import pytest
import torch

from birkhoff.pipeline.proof import running
from birkhoff.pipeline.proof.running import heap_kept

HEAP = """
from pathlib import Path
import torch
from birkhoff.pipeline.proof.running import heap_kept

def mapped(nbytes):  # by the kernel, for this tensor alone
    tensor = torch.ones(nbytes, dtype=torch.uint8)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "[heap]" not in rest
    raise AssertionError("the tensor is nowhere")


assert mapped(80 << 20)
with heap_kept():
    assert not mapped(80 << 20)
assert mapped(80 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
def test_large_tensors_come_from_the_heap_inside_and_from_the_kernel_outside() -> None:
    # In a process of its own: what other tests freed may be large enough for the tensor.
    subprocess.run([sys.executable, "-c", HEAP], check=True)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.ctypes, "CDLL", lambda _: object())
    with heap_kept():
        assert torch.ones(3).sum() == 3
