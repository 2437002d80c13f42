"""Kernels run compiled on a GPU, and under Triton's interpreter where there is none (`tests/conftest.py` sets it)."""

from collections.abc import Iterator

import pytest
import torch

from birkhoff.kernels.runtime import device as runtime


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
