"""What becomes of a tensor is asked once; what is planned is what a published version says of itself."""

import ast
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from math import prod

import pytest
from safetensors.torch import load_file

from birkhoff.codec.container import Entry
from birkhoff.codec.dtypes import TORCH_TO_SAFETENSORS, dtype_name
from birkhoff.codec.profiles import PROFILES, Decision, Profile
from birkhoff.pipeline.artifact.readers import StoredArtifact
from birkhoff.pipeline.checkpoint.open import open_checkpoint
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.plan.models import plan_checkpoint
from birkhoff.pipeline.plan.shards import ModelPlan, plan_model
from birkhoff.pipeline.registry.documents import HessianRecord, SourceRecord, StatisticsRecord, VersionManifest
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.shard.decisions import decisions_of
from birkhoff.pipeline.shard.run import input_key
from birkhoff.pipeline.store.open import open_store
from tests.layers import modules
from tests.pipeline.artifact.make_versions import FIXTURE, MODELS
from tests.pipeline.publishing import record_of

SOURCE = FIXTURE / "net.safetensors"
CODES = {dtype_name(dtype): code for dtype, code in TORCH_TO_SAFETENSORS.items()}
FAST_BY_OUTPUT = replace(PROFILES["fast"], allocation="output")


def test_it_is_asked_in_one_place() -> None:
    asked: Counter[tuple[str, str]] = Counter()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if attribute in ("decide", "of_tensor", "action"):
                asked[name, attribute] += 1
    assert asked == {("birkhoff.pipeline.shard.decisions", "decide"): 1}


def planned(model: str) -> ModelPlan:
    """The plan of a model of the fixture, with the target that its budget led to."""
    manifest = load_manifest(FIXTURE / "manifest.yaml")
    entry = next(entry for entry in manifest.models if entry.name == model)
    return plan_checkpoint(manifest, entry, open_checkpoint(SOURCE)).plan


@pytest.mark.parametrize("model", MODELS)
def test_a_published_version_decides_what_was_planned(model: str) -> None:
    with open_store((FIXTURE / "store").as_uri()) as store:
        artifact = StoredArtifact(store, resolve(store, model))
        target, plan = artifact.manifest.recipe["target_db"], planned(model)
        if isinstance(target, float):
            plan = plan.at(target)
        found = decisions_of(artifact.manifest, artifact.coded())
    assert found == {item.tensor.name: item.decision for item in plan.tensors}
    assert plan.overrides == (artifact.manifest.overrides or {})


@pytest.mark.parametrize("model", MODELS)
def test_what_a_shards_key_is_made_from_is_what_it_was(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture's keys are those of format 1, by SHA-256."""
    monkeypatch.setattr("birkhoff.pipeline.shard.run.FORMAT_VERSION", 1)
    monkeypatch.setattr("birkhoff.pipeline.shard.run.blake3", sha256)
    tensors = load_file(SOURCE)
    with open_store((FIXTURE / "store").as_uri()) as store:
        artifact = StoredArtifact(store, resolve(store, model))
        for shard in artifact.manifest.shards:
            coded = artifact.coded_of(shard)
            sources = {item.name: tensors[item.name] for item in coded}
            assert input_key(sources, artifact.manifest.recipe, decisions_of(artifact.manifest, coded)) == shard.key


def test_a_shards_key_is_what_it_was() -> None:
    """It would else be made again by a run that continues another one, or that has weights which another model has."""
    sources, profile = {"w": load_file(SOURCE)["encoder.blocks.0.weight"]}, PROFILES["balanced"]
    key = input_key(sources, profile.recipe(), {"w": profile.decide((96, 64), "float32", None)})
    assert key == "39c2bd9e244d27a3a066d0862f5edf76d3c1cda37b5dca41c949d02baf082aa4"


def test_what_is_decided_for_a_tensor_alone_is_part_of_its_shards_key() -> None:
    sources, profile = {"w": load_file(SOURCE)["encoder.blocks.0.weight"]}, PROFILES["balanced"]
    header = (96, 64), "float32"
    keys = {
        input_key(sources, profile.recipe(), {"w": profile.decide(*header, override)})
        for override in (None, 30.0, 36.0, "lossless")
    }
    assert len(keys) == 4


def allotted() -> ModelPlan:
    """A plan whose every coded tensor has a target of its own, as a pass over the model would give it."""
    checkpoint, profile = open_checkpoint(SOURCE), PROFILES["balanced"]
    targets = {tensor.name: 20.0 + place / 4 for place, tensor in enumerate(checkpoint.tensors)}
    return plan_model("net", checkpoint, profile, shard_bytes=1 << 20, overrides=targets)


def test_targets_that_somebody_else_has_allotted_are_a_plan_like_any_other() -> None:
    plan = allotted()
    coded = [item.decision for item in plan.tensors if item.decision.action == "coded"]
    assert len({decision.target_db for decision in coded}) == len(coded) > 5
    assert list(plan.overrides.values()) == [decision.target_db for decision in coded]
    assert plan.at(40.0).tensors == plan.tensors
    assert plan.at(40.0).profile.target_db == 40.0


def test_tasks_carry_the_decisions_and_estimates_every_target() -> None:
    plan = planned("sized")
    tasks = plan.tasks("net", reuse="revalidate")
    assert [task.tensors for task in tasks] == list(plan.shards)
    assert {task.reuse for task in tasks} == {"revalidate"}
    decisions: dict[str, Decision] = {}
    for task in tasks:
        decisions |= task.decisions
        assert (task.estimate_only, task.recipe) == (False, plan.profile.recipe())
    assert decisions == {item.tensor.name: item.decision for item in plan.tensors}
    knots = (-20.0, 20.0, 28.0)
    for task, estimate in zip(tasks, plan.estimates("net", knots), strict=True):
        assert estimate.estimate_only
        assert replace(estimate, targets_db=(), reuse=task.reuse) == task
        for item, targets in zip(estimate.tensors, estimate.targets_db, strict=True):
            if item.decision.action == "coded":
                own = (plan.at(knot).tensors[plan.tensors.index(item)].decision.target_db for knot in knots)
                assert targets == tuple(own)
                assert (len(set(targets)) == 1) == (item.decision.override is not None)


def test_shards_of_one_recipe_may_be_duplicates_whatever_their_profile_is_called() -> None:
    profile = PROFILES["balanced"]
    checkpoint = open_checkpoint(SOURCE)

    def signatures(profile: Profile, overrides: dict[str, float | str] | None = None) -> list[object]:
        plan = plan_model("m", checkpoint, profile, shard_bytes=1 << 20, overrides=overrides)  # type: ignore[arg-type]
        return [task.signature for task in plan.tasks("m")]

    plain = signatures(profile)
    assert signatures(replace(profile, name="ratio 7")) == plain
    assert not set(signatures(replace(profile, target_db=31.0))) & set(plain)
    other = signatures(profile, {"decoder.coarse": 31.0})
    assert sum(a != b for a, b in zip(plain, other, strict=True)) == 1


def felt(profile: Profile = FAST_BY_OUTPUT) -> ModelPlan:
    """A plan by statistics that feel the encoder's first weight most, its second not at all, and have one Hessian."""
    checkpoint = open_checkpoint(SOURCE)
    plan = plan_model("net", checkpoint, profile, shard_bytes=1 << 20, overrides={"decoder.coarse": 40.0})
    coded = [item.tensor.name for item in plan.tensors if item.decision.nominal]
    record = StatisticsRecord(
        key="5" * 64,
        pictures=1,
        probes=1,
        device="cpu",
        sensitivities={**dict.fromkeys(coded, 1.0), coded[0]: 100.0, coded[1]: 0.0},
        rms=dict.fromkeys(coded, 0.1),
        hessians={coded[0]: HessianRecord(blob="a" * 64, bytes=2, columns=1)},
    )
    return plan.with_statistics(record)


def test_statistics_allot_steps_and_promise_nothing() -> None:
    plan = felt()
    by_name = {item.tensor.name: item.decision for item in plan.tensors}
    nominal = {name: decision for name, decision in by_name.items() if decision.nominal}
    first, second, *others = nominal
    assert by_name["decoder.coarse"] == Decision(
        codec="lattice", target_db=40.0, states_target=True, override=40.0, reason="40 dB by override"
    )
    assert plan.shares is not None
    assert plan.shares.gains_db.keys() == nominal.keys()
    assert nominal[first].target_db == pytest.approx((nominal[second].target_db or 0) + 16, abs=0.02)
    assert {nominal[name].target_db for name in (second, *others)} == {nominal[second].target_db}
    assert [name for name, decision in nominal.items() if decision.hessian == "a" * 64] == [first]
    weights = {item.tensor.name: prod(item.tensor.shape) for item in plan.tensors if item.decision.nominal}
    mean = sum((nominal[name].target_db or 0) * count for name, count in weights.items()) / sum(weights.values())
    assert mean == pytest.approx(30.0, abs=0.02)
    assert plan.profile.recipe()["statistics"] == "5" * 64
    higher = {item.tensor.name: item.decision.target_db for item in plan.at(36.0).tensors if item.decision.nominal}
    assert higher == pytest.approx({name: (decision.target_db or 0) + 6 for name, decision in nominal.items()})


def test_a_vector_that_no_output_feels_is_lossless() -> None:
    plan = felt()
    vectors = [item for item in plan.tensors if plan.profile.is_vector(item.tensor.shape, item.tensor.dtype, "")]
    assert vectors
    name = vectors[0].tensor.name
    without = plan_model("net", open_checkpoint(SOURCE), FAST_BY_OUTPUT, shard_bytes=1 << 20)
    nominal = [item.tensor.name for item in without.tensors if item.decision.nominal]
    record = StatisticsRecord(
        key="5" * 64,
        pictures=1,
        probes=1,
        device="cpu",
        sensitivities={other: 1.0 for other in nominal if other != name},
        rms=dict.fromkeys(nominal, 0.1),
        hessians={},
    )
    shared = without.with_statistics(record)
    (found,) = [item.decision for item in shared.at(20.0).tensors if item.tensor.name == name]
    assert found == Decision(codec="planes", reason="no output feels it")


def test_a_version_says_the_same_targets_and_no_hessian() -> None:
    plan = felt().at(33.0)
    assert plan.shares is not None
    manifest = VersionManifest(
        model="net",
        source=SourceRecord(file="f", sha256="0" * 64, bytes=1, format="test"),
        profile="fast",
        recipe=plan.profile.recipe(),
        overrides=plan.overrides,
        gains_db=dict(plan.shares.gains_db),
        code="0",
        shards=(record_of("a"),),
    )
    entries = [
        Entry(name=item.tensor.name, codec="raw", dtype=CODES[item.tensor.dtype], shape=item.tensor.shape)
        for item in plan.tensors
    ]
    again = VersionManifest.model_validate_json(manifest.to_bytes())
    planned = {item.tensor.name: replace(item.decision, hessian=None) for item in plan.tensors}
    assert decisions_of(again, entries) == planned
    assert again.allocation == "output"
    assert again.statistics_keys == (f"statistics/55/{'5' * 64}.json",)


def test_a_nominal_target_and_its_hessian_are_part_of_the_shards_key() -> None:
    sources, recipe = {"w": load_file(SOURCE)["encoder.blocks.0.weight"]}, FAST_BY_OUTPUT.recipe()
    nominal = Decision(codec="lattice", target_db=30.0, nominal=True)
    variants = (nominal, replace(nominal, target_db=31.0), replace(nominal, hessian="a" * 64))
    assert len({input_key(sources, recipe, {"w": decision}) for decision in variants}) == 3
