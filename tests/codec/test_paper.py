"""The published codec: its own vectors, nearest nodes against brute force, bit strings, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from birkhoff.codec import paper
from birkhoff.codec.errors import CodecError, FormatError, TensorError

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "reference_vectors.json").read_text())
CODED = [case for case in CASES if case["load_type"] != 0]
NODES = (1225, 1600)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDEN / "reference_vectors.safetensors")
    return tensors


def published(case: dict[str, Any], vectors: dict[str, Tensor]) -> paper.PaperCode:
    """What the published code wrote for a case."""
    start = f"{case['case']}/"
    part = {name.removeprefix(start): vectors[name] for name in vectors if name.startswith(start)}
    return paper.PaperCode.from_packed(
        part["encoded_index"].numpy().tobytes(),
        U=NODES[int(part["U"])],
        K=int(part["K"]),
        bits=int(part["uint_i"]),
        centre=part["center_node"],
        far=part["farthest_node"],
        shape=tuple(part["original_shape"].tolist()),
        per_row=case["kind"] == "linear",
        mean_abs_error=case["mae"],
    )


@pytest.mark.parametrize("case", CODED, ids=lambda case: case["case"])
def test_encoding_gives_the_published_code(case: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    expected = published(case, vectors)
    code = paper.encode(vectors[f"{case['case']}/input"], per_row=case["kind"] == "linear")
    assert code is not None
    assert (code.U, code.K, code.bits) == (case["U"], case["K"], case["bits_per_pair"])
    assert (code.shape, code.padded) == (expected.shape, expected.padded)
    torch.testing.assert_close(code.centre, expected.centre)
    torch.testing.assert_close(code.far, expected.far)
    assert code.mean_abs_error == pytest.approx(case["mae"], rel=1e-3)
    same = code.index == expected.index
    assert same.float().mean() >= 0.999
    if same.all():
        assert code.packed() == expected.packed()


@pytest.mark.parametrize("case", CODED, ids=lambda case: case["case"])
def test_published_bytes_decode_as_published(case: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    code = published(case, vectors)
    assert code.padded == bool(vectors[f"{case['case']}/if_padding"])
    assert code.packed() == vectors[f"{case['case']}/encoded_index"].numpy().tobytes()
    torch.testing.assert_close(paper.decode(code), vectors[f"{case['case']}/decoded"], rtol=0, atol=1e-6)


def test_coarse_weights_stay_raw(vectors: dict[str, Tensor]) -> None:
    assert paper.encode(vectors["coarse.stored_raw/input"], per_row=True) is None
    assert paper.published_error(vectors["coarse.stored_raw/input"], per_row=True) is None


@pytest.mark.parametrize(
    ("weight", "per_row"), [(torch.zeros(9), False), (torch.zeros(0), False), (torch.zeros(12, 1), True)]
)
def test_weights_without_enough_pairs_stay_raw(weight: Tensor, per_row: bool) -> None:
    assert paper.encode(weight, per_row=per_row) is None


def test_worked_example_of_the_module() -> None:
    node = paper.trajectory(1225, torch.zeros(2))
    theta = paper.nearest_node(torch.tensor([[0.012, -0.021]]), node)
    assert theta.tolist() == [745]
    torch.testing.assert_close(node[745], torch.tensor([0.010816, -0.021429]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("U", NODES)
def test_trajectory_is_the_formula_to_float32(U: int) -> None:
    theta, n = torch.arange(U, dtype=torch.float64), math.isqrt(U)
    formula = torch.stack([0.1 * theta / U, 0.1 * (theta % n) / n], dim=1) - 0.05
    torch.testing.assert_close(
        paper.trajectory(U, torch.zeros(2)).double(), formula, rtol=0, atol=paper.BOX_SIDE * 4e-6
    )


def assert_nearest(point: Tensor, U: int) -> None:
    """Equal to brute force in float64 wherever the runner-up is farther off than float32 rounds."""
    node = paper.trajectory(U, torch.zeros(2))
    theta = paper.nearest_node(point, node).long()
    square = (point.double()[:, None] - node.double()).square().sum(2)
    best, winner = square.min(1)
    found = square.gather(1, theta[:, None])[:, 0]
    rounding = 4 * torch.finfo(torch.float32).eps * (point.double().square().sum(1) + 0.005)
    assert (found <= best + rounding).all()
    clear = square.topk(2, dim=1, largest=False).values[:, 1] > best + rounding
    assert torch.equal(theta[clear], winner[clear])


# Where rounding up or down might go wrong: on nodes, between rows, on and beyond the edges, anywhere.
coordinate = st.one_of(
    st.floats(-0.08, 0.08),
    st.sampled_from([-0.05, 0.05, -0.0500001, 0.0500001]),
    st.integers(-45, 45).map(lambda half_steps: half_steps * 0.05 / 40),
    st.integers(-40, 40).map(lambda half_steps: half_steps * 0.05 / 35),
)


@pytest.mark.parametrize("U", NODES)
@settings(max_examples=60, deadline=None)
@given(points=st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=30))
def test_nearest_node_is_that_of_brute_force(U: int, points: list[tuple[float, float]]) -> None:
    assert_nearest(torch.tensor(points), U)


@pytest.mark.parametrize("U", NODES)
def test_nearest_node_of_many_points_and_of_every_node(U: int) -> None:
    generator = torch.Generator().manual_seed(U)
    assert_nearest((torch.rand(6000, 2, generator=generator) - 0.5) * 0.13, U)
    node = paper.trajectory(U, torch.zeros(2))
    assert torch.equal(paper.nearest_node(node, node), torch.arange(U, dtype=torch.int32))


@pytest.mark.parametrize("centre", [0.13, 1.0])
def test_nearest_node_rounds_as_a_distance_matrix_does(centre: float) -> None:
    """Far from the origin float32 decides many pairs, 3 % of them otherwise than exact distances would."""
    point = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)) * 0.015 + centre
    node = paper.trajectory(1600, point.mean(0))
    matrix = torch.cdist(point, node, compute_mode="use_mm_for_euclid_dist").argmin(1)
    assert (paper.nearest_node(point, node) == matrix).float().mean() >= 0.999


@settings(max_examples=80, deadline=None)
@given(data=st.data(), bits=st.integers(1, 32), count=st.integers(0, 70))
def test_packing_is_one_big_endian_number_and_comes_back(data: st.DataObject, bits: int, count: int) -> None:
    index = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = paper.pack_bits(np.array(index, np.int64), bits)
    number = sum(value << (bits * place) for place, value in enumerate(reversed(index)))
    assert packed == number.to_bytes((count * bits + 7) // 8, "big")
    assert paper.unpack_bits(packed, count, bits).tolist() == index


def test_packing_crosses_blocks() -> None:
    index = np.random.default_rng(0).integers(0, 1 << 13, 3 * 8192 + 5)
    assert np.array_equal(paper.unpack_bits(paper.pack_bits(index, 13), len(index), 13), index)


def test_packing_refuses_what_does_not_fit() -> None:
    assert paper.pack_bits(np.array([1, 2, 3]), 3) == bytes.fromhex("0053")
    with pytest.raises(CodecError, match="do not fit 3 bits"):
        paper.pack_bits(np.array([8]), 3)
    with pytest.raises(CodecError, match=r"1\.\.32 bits, got 33"):
        paper.pack_bits(np.array([8]), 33)
    with pytest.raises(FormatError, match=r"1\.\.32 bits, got 0"):
        paper.unpack_bits(b"", 1, 0)
    with pytest.raises(FormatError, match="take 2 bytes, got 3"):
        paper.unpack_bits(bytes(3), 3, 3)
    with pytest.raises(FormatError, match="zero bits in front"):
        paper.unpack_bits(bytes.fromhex("0253"), 3, 3)


@pytest.mark.parametrize(
    ("shape", "per_row", "pairs"),
    [((7, 9), True, 35), ((7, 9), False, 32), ((3, 5, 3), False, 23), ((8, 4), True, 16), ((11,), False, 6)],
)
def test_odd_counts_keep_their_shape(shape: tuple[int, ...], per_row: bool, pairs: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02
    code = paper.encode(weight, per_row=per_row)
    assert code is not None
    assert (len(code.index), code.padded, code.shape) == (pairs, 2 * pairs != weight.numel(), shape)
    decoded = paper.decode(code)
    assert decoded.shape == shape
    # A step is 0.1/35; rings of this narrow a weight shrink by less than two.
    assert (decoded - weight).abs().max() < 2 * 0.1 / 35
    back = paper.PaperCode.from_packed(code.packed(), **_side_information(code))
    assert back.padded == code.padded
    assert torch.equal(paper.decode(back), decoded)


def test_padding_is_the_mean_second_coordinate_of_whole_pairs() -> None:
    weight = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 4]]) * 1e-3
    code = paper.encode(weight, per_row=True)
    assert code is not None
    torch.testing.assert_close(code.centre, torch.tensor([35 / 8, 4.0]) * 1e-3)


def _side_information(code: paper.PaperCode) -> dict[str, Any]:
    names = ("U", "K", "bits", "centre", "far", "shape", "per_row", "mean_abs_error")
    return {name: getattr(code, name) for name in names}


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        ({"U": 2025}, "got 2025 and 1"),
        ({"K": 4}, "got 1225 and 4"),
        ({"K": 0}, "expected indices below 1225"),
        ({"bits": 11}, "x 11 bits take"),
        ({"centre": torch.tensor([math.nan, 0])}, "centre must be two finite"),
        ({"far": torch.zeros(3)}, "far must be two finite"),
        ({"shape": (40, 41)}, "x 12 bits take"),
        ({"shape": (40, 8, 5)}, "expected a matrix"),
    ],
)
def test_forged_side_information_is_refused(forged: dict[str, Any], words: str) -> None:
    code = paper.encode(torch.randn(40, 40, generator=torch.Generator().manual_seed(2)) * 0.02, per_row=True)
    assert code is not None
    assert (code.U, code.K, code.bits) == (1225, 1, 12)
    with pytest.raises(FormatError, match=words):
        paper.PaperCode.from_packed(code.packed(), **_side_information(code) | forged)


def test_unfit_weights_are_refused_by_name_of_the_trouble() -> None:
    with pytest.raises(TensorError, match="NaN or Inf"):
        paper.encode(torch.tensor([math.inf] * 12), per_row=False)
    with pytest.raises(CodecError, match=r"floating-point weight, got torch\.int64"):
        paper.encode(torch.arange(12), per_row=False)
    with pytest.raises(CodecError, match="use per_row=False"):
        paper.encode(torch.zeros(3, 4, 5), per_row=True)


def test_mean_error_and_sqnr_are_those_of_the_decoded_weight() -> None:
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(3)) * 0.03
    code = paper.encode(weight, per_row=True)
    assert code is not None
    assert code.K > 0
    error = (paper.decode(code) - weight).double()
    assert code.mean_abs_error == pytest.approx(float(error.abs().mean()), rel=1e-5)
    expected = 10 * math.log10(float(weight.double().square().sum() / error.square().sum()))
    assert paper.published_error(weight, per_row=True) == pytest.approx(expected, abs=1e-4)


def test_a_constant_weight_is_one_node() -> None:
    code = paper.encode(torch.full((16, 16), 0.5), per_row=True)
    assert code is not None
    assert code.K == 0
    assert len(code.index.unique()) == 1
    assert (paper.decode(code) - 0.5).abs().max() < 0.1 / 35
    assert paper.published_error(torch.zeros(4, 4), per_row=True) == -math.inf


def test_narrow_dtypes_and_views_code_as_their_float32_values() -> None:
    weight = (torch.randn(64, 48, generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16().T
    code = paper.encode(weight, per_row=True)
    plain = paper.encode(weight.float().contiguous(), per_row=True)
    assert code is not None
    assert plain is not None
    assert torch.equal(code.index, plain.index)
    assert paper.decode(code).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CODED, ids=lambda case: case["case"])
def test_gpu_gives_the_published_code(case: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    expected = published(case, vectors)
    weight, per_row = vectors[f"{case['case']}/input"], case["kind"] == "linear"
    code, on_cpu = paper.encode(weight.cuda(), per_row=per_row), paper.encode(weight, per_row=per_row)
    assert code is not None
    assert on_cpu is not None
    assert code.index.is_cuda
    assert (code.U, code.K, code.bits) == (expected.U, expected.K, expected.bits)
    assert (code.index.cpu() == expected.index).float().mean() >= 0.999
    assert code.packed() == on_cpu.packed()
    assert torch.equal(code.centre.cpu(), on_cpu.centre)
    assert torch.equal(paper.decode(code).cpu(), paper.decode(on_cpu))
    decoded = paper.decode(replace(expected, index=expected.index.cuda()))
    torch.testing.assert_close(decoded.cpu(), vectors[f"{case['case']}/decoded"], rtol=0, atol=1e-6)
