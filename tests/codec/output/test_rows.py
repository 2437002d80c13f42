"""Feedback between rows: the native search is the reference's, and errors of rows cancel."""

import pytest
import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.container import parse, serialise, with_bases
from birkhoff.codec.difference.encode import Base
from birkhoff.codec.difference.encode import encode as by_difference
from birkhoff.codec.errors import TensorError
from birkhoff.codec.native import library
from birkhoff.codec.output import feedback, rows
from birkhoff.codec.output.encode import encode, is_no_worse, left
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.pairs import matrix_shape
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import lattice_of


def near_a_plane(size: int, seed: int) -> Tensor:
    """The Hessian of vectors that lie near a plane of a third as many dimensions."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(4 * size, size // 3 + 1, generator=g) @ torch.randn(size // 3 + 1, size, generator=g)
    vectors = few + 0.5 * torch.randn(4 * size, size, generator=g)
    return vectors.T @ vectors / (4 * size)


def layer(height: int = 96, width: int = 70) -> tuple[Tensor, Hessian]:
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    return weight, Hessian(columns=near_a_plane(width, 1), rows=near_a_plane(height, 2))


def rounded(u: Tensor, factor: rows.RowFactor) -> Tensor:
    out = torch.empty_like(u)
    rows.round_rows_(u.clone(), out, factor, rows.scratch_of(factor))
    return out


def test_the_worked_example() -> None:
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    factor = rows.factorise(hessian, damping=0.0)
    torch.testing.assert_close(factor.upper, torch.tensor([[2.2942, -2.0647], [0.0, 1.0]]), rtol=0, atol=1e-3)
    n = rounded(torch.tensor([0.4, 0.4]), factor)
    assert n.tolist() == [0.0, 1.0]
    lost = torch.tensor([0.4, 0.4]) - n
    assert float(lost @ hessian @ lost) == pytest.approx(0.088, abs=1e-4)


@pytest.mark.parametrize("vectors", [0, 1])
@pytest.mark.parametrize(("size", "lanes"), [(1, 0), (7, 0), (97, 0), (1, 1), (33, 1), (130, 3), (65, 2), (5, 5)])
def test_native_rows_are_the_references(size: int, lanes: int, vectors: int) -> None:
    native = library.native()
    if native is None:
        pytest.skip("no native library")
    factor = rows.factorise(near_a_plane(size, 3), lanes)
    u = 3 * torch.randn(size, generator=torch.Generator().manual_seed(4))
    expected = torch.empty_like(u)
    rows.reference_round_rows_(u.clone(), expected, factor)
    native.birkhoff_native_vectors(vectors)
    try:
        assert torch.equal(rounded(u, factor), expected)
    finally:
        native.birkhoff_native_vectors(1)


def test_without_the_native_library_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(65, 34)
    wanted = encode("w", weight, 12.0, hessian).tensor
    monkeypatch.setattr(rows, "native", lambda: None)
    assert serialise([encode("w", weight, 12.0, hessian).tensor]) == serialise([wanted])


def test_native_rows_refuse_lanes_that_are_not_all_rows() -> None:
    factor = rows.factorise(torch.eye(9), lanes=2)
    factor.steps[0] += 1
    with pytest.raises(AssertionError, match="not all rows"):
        rounded(torch.zeros(9), factor)


def test_a_path_in_rows_without_feedback_is_the_trellis_own() -> None:
    u = 3 * torch.randn(129, generator=torch.Generator().manual_seed(5))
    factor = rows.factorise(torch.eye(129), lanes=3)
    found = torch.empty_like(u).index_copy_(0, factor.order, rounded(u[factor.order], factor))
    own = trellis.search(u, 3)
    assert float((u - found).square().sum()) == pytest.approx(float((u - own).square().sum()), rel=1e-5)
    assert torch.equal(trellis.numbers(trellis.symbols(found).to(torch.int16), 3).float(), found)


@pytest.mark.parametrize("path", [False, True])
def test_errors_of_rows_cancel_where_their_hessian_says_so(path: bool) -> None:
    weight, hessian = layer(192, 70)
    assert hessian.rows is not None
    factor = feedback.factorise(hessian.columns)
    between = rows.factorise(hessian.rows, feedback.lanes_of(192, 70) if path else 0)
    alone = feedback.quantise(weight, 0.05, factor, path=path)
    fed = feedback.quantise(weight, 0.05, factor, between, path=path)
    ratio = hessian.error(weight, fed) / hessian.error(weight, alone)
    assert ratio < 0.75
    assert ratio == pytest.approx(rows.left(hessian.rows), rel=0.4)


@pytest.mark.parametrize(("target_db", "path"), [(2.0, True), (14.0, True), (30.0, True), (30.0, False), (50.0, True)])
@pytest.mark.parametrize("shape", [(96, 70), (70, 33), (40, 8, 3, 3), (130, 2)])
def test_a_tensors_error_is_lower_than_that_of_rounding(shape: tuple[int, ...], target_db: float, path: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    matrix = weight.reshape(matrix_shape(shape))
    hessian = Hessian(columns=near_a_plane(matrix.shape[1], 1), rows=near_a_plane(matrix.shape[0], 2))
    code = lattice_of(encode("w", weight, target_db, hessian, path=path).tensor)
    assert is_no_worse(weight, code, target_db, hessian, path=path)
    plain = lattice_of(encode("w", weight, target_db, None, path=path).tensor)
    assert hessian.error(matrix, code) < 0.9 * hessian.error(matrix, plain)


def test_bits_are_allotted_by_what_feedback_on_both_sides_leaves() -> None:
    _, hessian = layer()
    assert hessian.rows is not None
    alone = left(Hessian(columns=hessian.columns))
    assert left(hessian) == pytest.approx(alone * rows.left(hessian.rows) ** rows.SHARE)
    assert left(hessian) < alone


def test_rows_that_all_count_alike_change_nothing() -> None:
    weight, hessian = layer(64, 30)
    factor = feedback.factorise(hessian.columns)
    alone = feedback.quantise(weight, 0.05, factor)
    same = feedback.quantise(weight, 0.05, factor, rows.factorise(torch.eye(64)))
    assert torch.equal(alone.decode(), same.decode())


def test_hessians_of_rows_that_are_none_are_refused() -> None:
    for wrong in (torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.ones(4, 5), -torch.eye(4)):
        with pytest.raises(TensorError, match="Hessian"):
            rows.factorise(wrong)
    with pytest.raises(TensorError, match="not positive"):
        rows.factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("target_db", [8.0, 26.0])
def test_a_gpu_feeds_back_between_rows_too(target_db: float, based: bool) -> None:
    """Factors are the GPU's, and paths are decided early, so roundings flip; the outputs' error is about the same."""
    weight, hessian = layer(192, 70)
    assert hessian.rows is not None
    held = encode("w", weight + 0.01 * torch.randn_like(weight), 30.0, hessian).tensor
    base = Base(container="ab" * 32, tensor=held) if based else None
    decision = Decision(codec="lattice", target_db=target_db, nominal=True)
    there = Hessian(columns=hessian.columns.cuda(), rows=hessian.rows.cuda())
    losses = []
    for given, felt in ((weight, hessian), (weight.cuda(), there)):
        tensor = by_difference("w", given, decision, base, felt).tensor
        (coded,) = with_bases(parse(serialise([tensor])), lambda _: {"w": held})
        code = lattice_of(coded)
        assert is_no_worse(given, code.to(given.device), target_db, felt, path=True)
        losses.append(hessian.error(weight, code))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
