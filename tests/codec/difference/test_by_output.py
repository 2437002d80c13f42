"""Differences under a nominal target, errors fed back through a Hessian."""

import pytest
import torch
from torch import Tensor

from birkhoff.codec.container import CodedTensor, DifferenceParams, parse, serialise, with_bases
from birkhoff.codec.difference.encode import Base, encode
from birkhoff.codec.difference.sizes import sizes
from birkhoff.codec.output import encode as output
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import decode_tensor, lattice_of

ROWS, COLUMNS = 96, 128


def nominal(target_db: float, *, path: bool = True) -> Decision:
    return Decision(codec="lattice", target_db=target_db, path=path, states_target=False, nominal=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(seed: int = 0) -> Hessian:
    """Of inputs and gradients that lie near planes of a third as many dimensions, and a little elsewhere."""
    few = noise(4 * COLUMNS, COLUMNS // 3) @ noise(COLUMNS // 3, COLUMNS, seed=2)
    inputs = few * torch.logspace(0, -1, COLUMNS) + 0.3 * noise(4 * COLUMNS, COLUMNS, seed=3)
    inputs += 0.01 * noise(4 * COLUMNS, COLUMNS, seed=seed)
    gradients = noise(4 * ROWS, ROWS // 3, seed=4) @ noise(ROWS // 3, ROWS, seed=5) + noise(4 * ROWS, ROWS, seed=6)
    return Hessian(columns=inputs.T @ inputs / len(inputs), rows=gradients.T @ gradients / len(gradients))


def loss(weight: Tensor, coded: CodedTensor, felt: Hessian) -> float:
    error = decode_tensor(coded) - weight
    assert felt.rows is not None
    return float(((felt.rows @ error @ felt.columns) * error).sum())


def derived(
    apart_db: float, target_db: float, *, path: bool, felt: Hessian | None, base_db: float = 30.0
) -> tuple[Tensor, CodedTensor, CodedTensor]:
    """Weights, their direct form, and what was made with a base that its own Hessian coded."""
    source = noise(ROWS, COLUMNS) * torch.logspace(-0.5, 0, COLUMNS)
    weight = source + noise(ROWS, COLUMNS, seed=1) * source.std() * 10 ** (-apart_db / 20)
    held = output.encode("w", source, base_db, None if felt is None else hessian(7), path=path).tensor
    direct = output.encode("w", weight, target_db, felt, path=path).tensor
    made = encode("w", weight, nominal(target_db, path=path), Base(container="ab" * 32, tensor=held), felt).tensor
    (made,) = with_bases(parse(serialise([made])), lambda _: {"w": held})
    return weight, direct, made


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize(("apart_db", "target_db", "share"), [
    (45, 30.0, 0.5), (30, 30.1, 0.5), (30, 28.7, 0.55), (20, 30.0, 0.75),
])  # fmt: skip
def test_the_outputs_error_is_at_most_that_of_the_direct_form_for_fewer_bytes(
    apart_db: float, target_db: float, share: float, path: bool
) -> None:
    felt = hessian()
    weight, direct, made = derived(apart_db, target_db, path=path, felt=felt)
    assert made.codec == "difference"
    assert made.nbytes < share * direct.nbytes
    assert loss(weight, made, felt) < 1.1 * loss(weight, direct, felt)
    assert output.is_no_worse(weight, lattice_of(made), target_db, felt, path=path)
    assert isinstance(made.params, DifferenceParams)
    longest = output.stored_step(weight, target_db, path=made.params.path, columns=made.params.columns)
    assert made.params.stride * made.params.step <= longest * (1 + 1e-6)


@pytest.mark.parametrize("path", [True, False])
def test_without_a_hessian_every_output_counts_alike(path: bool) -> None:
    weight, direct, made = derived(35, 30.0, path=path, felt=None)
    assert made.codec == "difference"
    assert made.nbytes < 0.5 * direct.nbytes
    assert output.is_no_worse(weight, lattice_of(made), 30.0, None, path=path)


@pytest.mark.parametrize("felt", [None, hessian()])
@pytest.mark.parametrize(("apart_db", "target_db"), [(-6, 30.0), (3, 30.0), (30, 14.0)])
def test_what_is_no_nearer_takes_no_more_than_its_direct_form(
    apart_db: float, target_db: float, felt: Hessian | None
) -> None:
    _, direct, made = derived(apart_db, target_db, path=True, felt=felt)
    assert made.nbytes <= direct.nbytes


def test_what_is_a_number_of_16_bits_has_no_difference() -> None:
    weight = noise(32, 1, 9, 9)
    held = output.encode("w", weight, 55.0, None).tensor
    made = encode("w", weight, nominal(55.0), Base(container="ab" * 32, tensor=held)).tensor
    assert made.codec == "lattice"


def test_it_is_estimated_too() -> None:
    weight, _, made = derived(35, 30.0, path=False, felt=None)
    source = noise(ROWS, COLUMNS) * torch.logspace(-0.5, 0, COLUMNS)
    held = output.encode("w", source, 30.0, None, path=False).tensor
    with_base, alone = (sizes("w", weight, nominal(30.0, path=False), [30.0], base)[0] for base in (held, None))
    assert with_base < 0.5 * alone
    assert with_base == pytest.approx(made.nbytes + 40, rel=0.15)
