"""The Triton search against the eager one: the same symbols, bit for bit."""

import pytest
import torch

from birkhoff.codec import trellis


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (24, 70)])
@pytest.mark.parametrize("width", [1.0, 30.0, 3e5])
def test_same_path_as_the_eager_search(device: str, shape: tuple[int, int], width: float) -> None:
    from birkhoff.kernels.trellis import triton as trellis_triton

    u = torch.randn(shape) * width
    expected = trellis.viterbi(u)
    assert torch.equal(trellis_triton.search(u.to(device)).cpu(), expected)


def test_ties_take_the_same_side(device: str) -> None:
    from birkhoff.kernels.trellis import triton as trellis_triton

    u = torch.randint(-6, 7, (24, 33)).float() / 2
    assert torch.equal(trellis_triton.search(u.to(device)).cpu(), trellis.viterbi(u))
