import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import metrics
from birkhoff.codec.metrics import Errors, bulk, compare, fidelity, sqnr_db, survey
from birkhoff.codec.native import library
from birkhoff.codec.native.survey import OUTLIER_RMS, Survey


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


def everywhere(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What something gives by vectors, by base instructions and by the references."""
    native, found = library.native(), []
    for vectors in (1, 0) if native is not None else ():
        native.birkhoff_native_vectors(vectors)
        found.append(run())
    if native is not None:
        native.birkhoff_native_vectors(1)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "native", lambda: None)
        found.append(run())
    return found


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_the_same_to_the_bit_everywhere(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal((size,), size).to(dtype)
    decoded = (weight.float() + 0.01 * normal((size,), 1)).to(dtype)
    errors = everywhere(lambda: compare(weight, decoded), monkeypatch)
    assert errors.count(errors[0]) == len(errors)
    exact = (decoded.float() - weight.float()).double()
    assert compare(weight, decoded).error == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert compare(weight, decoded).max_abs == float(exact.abs().max())
    assert compare(weight, decoded).mean_abs == pytest.approx(float(exact.abs().mean()), rel=1e-9)
    for limit in (math.inf, 1.5):
        looks = everywhere(lambda limit=limit: survey(weight, limit), monkeypatch)
        assert looks.count(looks[0]) == len(looks)
        energy = float(weight.double()[weight.abs() <= limit].square().sum())
        wanted = Survey(float(weight.min()), float(weight.max()), pytest.approx(energy, rel=1e-6), False)
        assert survey(weight, limit) == wanted


@given(st.integers(1, 5000), st.lists(st.integers(0, 5000), max_size=5))
@settings(max_examples=40, deadline=None)
def test_sums_do_not_tell_how_a_tensor_was_cut(size: int, cuts: list[int]) -> None:
    weight, decoded = normal((size,), size), normal((size,), 2)
    whole, parts = Errors(), Errors()
    whole.add(weight, decoded)
    ends = sorted(min(cut, size) for cut in cuts)
    for start, end in zip([0, *ends], [*ends, size], strict=True):
        parts.add(weight[start:end], decoded[start:end])
    assert parts.fidelity(1.0) == whole.fidelity(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 66])
def test_a_survey_tells_what_is_not_finite(value: float, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal((67,))
    weight[place] = value
    assert not any(math.isfinite(found.energy) for found in everywhere(lambda: survey(weight), monkeypatch))


@pytest.mark.parametrize("value", [3.0, -0.0, float(1 << 24), 0.5, float(1 << 31), 1e30])
def test_a_survey_tells_whole_numbers(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(-40.0, 60.0)
    weight[77] = value
    for found in everywhere(lambda: survey(weight), monkeypatch):
        assert found.whole == (value.is_integer() and value < 2.0**31)
