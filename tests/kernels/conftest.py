"""Kernels run compiled where there is a GPU, and under Triton's interpreter where there is none."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read by triton.jit when a kernel's module is imported, so it must stand here, before any of them is.
    os.environ["TRITON_INTERPRET"] = "1"

from birkhoff.kernels import runtime


@pytest.fixture
def device() -> Iterator[str]:
    """A device on which the Triton kernels run."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield "cuda"
        return
    with runtime.interpreting():
        yield "cpu"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
