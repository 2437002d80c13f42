import math

import numpy as np
import pytest
import torch

from birkhoff.codec import budget, container
from birkhoff.codec.output.allocation import Felt, gains_db, root_mean_square, sizes, step
from birkhoff.codec.output.encode import encode
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.targets import targets_db
from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.plan.grid import highest


def test_worked_example_of_the_module() -> None:
    felt = {"a": Felt(weights=10, rms=0.1, sensitivity=100.0), "b": Felt(weights=10, rms=0.1, sensitivity=10.0)}
    targets = targets_db(gains_db(felt), 30.0)
    assert targets == {"a": 34.0, "b": 26.0}
    assert step(0.1, targets["a"]) == pytest.approx(0.0069118, rel=1e-4)


def test_steps_are_a_fifth_power_of_rms_and_two_fifths_of_sensitivity() -> None:
    felt = {
        "a": Felt(weights=1, rms=0.3, sensitivity=5.0),
        "b": Felt(weights=3, rms=0.02, sensitivity=700.0),
        "c": Felt(weights=9, rms=2.0, sensitivity=0.01),
    }
    targets = targets_db(gains_db(felt), 25.0)
    scale = {n: step(f.rms, targets[n]) / (f.rms**0.2 * f.sensitivity**-0.4) for n, f in felt.items()}
    assert all(math.isclose(value, scale["a"], rel_tol=2e-3) for value in scale.values())


def test_targets_have_the_mean_that_was_asked_for_and_rise_with_it() -> None:
    felt = {str(n): Felt(weights=2**n, rms=0.1, sensitivity=1.3**n) for n in range(1, 12)}
    gains = gains_db(felt)
    low, high = targets_db(gains, 20.0), targets_db(gains, 24.0)
    mean = sum(felt[n].weights * low[n] for n in felt) / sum(f.weights for f in felt.values())
    assert mean == pytest.approx(20.0, abs=0.01)
    assert all(high[n] == pytest.approx(low[n] + 4) for n in felt)


def test_targets_end_where_the_format_does() -> None:
    assert targets_db({"a": 60.0, "b": -40.0, "c": 40.0}, 20.0) == {"a": 72.0, "b": 0.0, "c": 60.0}


def test_what_no_output_feels_counts_as_usual_and_zeros_as_nothing() -> None:
    felt = {
        "a": Felt(weights=4, rms=1.0, sensitivity=2.0),
        "b": Felt(weights=4, rms=1.0, sensitivity=0.0),
        "c": Felt(weights=4, rms=0.0, sensitivity=1.0),
    }
    gains = gains_db(felt)
    assert gains["b"] == pytest.approx(gains["a"] - 8 * math.log10(2.0 / 1.5), abs=0.011)
    assert all(math.isfinite(value) for value in gains.values())
    assert gains_db({}) == {}


def test_what_feedback_makes_up_for_need_not_be_coded_finely() -> None:
    felt = {
        "fed": Felt(weights=5, rms=0.1, sensitivity=8.0, left=0.25),
        "alone": Felt(weights=5, rms=0.1, sensitivity=2.0),
        "unfelt": Felt(weights=5, rms=0.1, sensitivity=0.0),
    }
    assert gains_db(felt) == {"fed": 0.0, "alone": 0.0, "unfelt": 0.0}


def test_root_mean_square_leaves_outliers_out() -> None:
    weight = torch.ones(4096, dtype=torch.float16)
    weight[0] = 1000
    assert root_mean_square(weight) == pytest.approx(1.0, rel=1e-3)
    assert root_mean_square(torch.full((3, 5), -0.5)) == 0.5


def test_a_budget_is_solved_to_a_few_percent_and_falls_with_the_target() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(256, 192, generator=g) * 0.03,
        "b": torch.randn(96, 400, generator=g) * 0.4,
        "norm": torch.rand(300, generator=g),
        "depthwise": torch.randn(200, 1, 3, 3, generator=g),
    }
    hessian = {}
    for name in ("a", "b"):
        columns = tensors[name].shape[1]
        x = torch.randn(500, 24, generator=g) @ torch.randn(24, columns, generator=g)
        hessian[name] = Hessian(columns=x.T @ x / 500 + torch.eye(columns))
    profile = PROFILES["fast"]
    decisions = {name: profile.decide(tuple(tensor.shape), "float32") for name, tensor in tensors.items()}
    felt = {
        name: Felt(weights=tensors[name].numel(), rms=root_mean_square(tensors[name]), sensitivity=s)
        for name, s in (("a", 4.0), ("b", 3.0), ("depthwise", 2e5))
    }
    gains = gains_db(felt)
    targets = [12.0, 18.0, 24.0, 30.0]
    estimated = sizes(tensors, decisions, gains, targets)
    assert (np.diff(estimated) > 0).all()
    real = []
    for target in targets:
        own = targets_db(gains, target)
        coded = [
            encode(name, tensor, own[name], hessian.get(name), path=False)
            if name in own
            else encode_tensor(name, tensor, decisions[name])
            for name, tensor in tensors.items()
        ]
        real.append(len(container.serialise([found.tensor for found in coded])))
    np.testing.assert_allclose(estimated, real, rtol=0.06)
    assert highest(estimated, float(estimated[2])) == 2
    assert highest(estimated, 100.0) is None


def test_the_size_of_a_tensor_that_cannot_be_coded_asks_for_no_target() -> None:
    """Scales of norms that are all 1, as before training, where the outputs feel them most."""
    decision = Decision(codec="lattice", target_db=72.0, nominal=True)
    found = budget.sizes("norm", torch.ones(256), decision, [66.0, 72.0])
    assert found[0] == found[1] < 100
