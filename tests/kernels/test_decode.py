"""Decode kernels give the codec's bits."""

import pytest
import torch

from birkhoff.codec import lattice
from birkhoff.kernels.decode import op as decode
from birkhoff.kernels.runtime.errors import KernelError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# rows, columns: whole blocks, ragged, odd, narrower than a block, more than one program
SHAPES = [(3, 128), (5, 200), (37, 131), (3, 1), (2, 2), (70, 33), (1, 9000), (2, 4224)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_step_numbers_and_planes(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    code = lattice.quantise(torch.randn(rows, columns), 0.021)
    expected = code.decode(dtype)
    step = torch.tensor(code.step, device=device)
    got = decode.decode_theta(code.theta().to(device), step, columns, dtype).cpu()
    got = got if not len(code.escapes) else decode.reference.put_escapes(got, *code.escaped_weights())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_planes_with_escapes(dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(9, 77)
    weight[2, 5], weight[8, 76] = 100.0, -77.0
    code = lattice.quantise(weight, 0.05)
    assert len(code.escapes) == 2
    moved = lattice.LatticeTensor(
        i=code.i.to(device), j=code.j.to(device), escapes=code.escapes.to(device), step=code.step, columns=77
    )
    assert torch.equal(decode.decode_lattice(moved, dtype).cpu(), code.decode(dtype))


def test_every_step_number(device: str) -> None:
    theta = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(128, 512)
    step = torch.tensor(0.0371)
    for dtype in DTYPES:
        got = decode.decode_theta(theta.to(device), step.to(device), 1024, dtype)
        assert torch.equal(got.cpu(), decode.reference.decode(theta, step, 1024, dtype))


def test_no_weights(device: str) -> None:
    theta = torch.empty(0, 5, dtype=torch.uint16, device=device)
    assert decode.decode_theta(theta, torch.ones((), device=device), 10, torch.float32).shape == (0, 10)


def test_theta_of_another_shape_is_refused() -> None:
    with pytest.raises(KernelError, match=r"uint16 \[N, 5\], got torch.uint16 \[2, 4\]"):
        decode.decode_theta(torch.zeros(2, 4, dtype=torch.uint16), torch.ones(()), 10, torch.float32)
