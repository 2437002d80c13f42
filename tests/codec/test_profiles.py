"""What becomes of a tensor, from its header, a profile and what is said of it alone."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birkhoff.codec.profiles import (
    FINEST_DB,
    MATRIX_DB,
    PROFILES,
    TARGET_DB_RANGE,
    Decision,
    Header,
    Override,
    Profile,
    gain_db,
    scale_gains_db,
)

BALANCED, PAPER, MATCH = PROFILES["balanced"], PROFILES["paper"], PROFILES["match-paper"]
SIZED = replace(BALANCED, allocation="size")
HEADED = replace(BALANCED, allocation="header")
PLACED = replace(HEADED, mean_gain_db=6.0)
FELT = replace(BALANCED, allocation="output", statistics="5" * 64)
MATRIX, VECTOR = (256, 256), (256,)

CASES: dict[str, tuple[Profile, tuple[int, ...], str, Override | None, dict[str, Any]]] = {
    "a matrix": (BALANCED, MATRIX, "float32", None, {"codec": "lattice", "target_db": 30.0, "path": True}),
    "without paths": (PROFILES["fast"], MATRIX, "bfloat16", None, {"codec": "lattice", "target_db": 30.0}),
    "by its size": (
        SIZED,
        MATRIX,
        "float32",
        None,
        {"codec": "lattice", "target_db": 39.03, "path": True, "states_target": True},
    ),
    "by its header": (
        PLACED,
        MATRIX,
        "float32",
        None,
        {"codec": "lattice", "target_db": 36.04, "path": True, "states_target": True},
    ),
    "by the output, before statistics": (
        FELT,
        MATRIX,
        "float32",
        None,
        {"codec": "lattice", "target_db": 30.0, "path": True, "nominal": True},
    ),
    "by the output, a vector too": (
        FELT,
        VECTOR,
        "float32",
        None,
        {"codec": "lattice", "target_db": 30.0, "path": True, "nominal": True},
    ),
    "by the output, a vector kept": (
        FELT,
        VECTOR,
        "float32",
        "lossless",
        {"codec": "planes", "override": "lossless", "reason": "by override"},
    ),
    "by the output, too short": (FELT, (63,), "float32", None, {"codec": "planes", "reason": "one-dimensional"}),
    "by the output, before vectors were": (
        replace(FELT, vectors=False),
        VECTOR,
        "float32",
        None,
        {"codec": "planes", "reason": "one-dimensional"},
    ),
    "at the published error": (
        MATCH,
        MATRIX,
        "float32",
        None,
        {"codec": "lattice", "path": True, "states_target": True},
    ),
    "one-dimensional": (BALANCED, VECTOR, "float32", None, {"codec": "planes", "reason": "one-dimensional"}),
    "tiny": (BALANCED, (8, 8), "float32", None, {"codec": "planes", "reason": "fewer than 1024 weights"}),
    "whole numbers": (BALANCED, MATRIX, "int64", None, {"codec": "planes", "reason": "int64 is not a float type"}),
    "eight bits": (
        BALANCED,
        MATRIX,
        "float8_e4m3fn",
        None,
        {"codec": "planes", "reason": "float8_e4m3fn is quantised already"},
    ),
    "published": (PAPER, VECTOR, "float32", None, {"codec": "paper"}),
    "published, few": (PAPER, (3, 3), "float32", None, {"codec": "raw", "reason": "fewer than 10 weights"}),
    "published, whole numbers": (PAPER, MATRIX, "int64", None, {"codec": "raw", "reason": "int64 is not a float type"}),
    "a rule of dB": (
        SIZED,
        MATRIX,
        "float32",
        36.5,
        {
            "codec": "lattice",
            "target_db": 36.5,
            "path": True,
            "states_target": True,
            "override": 36.5,
            "reason": "36.5 dB by override",
        },
    ),
    "a rule of dB over the published": (
        PAPER,
        MATRIX,
        "float32",
        36.0,
        {
            "codec": "lattice",
            "target_db": 36.0,
            "states_target": True,
            "override": 36.0,
            "reason": "36 dB by override",
        },
    ),
    "a rule of dB codes no vector": (
        BALANCED,
        VECTOR,
        "float32",
        36.0,
        {"codec": "planes", "reason": "one-dimensional"},
    ),
    "nor one that the published codec takes": (
        PAPER,
        VECTOR,
        "float32",
        36.0,
        {"codec": "planes", "override": "lossless", "reason": "by override"},
    ),
    "a rule of lossless": (
        BALANCED,
        MATRIX,
        "float32",
        "lossless",
        {"codec": "planes", "override": "lossless", "reason": "by override"},
    ),
    "which says nothing of whole numbers": (
        PAPER,
        MATRIX,
        "int64",
        "lossless",
        {"codec": "raw", "reason": "int64 is not a float type"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_decision(case: str) -> None:
    profile, shape, dtype, override, wanted = CASES[case]
    decision = profile.decide(shape, dtype, override)
    assert decision == Decision(**wanted)
    assert decision.action == ("coded" if wanted["codec"] in ("lattice", "paper") else "lossless")
    assert decision.matches_published == (case == "at the published error")


def test_buffers_of_batch_norm_stay_as_they_are() -> None:
    for name in ("encoder.bn.running_mean", "encoder.bn.running_var"):
        assert FELT.decide(VECTOR, "float32", name=name).action == "lossless"
        assert FELT.is_vector(VECTOR, "float32", "encoder.bn.weight")
        assert not FELT.is_vector(VECTOR, "float32", name)


HEADERS = st.tuples(
    st.lists(st.integers(0, 5000), max_size=4).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float64", "int64", "bool", "float8_e5m2"]),
)


@given(
    HEADERS,
    st.sampled_from([*PROFILES.values(), SIZED, PLACED, FELT]),
    st.one_of(st.none(), st.just("lossless"), st.floats(*TARGET_DB_RANGE)),
)
def test_what_a_version_stores_decides_the_same_again(
    header: tuple[tuple[int, ...], str], profile: Profile, override: Override | None
) -> None:
    """From the stored recipe, and the override that changed something: the name of a profile decides nothing."""
    decision = profile.decide(*header, override)
    assert Profile.of_recipe("any", profile.recipe()).decide(*header, decision.override) == decision
    low, high = TARGET_DB_RANGE
    assert decision.target_db is None or (decision.action == "coded" and low <= decision.target_db <= high)
    assert decision.override is None or decision.reason


GAINS = {
    "the reference": ((4096, 256), 0.0),
    "a tenth of the size": ((4096, 26), 14.90),
    "a larger fan-in": ((256, 4096), -6.02),
    "a dense convolution": ((64, 64, 3, 3), 20.78),
    "a convolution of 1 x 1": ((256, 256, 1, 1), 20.04),
    "a depthwise convolution": ((128, 1, 3, 3), 50.86),
    "one along a line": ((64, 32, 4), 30.58),
    "a position embedding": ((1, 64, 64, 768), -4.77),
    "none": ((0, 4), 60.21),
}


@pytest.mark.parametrize("kind", GAINS)
def test_gains_of_headers(kind: str) -> None:
    shape, gain = GAINS[kind]
    assert gain_db(shape) == pytest.approx(gain, abs=0.005)


def model(*decoder: tuple[int, ...], encoder: int = 512) -> list[Header]:
    blocks = [
        (f"encoder.{n}.{part}", shape)
        for n in range(4)
        for part, shape in (("in", (512, 512)), ("out", (512, encoder)))
    ]
    rest = [(f"decoder.{n}.weight", shape) for n, shape in enumerate(decoder)]
    return [Header(name, shape, "float32") for name, shape in [*blocks, *rest, ("decoder.bias", (1 << 24,))]]


def mean_db(profile: Profile, headers: list[Header]) -> float:
    """Mean target of the coded weights."""
    decisions = [(prod(shape), profile.decide(shape, dtype)) for _, shape, dtype in headers]
    coded = [(count, decision.target_db) for count, decision in decisions if decision.target_db is not None]
    return sum(count * target for count, target in coded) / sum(count for count, _ in coded)


@pytest.mark.parametrize("name", ["small", "balanced", "fine", "fast"])
def test_a_models_mean_weight_gets_the_target_whatever_its_size(name: str) -> None:
    profile = replace(PROFILES[name], allocation="header")
    for headers in (model(encoder=512), model(encoder=8192), model((64, 64, 3, 3), (900, 700), encoder=512)):
        placed = profile.of_model(headers)
        assert mean_db(placed, headers) == pytest.approx(profile.target_db, abs=1.01)
        assert len({placed.decide(shape, dtype).target_db for _, shape, dtype in headers}) > 1
    spread = model((64, 64, 3, 3), *[(200, 150)] * 50)  # the encoder's mean is no longer near that of all
    assert mean_db(profile.of_model(spread), spread) == pytest.approx(profile.target_db, abs=0.1)


def test_models_that_share_an_encoder_decide_it_alike_whatever_decoder_follows() -> None:
    first, second = model((256, 256), (64, 64)), model((300, 256), (128, 64, 3, 3))
    assert HEADED.of_model(first) == HEADED.of_model(second) == HEADED.of_model(model())
    assert HEADED.of_model(model((64, 64, 3, 3), *[(200, 150)] * 50)) != HEADED.of_model(first)


def test_other_allocations_and_models_of_nothing_coded_stay_as_they_are() -> None:
    uniform = replace(BALANCED, allocation="uniform")
    for profile in (uniform, BALANCED, SIZED, PAPER, MATCH):
        assert profile.of_model(model()) is profile
    assert HEADED.of_model([Header("bias", (4096,), "float32")]) is HEADED
    assert BALANCED.decide(MATRIX, "float32").target_db == 30.0  # alone, a tensor is its model's mean


def test_targets_by_header_end_at_48_db_and_at_12_or_where_asked_for_less() -> None:
    small, large = (128, 1, 3, 3), (8192, 8192)

    def targets(target_db: float) -> tuple[float | None, float | None]:
        profile = replace(PLACED, target_db=target_db)
        return tuple(profile.decide(shape, "float32").target_db for shape in (small, large))  # type: ignore[return-value]

    assert targets(30.0) == (48.0, 12.0)
    assert targets(46.0) == (48.0, 14.41)
    assert targets(10.0) == (48.0, 10.0)
    assert targets(3.0) == (47.86, 6.0)
    low, high = PLACED.target_range
    assert targets(low) == (6.0, 6.0)
    assert targets(high) == (48.0, 48.0)
    assert HEADED.target_range == TARGET_DB_RANGE


def test_recipes_say_how_targets_are_shared_and_those_that_say_nothing_are_uniform() -> None:
    recipe = PLACED.recipe()
    assert (recipe["allocation"], recipe["mean_gain_db"]) == ("header", 6.0)
    old = {key: value for key, value in recipe.items() if key not in ("allocation", "mean_gain_db")}
    assert Profile.of_recipe("balanced", old) == replace(BALANCED, allocation="uniform", vectors=False, summary="")
    assert Profile.of_recipe("balanced", {**old, "allocation": "size"}).allocation == "size"
    assert Profile.of_recipe("balanced", FELT.recipe()) == replace(FELT, summary="")


def test_tensors_of_one_size_and_kind_get_one_step() -> None:
    worked = {"a": (MATRIX, 0.1), "b": (MATRIX, 0.01)}
    assert scale_gains_db(worked, BALANCED) == {"a": 10.04, "b": -9.96}
    shapes = {"wide": (128, 2048), "high": (2048, 128), "dense": (64, 64, 8, 8), "depthwise": (4096, 1, 8, 8)}
    found = scale_gains_db({name: (shape, 0.1) for name, shape in shapes.items()}, BALANCED)
    assert found["wide"] == found["high"]
    assert found["dense"] - found["wide"] == pytest.approx(8.0, abs=0.011)
    assert found["depthwise"] - found["wide"] == pytest.approx(14.0, abs=0.011)
    assert scale_gains_db({}, BALANCED) == {}


def mean_scaled(tensors: dict[str, tuple[tuple[int, ...], float]], profile: Profile = BALANCED) -> float:
    """Mean target of the weights that targets move."""
    gains = scale_gains_db(tensors, profile)
    moved = {name: shape for name, (shape, rms) in tensors.items() if rms > 0}
    found = sum(prod(shape) * profile.scaled_db(shape, gains[name]) for name, shape in moved.items())
    return found / sum(map(prod, moved.values()))


LIVE: dict[str, tuple[tuple[int, ...], float]] = {f"a.{n}": ((512, 512), 0.02) for n in range(2)}
MODELS: dict[str, dict[str, tuple[tuple[int, ...], float]]] = {
    "alike": LIVE,
    "with zeros": LIVE | {"b.0": ((512, 512), 0.0)},
    "with dead weights": LIVE | {"b.0": ((256, 256), 2e-12)},
    "with small convolutions": LIVE | {f"b.{n}": ((64, 1, 5, 5), 0.3) for n in range(40)},
    "with small matrices": LIVE | {f"b.{n}": ((64, 32), 0.3) for n in range(200)},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["small", "balanced", "fine"])
def test_the_mean_within_the_limits_is_the_profiles(kind: str, name: str) -> None:
    profile = PROFILES[name]
    assert mean_scaled(MODELS[kind], profile) == pytest.approx(profile.target_db, abs=2.01)


def test_shares_by_scale_leave_alone_what_is_lossless_or_overridden() -> None:
    for shape, override in ((VECTOR, None), (MATRIX, "lossless"), (MATRIX, 36.0)):
        decision = BALANCED.decide(shape, "float32", override)  # type: ignore[arg-type]
        assert BALANCED.scaled(decision, shape, 7.0) == decision
    free = BALANCED.decide(MATRIX, "float32")
    assert BALANCED.scaled(free, MATRIX, 7.0) == replace(free, target_db=37.0, states_target=True)


def test_targets_by_scale_have_limits() -> None:
    free, filters = BALANCED.decide(MATRIX, "float32"), (64, 64, 3, 3)

    def targets(profile: Profile, shape: tuple[int, ...]) -> list[float | None]:
        return [profile.scaled(free, shape, gain).target_db for gain in (-40.0, 14.9, 16.0, 20.0, 40.0)]

    assert targets(BALANCED, MATRIX) == [15.0, 44.9, MATRIX_DB, MATRIX_DB, MATRIX_DB]
    assert targets(BALANCED, filters) == [15.0, 44.9, 48.01, 50.0, FINEST_DB]
    assert targets(replace(BALANCED, floor_db=24.0), MATRIX)[0] == 24.0
    assert targets(replace(BALANCED, target_db=9.0), MATRIX)[0] == 9.0
    assert targets(replace(BALANCED, target_db=3.0), MATRIX)[0] == 6.0


def test_recipes_by_scale_say_their_floor() -> None:
    floored = replace(BALANCED, floor_db=24.0)
    assert floored.recipe() == BALANCED.recipe() | {"floor_db": 24.0}
    assert Profile.of_recipe("balanced", floored.recipe()) == replace(floored, vectors=False, summary="")
    assert Profile.of_recipe("balanced", BALANCED.recipe()) == replace(BALANCED, vectors=False, summary="")


BUFFERS = {
    "bn.running_mean": ((64,), "raw"),
    "bn.running_var": ((64,), "raw"),
    "running_var": ((64,), "raw"),
    "bn.num_batches_tracked": ((), "raw"),
    "bn.weight": ((64,), "paper"),
    "running_var.weight": ((64,), "paper"),
    "bn.running_variance": ((64,), "paper"),
    "bn.running_mean ": ((64,), "paper"),
    "attention.running_mean": ((64, 64), "paper"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_the_published_codec_leaves_buffers_of_batch_norm_raw(name: str) -> None:
    shape, codec = BUFFERS[name]
    assert PAPER.decide(shape, "float32", name=name).codec == codec
    stored = PAPER.recipe()
    assert stored["buffers"] == "raw"
    del stored["buffers"]
    if shape:  # versions from before coded them
        assert Profile.of_recipe("paper", stored).decide(shape, "float32", name=name).codec == "paper"
