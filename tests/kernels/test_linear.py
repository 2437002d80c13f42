"""The HyperLinear kernels against the eager reference, on awkward shapes."""

import pytest
import torch
from torch.nn import functional

from birkhoff.codec import lattice
from birkhoff.kernels.hyperlinear import HyperLinear

# Relative error of the output (norm of the difference / norm), against float64 with the float32 weight.
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)]

# tokens, rows, columns: ragged blocks, odd and even, less than a block, tiles with a remainder in every direction
SHAPES = [(1, 17, 97), (3, 5, 64), (20, 70, 200), (2, 3, 1), (2, 3, 2), (70, 130, 33), (5, 66, 256)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_against_the_reference(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    code = lattice.quantise(torch.randn(rows, columns) * 0.02, 0.001)
    bias = torch.randn(rows) if rows % 2 else None
    x = torch.randn(tokens, columns).to(dtype)
    y = HyperLinear.from_lattice(code, bias, device=device)(x.to(device))
    expected = functional.linear(x.double(), code.decode().double(), None if bias is None else bias.double())
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=lambda v: str(v).removeprefix("torch."))
def test_escapes_and_strides(dtype: torch.dtype, tolerance: float, device: str) -> None:
    weight = torch.randn(70, 99) * 0.02
    weight[0, 0], weight[3, 98], weight[3, 40], weight[69, 63] = 2.0, -3.0, 1.0, 0.5
    code = lattice.quantise(weight, 0.001)
    assert len(code.escapes) == 4
    x = torch.randn(5, 120)[:, 10:109].to(dtype)
    y = HyperLinear.from_lattice(code, device=device)(x.to(device))
    assert relative_error(y, functional.linear(x.double(), code.decode().double())) < tolerance
    y = HyperLinear.from_lattice(code, device=device)(x.T.contiguous().to(device).T)
    assert relative_error(y, functional.linear(x.double(), code.decode().double())) < tolerance


def test_gradient_is_that_of_the_decoded_weight(device: str) -> None:
    code = lattice.quantise(torch.randn(6, 70) * 0.02, 0.001)
    x = torch.randn(3, 70, device=device, requires_grad=True)
    layer = HyperLinear.from_lattice(code, torch.zeros(6), device=device)
    layer(x).square().sum().backward()
    reference = x.detach().cpu().requires_grad_()
    functional.linear(reference, code.decode()).square().sum().backward()
    assert x.grad is not None
    assert layer.bias is not None
    torch.testing.assert_close(x.grad.cpu(), reference.grad)
    torch.testing.assert_close(layer.bias.grad, 2 * layer(x.detach()).sum(0))
