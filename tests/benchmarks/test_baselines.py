"""The baselines are what they are said to be: their bytes, and what comes back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import PROFILES
from tests.harness.benchmarks import baselines, measure, nnc, rates
from tests.harness.benchmarks.checkpoints import Checkpoint

SHAPE = (48, 640)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
@settings(max_examples=60, deadline=None)
def test_codes_pack_to_their_bits_and_come_back(bits: int, values: list[int]) -> None:
    codes = torch.tensor([value % (1 << bits) for value in values], dtype=torch.uint8)
    data = baselines.pack(codes, bits)
    assert len(data) == -(-len(values) // 8) * bits
    assert torch.equal(baselines.unpack(data, bits, len(values)), codes)


# bits a weight, by arithmetic; SQNR of a normal distribution, dB
EXPECTED = {
    "int8, channel": (8 + 32 / 640, 40, 44),
    "int6, 128": (6 + 24 / 128, 31.5, 33),
    "int5, 128": (5 + 24 / 128, 25.3, 27),
    "int4, 128": (4 + 24 / 128, 19, 21),
    "NF4": (4 + 32 / 64, 20.2, 21.2),
    "NF4, double": (4 + 8 / 64 + 2 * 2 * 32 / (48 * 640), 20.2, 21.2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_and_error_of_the_fixed_rate_baselines(name: str) -> None:
    baseline = next(baseline for baseline in baselines.all_baselines() if baseline.name == name)
    weight = normal(*SHAPE)
    parts = baseline.encode(weight)
    bits, least, most = EXPECTED[name]
    assert 8 * baselines.size(parts) / weight.numel() == pytest.approx(bits)
    decoded = baseline.decode(parts, SHAPE)
    assert (decoded.shape, decoded.dtype) == (weight.shape, torch.float32)
    assert least < fidelity(weight, decoded).sqnr_db < most


@pytest.mark.parametrize("baseline", baselines.all_baselines(), ids=lambda baseline: baseline.name)
@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (1, 1000), (33, 130)])
def test_ragged_shapes_come_back_in_shape(baseline: baselines.Baseline, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    decoded = baseline.decode(baseline.encode(weight), shape)
    assert decoded.shape == weight.shape
    assert fidelity(weight, decoded).sqnr_db > 15


def test_a_group_of_int4_by_hand() -> None:
    baseline = baselines.per_group(4, group=4)
    # low -1, high 2: the step is 0.2, zero lies at 5
    data, scale, zero = baseline.encode(torch.tensor([[-1.0, 0.0, 0.31, 2.0]]))
    assert isinstance(data, bytes)
    assert baselines.unpack(data, 4, 4).tolist() == [0, 5, 7, 15]
    assert float(scale) == pytest.approx(0.2, rel=1e-3)
    assert int(zero) == 5


def test_nf4_levels_are_kept_exactly() -> None:
    baseline = baselines.nf4(double=False)
    weight = torch.tensor(baselines.NF4).repeat(4)[None] * 0.125
    assert torch.equal(baseline.decode(baseline.encode(weight), (1, 64)), weight)


def test_zstd_on_float32_is_lossless() -> None:
    baseline = baselines.zstd(torch.float32)
    assert torch.equal(baseline.decode(baseline.encode(normal(*SHAPE)), SHAPE), normal(*SHAPE))


def test_rows_count_every_byte_and_refuse_what_comes_back_wrong() -> None:
    tensors = {"w": normal(64, 128), "b": normal(64), "n": torch.tensor(3)}
    model = Checkpoint(name="toy", tensors=tensors, file_bytes=4 * (64 * 128 + 64) + 8)
    assert model.lossy() == ["w"]
    row = measure.theirs(model, baselines.per_group(4))
    assert row.bytes == 64 * 128 // 2 + 3 * 64 + 4 * 64 + 8
    assert row.at_equal_error is not None
    assert row.sqnr_db == pytest.approx(row.least_db)
    assert measure.ours(model, PROFILES["balanced"]).sqnr_db >= 30

    class Broken(measure.Theirs):
        def decode(self, coded: object) -> dict[str, torch.Tensor]:
            return {**super().decode(coded), "b": torch.zeros(64)}

    with pytest.raises(measure.WrongResultError, match="b: stored as it is"):
        measure.run(model, "broken", "", Broken(baseline=baselines.per_group(4), lossy=frozenset(["w"])))


def test_a_sweep_is_linear_between_its_points_and_refuses_to_go_beyond() -> None:
    points = [{"qp": qp, "sqnr_db": db, "bytes": size} for qp, db, size in ((-20, 20.0, 100.0), (-21, 22.0, 140.0))]
    sweep = nnc.Sweep(version="0", tensors={"w": points})
    assert sweep.at("w", 21.0, "bytes") == 120.0
    assert sweep.uniform(-21) == {"w": points[1]}
    assert sweep.uniform(-22) is None
    with pytest.raises(nnc.WorkerFailedError, match="outside the sweep"):
        sweep.at("w", 30.0, "bytes")


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_hilberts_curve_goes_through_every_cell_by_neighbours(order: int) -> None:
    number = np.arange(4**order)
    x, y = rates._hilbert_place(number, order)
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == 4**order
    assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()
    assert np.array_equal(rates._hilbert_number(x, y, order), number)


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("count", [64, 65])
def test_numbers_of_fixed_length_come_back_as_the_centre_of_their_cells(bits: int, count: int) -> None:
    weight = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data, box = coded = rates.hilbert_encode(weight, bits)
    assert len(data) == -(-bits * -(-count // 2) // 8)
    decoded = rates.hilbert_decode(coded, bits, count)
    side = 2 * box / (1 << bits // 2)  # of the longer side of an odd length's two cells
    assert float((decoded - weight).abs().max()) <= side / 2 * 1.001


@pytest.mark.parametrize("target_db", [12.0, 24.0])
def test_bits_of_gaussian_weights_by_each_method(target_db: float) -> None:
    weight = normal(192, 256)
    shannon = rates.shannon_bits(weight, target_db) / weight.numel()
    assert shannon == pytest.approx(target_db / 6.0206, abs=0.03)
    entquant, hilbert = (method(weight, target_db) / weight.numel() for method in (rates.entquant, rates.hilbert))
    paths, single = (rates.ours("w", weight, target_db, path=path) / weight.numel() for path in (True, False))
    # Uniform steps with an ideal coder lose 0.254 bits to Shannon's bound at a fine step; fixed lengths a bit and more.
    assert shannon + 0.1 < paths < single < hilbert
    assert shannon + 0.25 < entquant < shannon + 0.45
    assert hilbert > shannon + 1


def test_entquants_error_and_rate_go_with_lambda() -> None:
    weight = normal(64, 256) * torch.logspace(-1, 0, 64)[:, None]
    costs = rates._entquant_costs(weight)
    found = [rates._entquant_at(weight, costs, strength) for strength in (1e-4, 1e-2, 1.0)]
    assert [db for db, _ in found] == sorted((db for db, _ in found), reverse=True)
    assert [bits for _, bits in found] == sorted((bits for _, bits in found), reverse=True)
