"""Matrices as differences to the decoded matrix of another version."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from birkhoff.codec import rate
from birkhoff.codec.container import (
    DIFFERENCE_VERSION,
    CodedTensor,
    DifferenceParams,
    bases_of,
    is_difference,
    parse,
    serialise,
    with_bases,
)
from birkhoff.codec.difference.encode import Base, encode
from birkhoff.codec.difference.find import estimates, find
from birkhoff.codec.difference.sizes import sizes
from birkhoff.codec.errors import BaseError, FormatError
from birkhoff.codec.lattice import LatticeTensor, combine
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import decode_tensor, encode_tensor, is_matrix, lattice_of, recode
from birkhoff.codec.trajectory import Escapes
from tests.codec import page_reader

FIXTURES = Path(__file__).parents[1] / "fixtures"
DIGEST = "ab" * 32


def decided(target_db: float | None = 30.0, *, path: bool = True) -> Decision:
    return Decision(codec="lattice", target_db=target_db, path=path)


def noise(*shape: int, seed: int = 0, size: float = 0.05) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def pair(
    apart_db: float, shape: tuple[int, ...] = (96, 192), *, target_db: float = 30.0, path: bool = True
) -> tuple[Tensor, CodedTensor, Base]:
    """Weights so far below which they differ from a base's source, their direct form, and the base."""
    source = noise(*shape)
    weight = source + noise(*shape, seed=1) * 10 ** (-apart_db / 20)
    stored = encode_tensor("w", source, decided(target_db, path=path)).tensor
    direct = encode_tensor("w", weight, decided(target_db, path=path)).tensor
    return weight, direct, Base(container=DIGEST, tensor=stored)


def reread(coded: CodedTensor, base: Base) -> CodedTensor:
    """A tensor from the bytes of a container, with its base."""
    (found,) = with_bases(parse(serialise([coded])), lambda _: {"w": base.tensor})
    return found


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize(("target_db", "apart_db", "share"), [
    (30.0, 70, 0.06), (30.0, 40, 0.28), (30.0, 30, 0.27), (30.0, 20, 0.45), (24.0, 30, 0.27), (36.0, 30, 0.30),
    (44.0, 40, 0.30),
])  # fmt: skip
def test_a_near_tensor_takes_a_share_of_its_direct_form_for_the_same_target(
    target_db: float, apart_db: float, share: float, path: bool
) -> None:
    weight, direct, base = pair(apart_db, target_db=target_db, path=path)
    coded = encode("w", weight, decided(target_db, path=path), base).tensor
    assert coded.codec == "difference"
    assert coded.nbytes < share * direct.nbytes
    found = fidelity(weight, decode_tensor(reread(coded, base)))
    assert target_db <= found.sqnr_db
    assert coded.claims.sqnr_db == pytest.approx(found.sqnr_db, abs=1e-3)
    assert coded.claims.max_abs == pytest.approx(found.max_abs, rel=1e-3)


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("apart_db", [60, 45, 30, 20])
def test_a_small_move_is_kept_on_average_though_less_than_the_error_is_asked_for(apart_db: float, path: bool) -> None:
    """Least bits for the error would give the base back; rounding for itself does not (see `find`)."""
    source, move = noise(512, 512), noise(512, 512, seed=1) * 10 ** (-apart_db / 20)
    base = Base(container=DIGEST, tensor=encode_tensor("w", source, decided(path=path)).tensor)
    coded = reread(encode("w", source + move, decided(path=path), base).tensor, base)
    assert coded.codec == "difference"
    error = decode_tensor(coded) - (source + move)
    lost = -float((error * move).sum() / move.square().sum())
    chance = float(error.norm() / move.norm()) / 512  # of an error without any direction
    assert lost < 0.07 + 3 * chance


@pytest.mark.parametrize("apart_db", [-10, 0, 3])
def test_a_tensor_that_is_far_off_takes_no_more_than_its_direct_form(apart_db: float) -> None:
    weight, direct, base = pair(apart_db)
    coded = encode("w", weight, decided(), base).tensor
    assert coded.nbytes <= direct.nbytes
    if coded.codec == "lattice":
        assert serialise([coded]) == serialise([direct])


def test_a_tensor_equal_to_its_base_takes_a_few_bytes_and_is_as_the_base_is_decoded() -> None:
    source = noise(96, 192)
    base = Base(container=DIGEST, tensor=encode_tensor("w", source, decided()).tensor)
    coded = reread(encode("w", source, decided(), base).tensor, base)
    assert coded.nbytes < 40
    assert fidelity(decode_tensor(base.tensor), decode_tensor(coded)).sqnr_db > 100


def test_encoding_is_deterministic() -> None:
    weight, _, base = pair(25)
    first, second = (serialise([encode("w", weight, decided(), base).tensor]) for _ in range(2))
    assert first == second


def test_other_names_shapes_rows_and_codecs_are_coded_directly() -> None:
    weight, direct, base = pair(30)
    for other in (
        replace(base, tensor=replace(base.tensor, name="v")),
        replace(base, tensor=encode_tensor("w", noise(192, 96), decided()).tensor),
        replace(base, tensor=encode_tensor("w", noise(96, 192), Decision(codec="planes")).tensor),
        replace(base, tensor=encode_tensor("w", noise(96, 192), Decision(codec="paper")).tensor),
        replace(base, tensor=encode("w", weight, decided(), base).tensor),  # no chains
    ):
        assert serialise([encode("w", weight, decided(), other).tensor]) == serialise([direct])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_base_may_have_another_type(dtype: torch.dtype) -> None:
    weight, _, base = pair(30)
    coded = reread(encode("w", weight.to(dtype), decided(), base).tensor, base)
    decoded = decode_tensor(coded)
    assert (coded.codec, decoded.dtype) == ("difference", dtype)
    assert fidelity(weight.to(dtype), decoded).sqnr_db >= 30


def test_convolutions_and_small_tensors() -> None:
    for shape in ((32, 16, 3, 3), (40, 1, 5, 5), (9, 7)):
        weight, direct, base = pair(35, shape)
        coded = encode("w", weight, decided(), base).tensor
        assert coded.nbytes <= direct.nbytes
        assert fidelity(weight, decode_tensor(reread(coded, base))).sqnr_db >= 30


def test_weights_that_go_far_from_their_base_are_escapes() -> None:
    weight, _, base = pair(30)
    weight[3, 5], weight[90, 100] = 40.0, -3.0
    coded = reread(encode("w", weight, decided(), base).tensor, base)
    assert coded.codec == "difference"
    assert len(lattice_of(coded).escapes)
    assert abs(float(decode_tensor(coded)[3, 5]) - 40.0) < 0.1
    assert fidelity(weight, decode_tensor(coded)).sqnr_db >= 30


def test_what_cannot_be_coded_is_lossless_with_a_base_too() -> None:
    _, _, base = pair(30)
    for weight, reason in ((torch.ones(96, 192), "constant"), (torch.arange(96 * 192.0).view(96, 192), "integers")):
        coded = encode("w", weight, decided(), base).tensor
        assert (coded.lossless, coded.claims.reason) == (True, reason)


def test_the_published_codecs_error_is_a_target_like_any_other() -> None:
    weight, _, base = pair(40, target_db=42.0)
    coded = encode("w", weight, decided(None), base).tensor
    assert coded.codec == "difference"
    assert coded.claims.target_db is not None
    assert fidelity(weight, decode_tensor(coded)).sqnr_db >= coded.claims.target_db


def test_what_is_in_memory_is_an_ordinary_matrix() -> None:
    weight, _, base = pair(30)
    coded = reread(encode("w", weight, decided(), base).tensor, base)
    code = lattice_of(coded)
    assert is_matrix(coded)
    assert (code.i.dtype, code.j.dtype, code.i.shape) == (torch.int8, torch.int8, (96, 96))
    assert torch.equal(code.decode(), decode_tensor(coded))
    assert len(code.escapes) <= code.i.numel() / 40


def coordinates(code: LatticeTensor) -> tuple[list[int], list[int]]:
    planes = []
    for plane, wide in ((code.i, code.escapes.i), (code.j, code.escapes.j)):
        full = plane.reshape(-1).to(torch.int64)
        full[code.escapes.pair] = wide.to(torch.int64)
        planes.append(full.tolist())
    return planes[0], planes[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 15), st.integers(1, 127), st.integers(0, 6))
def test_sums_are_exact_whatever_is_an_escape(seed: int, times: int, stride: int, most: int) -> None:
    random = np.random.default_rng(seed)

    def matrix() -> LatticeTensor:
        i, j = (torch.from_numpy(random.integers(-128, 128, (3, 8), dtype=np.int8)) for _ in range(2))
        places = torch.from_numpy(np.sort(random.choice(24, random.integers(0, most + 1), replace=False)))
        i.view(-1)[places] = 0
        j.view(-1)[places] = 0
        wide = [torch.from_numpy(random.integers(-100000, 100000, len(places), dtype=np.int32)) for _ in range(2)]
        escapes = Escapes(pair=places, i=wide[0], j=wide[1])
        return LatticeTensor(i=i, j=j, escapes=escapes, step=0.5, columns=16)

    base, code = matrix(), matrix()
    found = combine(base, code, times=times, stride=stride, step=0.25)
    for got, b, d in zip(coordinates(found), coordinates(base), coordinates(code), strict=True):
        assert got == [times * p + stride * q for p, q in zip(b, d, strict=True)]
    escaped = set(found.escapes.pair.tolist())
    for place, (i, j) in enumerate(zip(*coordinates(found), strict=True)):
        assert (place in escaped) == (not (-128 <= i <= 127 and -128 <= j <= 127))
    assert found.escapes.pair.tolist() == sorted(escaped)
    assert not found.i.reshape(-1)[found.escapes.pair].any()
    assert (found.step, found.columns) == (0.25, 16)


def test_a_sum_that_leaves_32_bits_is_refused() -> None:
    zeros = torch.zeros(1, 4, dtype=torch.int8)
    most = torch.tensor([2**31 - 1], dtype=torch.int32)
    far = Escapes(pair=torch.tensor([2]), i=most, j=0 * most)
    matrix = LatticeTensor(i=zeros, j=zeros, escapes=far, step=1.0, columns=8)
    with pytest.raises(FormatError, match="exceeds 32 bits"):
        combine(matrix, matrix, times=1, stride=1, step=1.0)


def test_an_estimate_tells_about_what_both_forms_take() -> None:
    for apart_db in (40, 25, 15):
        weight, direct, base = pair(apart_db, (256, 512))
        coded = encode("w", weight, decided(), base).tensor
        ((by_difference, by_itself),) = estimates(weight, lattice_of(base.tensor), [30.0], path=True)
        assert by_difference == pytest.approx(8 * coded.nbytes / weight.numel(), abs=0.15)
        assert by_itself == pytest.approx(8 * direct.nbytes / weight.numel(), abs=0.15)


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("base_path", [True, False])
def test_every_target_up_to_the_bases_is_served_by_differences_and_estimated(path: bool, base_path: bool) -> None:
    """Plans are told from histograms: those of few values, or of wide bins, must not turn good ones away."""
    _, _, base = pair(34, path=base_path)
    weight = noise(96, 192) + noise(96, 192, seed=3) * 10 ** (-34 / 20)
    targets = [float(target) for target in range(8, 32, 2)]
    found = [encode("w", weight, decided(target, path=path), base).tensor for target in targets]
    assert {coded.codec for coded, target in zip(found, targets, strict=True) if target >= 20} == {"difference"}
    estimated = sizes("w", weight, decided(path=path), targets, base.tensor)
    for coded, size in zip(found, estimated, strict=True):
        assert size == pytest.approx(coded.nbytes + 40, rel=0.12)


def test_a_difference_alone_is_refused_by_name() -> None:
    weight, _, base = pair(30)
    (alone,) = parse(serialise([encode("w", weight, decided(), base).tensor]))
    for read in (decode_tensor, lattice_of):
        with pytest.raises(BaseError, match=rf"^tensor 'w' is a difference to the one in container {DIGEST}"):
            read(alone)
    assert bases_of([alone]) == (DIGEST,)


@pytest.mark.parametrize(("held", "what"), [
    ({}, "holds no tensor of that name"),
    ({"w": encode_tensor("w", noise(192, 96), decided()).tensor}, r"is lattice \[192, 96\], expected lattice \[96, "),
    ({"w": encode_tensor("w", noise(96, 192), Decision(codec="planes")).tensor}, "is (planes|raw)"),
])  # fmt: skip
def test_a_base_that_does_not_fit_is_refused_by_name(held: dict[str, CodedTensor], what: str) -> None:
    weight, _, base = pair(30)
    found = parse(serialise([encode("w", weight, decided(), base).tensor]))
    with pytest.raises(BaseError, match=rf"^tensor 'w': its base.*{DIGEST}.*{what}"):
        with_bases(found, lambda _: held)


def test_a_chain_of_differences_is_refused() -> None:
    weight, _, base = pair(30)
    found = encode("w", weight, decided(), base).tensor
    with pytest.raises(BaseError, match="is difference"):
        with_bases(parse(serialise([found])), lambda _: {"w": found})


def test_version_3_is_written_for_differences_alone_and_version_2_refuses_them() -> None:
    weight, direct, base = pair(30)
    blob = serialise([encode("w", weight, decided(), base).tensor])
    assert b'"__birkhoff__":"3"' in blob
    assert b'"__birkhoff__":"2"' in serialise([direct])
    older = blob.replace(b'"__birkhoff__":"3"', b'"__birkhoff__":"2"')
    with pytest.raises(FormatError, match="tensor 'w': unknown codec 'difference'; known: lattice, raw"):
        parse(older)
    newer = serialise([direct]).replace(b'"__birkhoff__":"2"', b'"__birkhoff__":"3"')
    assert parse(newer) == parse(serialise([direct]))


def test_recoding_leaves_a_difference_as_it_is() -> None:
    weight, _, base = pair(30)
    coded = encode("w", weight, decided(), base).tensor
    assert recode(coded) is coded


def test_the_fixture_is_read_by_ours_and_by_the_pages_reader() -> None:
    base = (FIXTURES / "v2.safetensors").read_bytes()
    digest, held = hashlib.sha256(base).hexdigest(), {coded.name: coded for coded in parse(base)}
    blob = (FIXTURES / f"v{DIFFERENCE_VERSION}.safetensors").read_bytes()
    wanted = np.load(FIXTURES / f"v{DIFFERENCE_VERSION}.npz")
    found = with_bases(parse(blob), {digest: held}.__getitem__)
    params = [coded.params for coded in found if isinstance(coded.params, DifferenceParams)]
    assert {p.path for p in params} == {0, 1}
    assert {(p.times > 1, p.stride > 1) for p in params} >= {(False, False), (False, True), (True, True)}
    assert any(p.escapes for p in params)
    assert max(len(coded.parts) for coded in found) > 6
    assert not all(map(is_difference, found))
    assert {coded.name for coded in found} == set(wanted.files)
    theirs = page_reader.read(blob, {digest: base})
    for coded in found:
        ours = decode_tensor(coded).numpy()
        assert (ours.dtype, ours.shape) == (wanted[coded.name].dtype, wanted[coded.name].shape)
        np.testing.assert_array_equal(ours, wanted[coded.name])
        np.testing.assert_array_equal(theirs[coded.name], wanted[coded.name])


def test_the_worked_example() -> None:
    i, none = torch.tensor([[3, -1]], dtype=torch.int8), Escapes.none()
    base = LatticeTensor(i=i, j=torch.zeros_like(i), escapes=none, step=0.5, columns=4)
    code = replace(base, i=torch.tensor([[1, 0]], dtype=torch.int8), step=0.75)
    found = combine(base, code, times=2, stride=3, step=0.25)
    assert found.i.tolist() == [[9, -2]]
    assert found.decode().tolist() == [[2.25, -0.5, 0.0, 0.0]]


def test_a_target_out_of_range_is_refused() -> None:
    weight, _, base = pair(30)
    with pytest.raises(rate.TargetError):
        find(weight, lattice_of(base.tensor), 60.0, path=True)
    assert not math.isnan(estimates(weight, lattice_of(base.tensor), [30.0], path=False)[0][0])
