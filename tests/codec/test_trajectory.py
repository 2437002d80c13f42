import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.trajectory import (
    coordinates_from_theta,
    nearest,
    position,
    theta_from_coordinates,
)

STEP = 0.037


def brute_force(x: torch.Tensor, y: torch.Tensor, step: float) -> torch.Tensor:
    """Least squared distance in steps to any node with coordinates -12..12, in float64."""
    i, j = torch.meshgrid(torch.arange(-12, 13), torch.arange(-12, 13), indexing="ij")
    node_x, node_y = (i + j / 256).double().flatten(), j.double().flatten()
    u, v = x.double() / step, y.double() / step
    return ((u[:, None] - node_x).square() + (v[:, None] - node_y).square()).amin(1)


def test_worked_example_of_the_module() -> None:
    i, j = nearest(torch.tensor([1.2]), torch.tensor([-0.8]), 0.5)
    assert (i.item(), j.item()) == (2, -2)
    assert theta_from_coordinates(i.to(torch.int8), j.to(torch.int8)).item() == 33406
    x, y = position(i, j, 0.5)
    assert (x.item(), y.item()) == (0.99609375, -1.0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_nearest_is_no_farther_than_brute_force(seed: int) -> None:
    x, y = (torch.rand(2, 500, generator=torch.Generator().manual_seed(seed)) - 0.5) * 20 * STEP
    i, j = nearest(x, y, STEP)
    node_x, node_y = (i + j / 256).double(), j.double()
    found = (x.double() / STEP - node_x).square() + (y.double() / STEP - node_y).square()
    # float32 decides between candidates that lie within its rounding of each other.
    assert (found - brute_force(x, y, STEP)).max() < 1e-5


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.5, 0.5), (-0.5, 0.5), (0.0, 1.0), (-1e-8, 1e-8)])
def test_nearest_at_ties_and_edges(pair: tuple[float, float]) -> None:
    x, y = torch.tensor([pair[0] * STEP]), torch.tensor([pair[1] * STEP])
    i, j = nearest(x, y, STEP)
    found = (pair[0] - (i + j / 256).double()).square() + (pair[1] - j.double()).square()
    assert float(found - brute_force(x, y, STEP)) < 1e-5


def test_zero_stays_zero() -> None:
    x, y = position(*nearest(torch.zeros(3), torch.zeros(3), STEP), STEP)
    assert not x.any()
    assert not y.any()


def test_theta_is_a_bijection_onto_the_box() -> None:
    theta = torch.arange(65536).to(torch.uint16)
    i, j = coordinates_from_theta(theta)
    assert torch.equal(theta_from_coordinates(i, j).int(), theta.int())
    # the paper's step number: row by row, n columns each
    assert torch.equal((i.int() + 128) * 256 + j.int() + 128, theta.int())


def test_steps_follow_the_published_trajectory() -> None:
    theta = torch.arange(65536)
    x, y = position(*coordinates_from_theta(theta.to(torch.uint16)), 1.0)
    side, n = 256.0, 256
    along, across = side * theta / n**2, (side * theta / n) % side
    # the box is moved so that step 0x8080 is the origin
    assert torch.allclose(x, along - along[0x8080])
    assert torch.allclose(y, across - across[0x8080])
