"""The decision for every tensor of a model: the one place that makes it, for planned models and stored versions.

A version stores its decisions as what they were made from, recipe and overrides in its manifest, which its digest and
its signatures cover. From these and the headers of its shards `decisions_of` makes them again, for a version of any
age. A list of decisions beside the manifest would have to be held against them before anybody could believe it.
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
    """What statistics have allotted tensors under allocation by output, by name."""

    gains_db: Mapping[str, float]
    """Over the profile's target, which is the mean of all."""
    hessians: Mapping[str, str] = field(default_factory=dict)
    """Digests of packed Hessians; where a version is read there are none."""


def decide(
    headers: Iterable[Header], profile: Profile, overrides: Mapping[str, Override], shares: Shares | None = None
) -> dict[str, Decision]:
    """Return the decision for each tensor, by name, in their order.

    Callers that allot targets tensor by tensor pass them as `overrides`, which must be reached, or as `shares`, which
    give steps. Keys of shards, manifests and checks follow them.
    """
    decisions = {name: profile.decide(shape, dtype, overrides.get(name), name) for name, shape, dtype in headers}
    if shares is None or profile.target_db is None:
        return decisions
    targets = targets_db(shares.gains_db, profile.target_db)
    return {
        name: _shared(decision, targets.get(name), shares.hessians.get(name)) if decision.nominal else decision
        for name, decision in decisions.items()
    }


def _shared(decision: Decision, target_db: float | None, hessian: str | None) -> Decision:
    """What becomes of a tensor with its own target; it is lossless if nothing tells what it may lose."""
    if target_db is None:
        return Decision(codec="planes", reason="no output feels it")
    return replace(decision, target_db=target_db, hessian=hessian)


def decisions_of(manifest: VersionManifest, entries: Iterable[Entry]) -> dict[str, Decision]:
    """What a version's manifest has decided of stored tensors, by name. Raises FormatError for an unknown dtype."""
    profile = Profile.of_recipe(manifest.profile, manifest.recipe)
    headers = (Header(entry.name, entry.shape, name_of_code(entry.dtype)) for entry in entries)
    shares = None if manifest.gains_db is None else Shares(gains_db=manifest.gains_db)
    return decide(headers, profile, manifest.overrides or {}, shares)
