import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.metrics import OUTLIER_RMS, bulk, compare, fidelity, sqnr_db


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def energy(weight: torch.Tensor) -> float:
    return float(weight.double().square().sum())


def test_ordinary_and_heavy_tailed_weights_are_all_bulk() -> None:
    for power in (0.5, 1.0, 2.0, 3.0):
        weight = normal((300, 200))
        weight = weight.sign() * weight.abs() ** power
        found = bulk(weight, energy(weight))
        assert (found.energy, found.limit) == (energy(weight), math.inf)


@given(
    st.integers(0, 2**31),
    st.integers(1024, 40_000),
    st.integers(1, 8),
    st.floats(2.0, 15.0),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_outliers_of_any_size_leave_the_energy_of_the_others(
    seed: int, count: int, outliers: int, size: float, dtype: torch.dtype
) -> None:
    weight = normal((count,), seed).to(dtype)
    outliers = min(outliers, count // 512)
    others = weight.clone()
    for number in range(outliers):
        weight[number * 400] = 10.0 ** (size * (number + 1) / outliers)  # each size hides the next
        others[number * 400] = 0
    found = bulk(weight, energy(weight))
    size_of, square = weight.abs().double(), weight.double().square()
    inner = size_of <= found.limit
    assert found.energy == pytest.approx(float(square[inner].sum()), rel=1e-5)
    assert found.energy >= 0.99 * energy(others)
    # Nothing is left for the rule to leave out, and what it left out is few.
    above = inner & (size_of > OUTLIER_RMS * math.sqrt(found.energy / count))
    assert float(square[above].sum()) <= 0.5001 * found.energy
    assert int((~inner).sum()) <= outliers


def test_more_than_one_in_256_are_no_outliers() -> None:
    weight = normal((128, 128))
    weight[0, :64] = 1000.0
    assert bulk(weight, energy(weight)).energy == pytest.approx(64e6, rel=0.01)
    weight[0, 60:] = normal((68,))
    assert bulk(weight, energy(weight)).energy == pytest.approx(128 * 128, rel=0.05)


def test_zeros_are_no_bulk() -> None:
    weight = torch.zeros(64, 64)
    weight[3, 3] = 5.0
    assert bulk(weight, 25.0).energy == 25.0
    assert bulk(torch.zeros(4096), 0.0).energy == 0.0


def test_the_error_of_outliers_counts_against_the_bulk() -> None:
    weight = normal((4096,))
    weight[7] = 1e6
    decoded = weight.clone()
    decoded[7] += 64.0
    found = fidelity(weight, decoded)
    assert found.error == 4096.0
    assert found.sqnr_db == pytest.approx(0.0, abs=0.3)
    assert compare(weight, decoded).sqnr_db == pytest.approx(sqnr_db(1e12, 4096), abs=0.01)
