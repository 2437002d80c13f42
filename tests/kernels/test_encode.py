"""Encode kernels give the codec's indices, escapes and error."""

import pytest
import torch
from torch import Tensor

from birkhoff.codec import lattice, rate
from birkhoff.codec.errors import TargetError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import Fidelity, fidelity
from birkhoff.kernels.encode import op as encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# rows, columns: whole blocks, ragged, odd, narrower than a block, more than one program
SHAPES = [(3, 128), (5, 200), (37, 131), (3, 1), (2, 2), (70, 33), (1, 2300), (2, 4224)]


def assert_same_code(got: LatticeTensor, expected: LatticeTensor) -> None:
    assert torch.equal(got.i.cpu(), expected.i)
    assert torch.equal(got.j.cpu(), expected.j)
    assert torch.equal(got.escapes.pair.cpu(), expected.escapes.pair)
    assert torch.equal(got.escapes.i.cpu(), expected.escapes.i)
    assert torch.equal(got.escapes.j.cpu(), expected.escapes.j)
    assert got.columns == expected.columns


def assert_same_error(got: Fidelity, expected: Fidelity) -> None:
    for name in ("energy", "error", "mean_abs"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert got.max_abs == expected.max_abs


def check(weight: Tensor, step: float, device: str) -> LatticeTensor:
    code, error = encode.quantise(weight.to(device), step)
    expected = lattice.quantise(weight, step)
    assert_same_code(code, expected)
    assert_same_error(error, fidelity(weight, expected.decode(weight.dtype)))
    return code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_quantise(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    check((torch.randn(rows, columns) * 0.02).to(dtype), 0.00087, device)


def test_ties_go_the_same_way(device: str) -> None:
    # Multiples of 1/512 at step 1/4: many pairs lie exactly between two nodes or two roundings.
    check(torch.randint(-4096, 4096, (8, 640)) / 512, 0.25, device)


def test_steps_whose_reciprocal_is_rounded(device: str) -> None:
    weight = torch.randn(4, 320)
    for step in (0.1, 0.0123, 3.7e-3, 1.1):
        check(weight, step, device)


def test_escapes_however_far(device: str) -> None:
    weight = torch.randn(5, 99)
    weight[0, 0], weight[2, 50], weight[4, 98], weight[3, 97] = 40.0, -1e3, 5e5, -4194305.5 * 0.1
    assert len(check(weight, 0.1, device).escapes) == 4


def test_more_escapes_than_a_first_pass_keeps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.encode_triton, "ESCAPE_CAPACITY", 3)
    assert len(check(torch.randn(9, 70), 0.01, device).escapes) > 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_db", [12.0, 30.0, 41.0])
def test_encode_meets_its_target(target_db: float, dtype: torch.dtype, device: str) -> None:
    weight = (torch.randn(30, 150) * 0.02).to(dtype)
    code, error = encode.encode(weight.to(device), target_db)
    assert target_db <= error.sqnr_db <= target_db + rate.TOLERANCE_DB
    expected = lattice.quantise(weight, code.step)
    assert_same_code(code, expected)
    assert_same_error(error, fidelity(weight, expected.decode(dtype)))


def test_encode_of_a_heavy_tail_meets_its_target(device: str) -> None:
    weight = torch.randn(40, 128) ** 5
    _, error = encode.encode(weight.to(device), 30.0)
    assert 30.0 <= error.sqnr_db <= 30.0 + rate.TOLERANCE_DB


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_encode_beside_an_outlier_meets_its_target_for_the_others(size: float, device: str) -> None:
    weight = torch.randn(40, 128)
    weight[3, 70] = size
    code, error = encode.encode(weight.to(device), 30.0)
    assert 30.0 <= error.sqnr_db <= 30.0 + rate.TOLERANCE_DB
    assert_same_error(error, fidelity(weight, code.decode().cpu()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_finite_energy_is_refused(value: float, device: str) -> None:
    with pytest.raises(TargetError, match="energy is"):
        encode.encode(torch.full((4, 70), value, device=device), 30.0)


def test_target_out_of_range_is_refused(device: str) -> None:
    with pytest.raises(TargetError, match=r"outside 6\.\.48 dB"):
        encode.encode(torch.randn(4, 70, device=device), 50.0)


def test_other_types_run_in_the_codec() -> None:
    weight = torch.randn(4, 70, dtype=torch.float64)
    code, error = encode.quantise(weight, 0.01)
    assert_same_code(code, lattice.quantise(weight, 0.01))
    assert error == fidelity(weight, code.decode(torch.float64))


def test_several_matrices_together_are_what_each_is(device: str) -> None:
    weights = [(torch.randn(9, 70) * 0.02).to(device), torch.randn(3, 131).to(device)]
    weights[1][0, 0] = 400.0  # an escape
    for (code, error), weight in zip(encode.encode_all(weights, 30.0), weights, strict=True):
        expected, same = encode.encode(weight, 30.0)
        assert_same_code(code, expected.to("cpu"))
        assert error == same
    assert encode.encode_all([], 30.0) == []
    with pytest.raises(TargetError):
        encode.encode_all(weights, 99.0)
