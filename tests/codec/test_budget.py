"""Foretold sizes against the encoder's, and the grid of targets that a budget chooses from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from birkhoff.codec import budget
from birkhoff.codec.profiles import PROFILES, Decision, Override, Profile
from birkhoff.pipeline.plan.grid import GRID_DB, Floats, Grid, highest
from tests.codec.by_profile import decision, encode_tensor

BALANCED, FAST = (replace(PROFILES[name], allocation="uniform") for name in ("balanced", "fast"))
BY_SIZE = replace(BALANCED, allocation="size")


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def scaled() -> torch.Tensor:
    """Rows and columns of different scale: context groups pay."""
    rows = torch.logspace(-1, 0, 512)[:, None]
    return normal((512, 768)) * rows * torch.logspace(0, -0.7, 768)[torch.randperm(768)]


WEIGHTS = {
    "matrix": normal((384, 512)),
    "scaled": scaled(),
    "conv": normal((64, 64, 3, 3)),
    "one row": normal((1, 60000)),
    "tailed": normal((256, 256)).sign() * normal((256, 256)).abs() ** 1.6,
    "outlier": torch.where(torch.arange(512) == 77, 100.0, normal((256, 512))),
    "half": normal((256, 512)).half(),
    "odd": normal((301, 77)),
}


def sizes(name: str, tensor: torch.Tensor, profile: Profile, override: Override | None = None) -> Floats:
    """Bytes at every knot of a profile's grid."""
    trials = [decision(tensor, replace(profile, target_db=knot), override) for knot in Grid.of(profile).knots]
    return budget.sizes(name, tensor, trials[0], [trial.target_db or 0.0 for trial in trials])


def estimated(tensor: torch.Tensor, profile: Profile, target_db: float) -> float:
    return float(np.interp(target_db, Grid.of(profile).knots, sizes("w", tensor, profile)))


def stored(tensor: torch.Tensor, profile: Profile, target_db: float) -> int:
    return encode_tensor("w", tensor, replace(profile, target_db=target_db)).tensor.nbytes


@pytest.mark.parametrize("profile", [BALANCED, FAST], ids=lambda profile: profile.name)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_estimated_sizes_lie_near_the_encoders(kind: str, profile: Profile) -> None:
    for target_db in (24.0, 30.0, 36.0):
        assert estimated(WEIGHTS[kind], profile, target_db) == pytest.approx(
            stored(WEIGHTS[kind], profile, target_db) + 15, rel=0.02
        )


def test_sizes_rise_with_the_target_and_have_one_for_each_knot() -> None:
    for profile in (BALANCED, BY_SIZE):
        found = sizes("w", WEIGHTS["matrix"], profile)
        assert found.shape == (len(Grid.of(profile).knots),)
        assert (np.diff(found) >= -2).all()
        assert found[-1] > 2 * found[0]


LOSSLESS = {
    "vector": normal((3000,)),
    "tiny": normal((8, 8)),
    "integers": torch.arange(5000).view(50, 100),
    "constant": torch.full((64, 64), 0.5),
    "empty": torch.empty(0, 7),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_tensors_are_measured(kind: str) -> None:
    found = sizes("w", LOSSLESS[kind], BALANCED)
    assert (found == found[0]).all()
    assert found[0] == pytest.approx(encode_tensor("w", LOSSLESS[kind], BALANCED).tensor.nbytes, abs=20)


def test_an_override_fixes_the_size() -> None:
    for override in (36.0, "lossless"):
        found = sizes("w", WEIGHTS["matrix"], BALANCED, override)  # type: ignore[arg-type]
        assert (found == found[0]).all()
    whole = sizes("w", WEIGHTS["matrix"], BALANCED)
    assert sizes("w", WEIGHTS["matrix"], BALANCED, 36.0)[0] == pytest.approx(whole[30])
    assert sizes("w", WEIGHTS["matrix"], BALANCED, "lossless")[0] > whole[-1]


def test_allocation_by_size_gives_small_tensors_more_and_stays_in_range() -> None:
    shapes = [(32, 32), (256, 256), (1024, 1024), (4096, 4096)]
    targets = [replace(BY_SIZE, target_db=30.0).decide(shape, "float32").target_db for shape in shapes]
    assert targets == [48.0, 39.03, 30.0, 20.97]
    low, high = BY_SIZE.target_range
    assert replace(BY_SIZE, target_db=low).decide((32, 32), "float32").target_db == 6.0
    assert replace(BY_SIZE, target_db=high).decide((8192, 8192), "float32").target_db == 48.0
    assert replace(BY_SIZE, target_db=30.0).decide((256, 256), "float32").states_target
    coded = encode_tensor("w", normal((256, 256)), replace(BY_SIZE, target_db=24.0))
    assert coded.tensor.claims.target_db == 33.03
    assert 33.03 <= coded.fidelity.sqnr_db <= 33.33  # type: ignore[union-attr]


def test_recipes_without_allocation_or_override_are_as_before() -> None:
    assert BALANCED.decide((64, 64), "float32") == Decision(codec="lattice", target_db=30.0, path=True)
    uniform = replace(BALANCED, allocation="uniform")
    assert "allocation" not in uniform.recipe()
    assert BY_SIZE.recipe() == {**uniform.recipe(), "allocation": "size"}


def test_the_grid_holds_every_target_once() -> None:
    grid = Grid.of(BALANCED)
    assert (grid.target(0), grid.target(1), grid.target(grid.step(48.0))) == (6.0, 6.0 + GRID_DB, 48.0)
    assert [grid.step(grid.target(step)) for step in range(841)] == list(range(841))
    filled = grid.fill(np.array(grid.knots) ** 2)
    assert len(filled) == 841
    assert filled[grid.step(30.0)] == 900


def test_the_highest_step_that_fits() -> None:
    rising = np.array([5.0, 5.0, 7.0, 9.0, 9.0])
    assert [highest(rising, limit) for limit in (4.9, 5.0, 6.0, 7.0, 8.0, 9.0, 1e9)] == [None, 0, 0, 2, 2, 3, 3]
