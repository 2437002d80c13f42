"""The decision for every tensor of a model, made here alone, both for planned models and for stored versions.

A version stores what its decisions follow from: the recipe and the overrides in its manifest, which its digest and its
signatures cover. `decisions_of` computes the decisions again from these and the headers of its shards, for versions of
any age. A stored list of decisions would need the same check.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from birkhoff.codec.container import Entry
from birkhoff.codec.dtype_names import name_of_code
from birkhoff.codec.output.targets import targets_db
from birkhoff.codec.profiles import Decision, Header, Override, Profile
from birkhoff.pipeline.registry.documents import VersionManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a model's targets follow from, besides its profile, by tensor name: statistics under allocation by output,
    root mean squares under allocation by scale."""

    gains_db: Mapping[str, float]
    """Gain in dB over the profile's target. The profile's target is the mean."""
    hessians: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of packed Hessians. Empty for a stored version."""


def decide(
    headers: Iterable[Header], profile: Profile, overrides: Mapping[str, Override], shares: Shares | None = None
) -> dict[str, Decision]:
    """Return the decision for each tensor, by name, in their order.

    Callers that set targets per tensor pass `overrides`, which must be reached, or `shares`, which determine steps.
    Keys of shards, manifests and checks depend on the result.
    """
    headers = list(headers)
    decisions = {name: profile.decide(shape, dtype, overrides.get(name), name) for name, shape, dtype in headers}
    if shares is None or profile.target_db is None:
        return decisions
    if profile.allocation == "scale":
        return {
            name: profile.scaled(decisions[name], shape, shares.gains_db.get(name, 0.0)) for name, shape, _ in headers
        }
    targets = targets_db(shares.gains_db, profile.target_db)
    return {
        name: _shared(decision, targets.get(name), shares.hessians.get(name)) if decision.nominal else decision
        for name, decision in decisions.items()
    }


def _shared(decision: Decision, target_db: float | None, hessian: str | None) -> Decision:
    """Apply an allotted target to a decision. Without one, nothing tells what the tensor may lose, and it is kept
    lossless."""
    if target_db is None:
        return Decision(codec="planes", reason="no output feels it")
    return replace(decision, target_db=target_db, hessian=hessian)


def decisions_of(manifest: VersionManifest, entries: Iterable[Entry]) -> dict[str, Decision]:
    """Return the decisions behind a version's stored tensors, by name. Raises FormatError for an unknown dtype."""
    profile = Profile.of_recipe(manifest.profile, manifest.recipe)
    headers = (Header(entry.name, entry.shape, name_of_code(entry.dtype)) for entry in entries)
    shares = None if manifest.gains_db is None else Shares(gains_db=manifest.gains_db)
    return decide(headers, profile, manifest.overrides or {}, shares)
