import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import lattice, rate, reference, trajectory, trellis
from birkhoff.codec.errors import TargetError
from birkhoff.codec.metrics import compare, fidelity
from birkhoff.codec.native.library import native
from birkhoff.codec.pairs import columns_of_pairs, join, matrix_shape, pairs_per_row, split
from birkhoff.codec.trajectory import nearest, reciprocal

SHAPES = [(1, 2), (3, 1), (5, 3), (7, 64), (4, 65), (33, 127), (2, 128), (1, 70001), (300, 77)]


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_join_to_what_was_split(shape: tuple[int, int]) -> None:
    weight = normal(shape)
    x, y = split(weight)
    assert x.shape == y.shape == (shape[0], pairs_per_row(shape[1]))
    assert torch.equal(join(x, y, shape[1]), weight)


@pytest.mark.parametrize("columns", [1, 2, 5, 64, 65, 127, 200])
def test_columns_of_pairs_name_the_weights_of_each_pair(columns: int) -> None:
    weight = torch.arange(1.0, columns + 1)[None]
    x, y = split(weight)
    first, second = columns_of_pairs(torch.arange(pairs_per_row(columns)), columns)
    padded = torch.nn.functional.pad(weight[0], (0, 64))
    assert torch.equal(padded[first], x[0])
    assert torch.equal(padded[second], y[0])


def test_full_blocks_pair_column_k_with_k_plus_32() -> None:
    first, second = columns_of_pairs(torch.arange(64), 128)
    assert first.tolist() == [*range(32), *range(64, 96)]
    assert second.tolist() == [*range(32, 64), *range(96, 128)]


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((768, 3072), (768, 3072)), ((32, 8, 3, 3), (32, 72)), ((64, 1, 3, 3), (1, 576)), ((9,), (1, 9)), ((), (1, 1))],
)
def test_matrix_shape(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(shape) == matrix


@pytest.mark.parametrize("target", [12.0, 27.0, 30.0, 36.0, 45.0])
@pytest.mark.parametrize("shape", [(64, 64), (33, 127), (1, 70001), (300, 1277)])
def test_target_is_met_within_its_tolerance(shape: tuple[int, int], target: float) -> None:
    weight = normal(shape) * 0.02
    code, found = rate.encode(weight, target)
    measured = fidelity(weight, code.decode())
    assert measured == found
    assert target <= measured.sqnr_db <= target + rate.TOLERANCE_DB


@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 200), st.sampled_from([0.4, 1.0, 2.5]))
@settings(max_examples=40, deadline=None)
def test_any_shape_and_tail(seed: int, rows: int, columns: int, power: float) -> None:
    weight = normal((rows, columns), seed)
    weight = weight.sign() * weight.abs() ** power * 1e-3
    code, found = rate.encode(weight, 30.0)
    decoded = code.decode()
    assert fidelity(weight, decoded) == found
    assert found.sqnr_db >= 30.0
    # the greatest error is that of a cell: half a step each way, and a little for the shear
    assert found.max_abs <= code.step * 0.51


def test_outliers_become_escapes_and_come_back() -> None:
    weight = normal((64, 130))
    weight[3, 5], weight[60, 129], weight[10, 64] = 1e3, -4e2, 2e2
    step = 0.1
    code = lattice.quantise(weight, step)
    assert len(code.escapes) == 3
    assert (code.decode() - weight).abs().max() <= step * 0.51
    assert torch.equal(code.escapes.pair, code.escapes.pair.sort().values)


def test_half_types_meet_the_target_after_rounding() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weight = (normal((64, 200)) * 0.05).to(dtype)
        code, found = rate.encode(weight, 36.0)
        assert code.decode(dtype).dtype == dtype
        assert 36.0 <= fidelity(weight, code.decode(dtype)).sqnr_db == found.sqnr_db


@pytest.mark.parametrize("target", [5.0, 60.0])
def test_targets_out_of_range_are_refused(target: float) -> None:
    with pytest.raises(TargetError, match=r"outside 6\.\.48 dB"):
        rate.encode(normal((8, 8)), target)


def test_two_valued_weights_may_lie_above_the_window_never_below() -> None:
    weight = normal((64, 64)).sign()
    _, found = rate.encode(weight, 30.0)
    assert found.sqnr_db >= 30.0
    assert not math.isnan(found.sqnr_db)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_same_indices() -> None:
    weight = normal((512, 1000)) * 0.02
    code, _ = rate.encode(weight, 30.0)
    other = lattice.quantise(weight.cuda(), code.step)
    assert torch.equal(code.i, other.i.cpu())
    assert torch.equal(code.j, other.j.cpu())
    assert torch.equal(code.decode(), other.decode().cpu())


@pytest.mark.parametrize("vectors", [1, 0])
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 131, 320])
def test_the_native_library_decodes_and_narrows_as_the_references_do(columns: int, vectors: int) -> None:
    library = native()
    if library is None:
        pytest.skip("the native library is not built here")
    library.birkhoff_native_vectors(vectors)
    weight = torch.randn(37, columns, generator=torch.Generator().manual_seed(columns)) * 60
    weight[3, 0] = 400.0
    try:
        code = lattice.quantise_path(weight, 0.77)
        exact = torch.empty(37, columns)
        code.decode_into(exact)
        exact.view(-1)[code.escaped_weights()[0]] = code.escaped_weights()[1]
        assert torch.equal(code.decode(), exact)
        planes = [plane.float() for plane in (code.i, code.j)]
        for plane, true in zip(planes, (code.escapes.i, code.escapes.j), strict=True):
            plane.view(-1)[code.escapes.pair] = true.float()
        again = lattice._gather((37, columns), weight.device, 0.77, lambda r, _c, p: (planes[0][r, p], planes[1][r, p]))
        assert len(code.escapes) > 0
        assert again.equals(code)
    finally:
        library.birkhoff_native_vectors(1)


@pytest.fixture(params=["vectors", "base"])
def coder(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native library, by vectors and without."""
    library = native()
    if library is None:
        pytest.skip("the native library is not built here")
    library.birkhoff_native_vectors(int(request.param == "vectors"))
    yield
    library.birkhoff_native_vectors(1)


def reference_path(weight: torch.Tensor, step: float, path: int) -> lattice.LatticeTensor:
    """`quantise_path` in torch."""
    i, j = (plane.contiguous() * reciprocal(step) for plane in split(weight))
    lanes = trellis.lanes_of(*i.shape, path)
    trellis.reference_search_(j.view(-1), lanes)
    trellis.reference_search_(i.sub_(j, alpha=1 / 256).view(-1), lanes)
    return lattice._gather(tuple(weight.shape), weight.device, step, lambda r, _c, p: (i[r, p], j[r, p]))


@pytest.mark.parametrize("path", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (200, 320), (1, 1), (131, 1000), (40, 4096), (700, 33)])
@pytest.mark.parametrize("step", [1.0, 0.011])
def test_native_paths_are_those_of_the_reference(coder: None, shape: tuple[int, int], path: int, step: float) -> None:
    weight = normal(shape, path) * 3
    weight.view(-1)[::97] *= 40
    found = lattice.quantise_path(weight, step, path)
    assert found.equals(reference_path(weight, step, path))
    assert step == 1.0 or len(found.escapes) > 0 or weight.numel() < 4


def reference_nodes(value: torch.Tensor, step: float) -> lattice.LatticeTensor:
    """`quantise` in torch."""
    x, y = (plane.contiguous() for plane in split(value))
    i, j = nearest(x, y, step)
    return lattice._gather(tuple(value.shape), value.device, step, lambda r, _c, p: (i[r, p], j[r, p]))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (200, 320), (1, 1), (131, 1000), (40, 4096), (700, 33)])
@pytest.mark.parametrize("step", [1.0, 0.011])
def test_native_nodes_are_those_of_the_reference(coder: None, shape: tuple[int, int], step: float) -> None:
    weight, less = normal(shape, 1) * 3, normal(shape, 2)
    weight.view(-1)[::97] *= 40
    weight.view(-1)[::5] = torch.round(weight.view(-1)[::5]) + 0.5  # halves, which round to even
    assert lattice.quantise(weight, step).equals(reference_nodes(weight, step))
    rest = weight - less
    assert lattice.quantise(weight, step, less_RK=less).equals(reference_nodes(rest, step))
    dead = 0.3 * step
    rest.sub_(rest.clamp(-dead, dead))
    assert lattice.quantise(weight, step, less_RK=less, dead=dead).equals(reference_nodes(rest, step))


@pytest.mark.parametrize("farthest", [1e6, 3e6, 1e9])
def test_nodes_are_those_of_the_reference_however_far_weights_lie(coder: None, farthest: float) -> None:
    weight = normal((33, 130))
    weight[3, 5], weight[4, 127] = farthest, -farthest
    assert lattice.quantise(weight, 1.0).equals(reference_nodes(weight, 1.0))


def test_other_types_and_views_are_quantised_as_what_they_hold(coder: None) -> None:
    weight, less = normal((40, 140)), normal((40, 140), 1)
    for other in (weight.T.contiguous().T, weight.double()):
        assert lattice.quantise(other, 0.1, less_RK=less, dead=0.02).equals(
            lattice.quantise(weight, 0.1, less_RK=less, dead=0.02)
        )


def test_more_escapes_than_expected_are_all_found(coder: None) -> None:
    weight = normal((300, 400)) * 1000
    assert len(lattice.quantise_path(weight, 1.0).escapes) > lattice._ROOM
    assert lattice.quantise_path(weight, 1.0).equals(reference_path(weight, 1.0, 1))


def test_weights_too_many_steps_long_have_no_path() -> None:
    weight = normal((8, 64))
    weight[3, 3] = -5e6
    with pytest.raises(TargetError, match=r"5e\+06 steps long"):
        lattice.quantise_path(weight, 1.0)
    assert rate.error_of_nodes(weight, 1.0, 5e6) == compare(weight, lattice.quantise(weight, 1.0).decode()).error


@pytest.mark.parametrize("shape", [*SHAPES, (9, 1024), (3, 1100), (2, 2049), (5, 1151)])
def test_native_errors_are_those_of_what_is_decoded(coder: None, shape: tuple[int, int]) -> None:
    weight = normal(shape) * 2
    weight.view(-1)[::61] *= 300
    greatest = float(weight.abs().max())
    for step in (0.7, 0.03):
        nodes = lattice.quantise(weight, step)
        assert rate.error_of_nodes(weight, step, greatest) == compare(weight, nodes.decode()).error
        for code in (nodes, lattice.quantise_path(weight, step)):
            assert rate.errors(weight, code).fidelity(0.0) == replace(compare(weight, code.decode()), energy=0.0)
            assert step > 0.5 or len(code.escapes) > 0


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 131, 320])
def test_native_step_numbers_are_those_of_the_reference(coder: None, columns: int) -> None:
    code = lattice.quantise(normal((37, columns)) * 60, 0.77)
    theta = code.theta()
    assert torch.equal(theta.int(), trajectory._stacked(code.i, code.j).int())
    step = torch.tensor(code.step)
    found, wanted = (run(theta, step, columns, torch.float32) for run in (reference.decode, reference.decode_planes))
    assert torch.equal(found, wanted)
