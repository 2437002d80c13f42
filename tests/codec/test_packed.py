import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import lattice, packed, rate
from birkhoff.codec.errors import CodecError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.packed import PackedTensor

BITS = (10, 12)


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_the_formula(code: PackedTensor) -> np.ndarray:
    """The module's formula, pair by pair, in float32."""
    n, width, f32 = 1 << code.bits // 2, code.bits - 8, np.float32
    rows, pairs = code.low.shape
    weight = np.zeros((rows, code.columns), f32)
    for r in range(rows):
        for p in range(pairs):
            bit = p * width
            high = int(code.high[r, bit // 8]) >> bit % 8 & (1 << width) - 1
            theta = int(code.low[r, p]) + 256 * high
            c = int(code.scale[r, p // 64])
            s = f32(code.step) * f32((1 + c % 16 / 16) * 2.0 ** (c // 16 - 15))
            i, j = theta // n - n // 2, theta % n - n // 2
            block = p // 32 * 64
            half = min(32, (code.columns - block + 1) // 2)
            first = block + p % 32
            weight[r, first] = f32(i + j / n) * s
            if first + half < code.columns:
                weight[r, first + half] = f32(j) * s
    weight.reshape(-1)[code.escape_index.numpy()] = code.escape_value.numpy()
    return weight


@given(
    st.integers(1, 9),
    st.integers(1, 300),
    st.integers(0, 2**31),
    st.sampled_from([0.4, 1.0, 3.0]),
    st.sampled_from(BITS),
)
@settings(max_examples=40, deadline=None)
def test_decodes_by_its_formula_in_any_shape(rows: int, columns: int, seed: int, power: float, bits: int) -> None:
    weight = normal((rows, columns), seed)
    weight = weight.sign() * weight.abs() ** power
    code = packed.pack(lattice.quantise(weight, 0.05), bits)
    assert np.array_equal(code.decode().numpy(), by_the_formula(code))


@pytest.mark.parametrize(("bits", "least", "bits_a_weight"), [(10, 25.5, 5.0625), (12, 31.4, 6.0625)])
def test_fidelity_and_size_that_the_module_states(bits: int, least: float, bits_a_weight: float) -> None:
    code = lattice.quantise(normal((256, 1024)), 1 / 24)
    form = packed.pack(code, bits)
    assert 8 * form.nbytes / code.decode().numel() == bits_a_weight
    assert least < fidelity(code.decode(), form.decode()).sqnr_db < least + 1


@given(st.integers(0, 2**31), st.sampled_from(BITS))
@settings(max_examples=20, deadline=None)
def test_no_node_of_the_groups_trajectory_is_nearer(seed: int, bits: int) -> None:
    """Against all nodes, for pairs that lie inside the box of the group's scale."""
    code = lattice.quantise(normal((1, 128), seed), 0.02)
    form = packed.pack(code, bits)
    n = 1 << bits // 2
    i, j = torch.meshgrid(torch.arange(-n // 2, n // 2), torch.arange(-n // 2, n // 2), indexing="ij")
    s = packed.scales(form.scale[0], form.step)[0].double()
    nodes = torch.stack((i + j / n, j), -1).double().view(-1, 2) * s
    weight, got = code.decode().double(), form.decode().double()
    for at in range(64):
        columns = [at // 32 * 64 + at % 32, at // 32 * 64 + at % 32 + 32]
        pair = weight[0, columns]
        if pair.abs().max() > (n / 2 - 2) * s:
            continue
        best = (nodes - pair).square().sum(1).min()
        assert (got[0, columns] - pair).square().sum() <= best + 1e-5 * s**2


def test_scales_cover_groups_far_apart_and_zeros_stay_zeros() -> None:
    weight = normal((3, 512)) * torch.tensor([1.0, 2.0**-9, 0.0])[:, None]
    weight[0, 128:256] = 0
    form = packed.pack(lattice.quantise(weight, 2.0**-14), 12)
    decoded = form.decode()
    for row in (0, 1):
        assert fidelity(weight[row], decoded[row]).sqnr_db > 28
    assert not decoded[2].any()
    assert not decoded[0, 128:256].any()


def test_escapes_stay_exact_and_leave_their_group_alone() -> None:
    weight = normal((6, 131))
    weight[1, 3], weight[5, 130], weight[2, 64] = 4e3, -5e3, 1e3
    code = lattice.quantise(weight, 0.05)
    assert len(code.escapes) == 3
    form = packed.pack(code, 12)
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[form.escape_index] = True
    whole, decoded = code.decode().view(-1), form.decode().view(-1)
    assert torch.equal(decoded[kept], whole[kept])
    assert kept.sum() == 6
    assert fidelity(whole[~kept], decoded[~kept]).sqnr_db > 30
    assert torch.equal(form.decode(torch.float16).view(-1), decoded.half())


def test_escapes_that_do_not_tower_are_coded_with_their_group() -> None:
    """A code of a high fidelity has many, which would take more memory than the planes."""
    code = lattice.quantise(normal((64, 512)), 1 / 64)
    assert len(code.escapes) > 500
    form = packed.pack(code, 12)
    assert not form.escape_index.numel()
    assert fidelity(code.decode(), form.decode()).sqnr_db > 31


def test_a_group_of_large_weights_only_is_coded_like_any_other() -> None:
    weight = normal((64, 512))
    weight[7] *= 1000
    code = lattice.quantise(weight, 0.1)
    assert len(code.escapes) > 200
    form = packed.pack(code, 12)
    assert form.escape_index.numel() == 0
    for row in (7, 8):
        assert fidelity(weight[row], form.decode()[row]).sqnr_db > 28


def test_all_zero_and_no_rows() -> None:
    for shape in ((4, 70), (0, 70)):
        form = packed.pack(lattice.quantise(torch.zeros(shape), 0.1), 10)
        assert torch.equal(form.decode(), torch.zeros(shape))


def test_worked_example_of_the_module() -> None:
    form = PackedTensor(
        bits=10,
        low=torch.tensor([[589 & 255]], dtype=torch.uint8),
        high=torch.tensor([[589 >> 8]], dtype=torch.uint8),
        scale=torch.tensor([[0xF8]], dtype=torch.uint8),
        step=1.0,
        columns=2,
        escape_index=torch.empty(0, dtype=torch.int64),
        escape_value=torch.empty(0),
    )
    assert form.decode().tolist() == [[2.859375, -4.5]]


def test_other_widths_are_refused() -> None:
    with pytest.raises(CodecError, match="11 bits a pair: expected 10 or 12"):
        packed.pack(lattice.quantise(normal((2, 2)), 0.1), 11)  # type: ignore[arg-type]


def test_the_cost_on_top_of_a_stored_code_adds_to_its_error() -> None:
    weight = normal((256, 512)) * 0.02
    code, stored = rate.encode(weight, 30.0)
    again = fidelity(code.decode(), packed.pack(code, 12).decode())
    total = fidelity(weight, packed.pack(code, 12).decode())
    assert total.error == pytest.approx(stored.error + again.error, rel=0.05)
