"""Resolve the globs of a manifest to an override for each tensor: pure functions over names."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from birkhoff.codec.profiles import Override
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.quality import OverrideRule
from birkhoff.pipeline.text import shown


def said(rules: Sequence[OverrideRule], tensors: Iterable[StoredTensor]) -> dict[str, Override]:
    """Return the overrides of single tensors, by name, in the order of the checkpoint. The last matching rule applies.

    `Profile.decide` says whether an override changes anything.
    """
    found: dict[str, Override] = {}
    for tensor in tensors:
        override = next((rule.override for rule in reversed(rules) if fnmatchcase(tensor.name, rule.tensors)), None)
        if override is not None:
            found[tensor.name] = override
    return found


def check_matches(rules: Iterable[OverrideRule], checkpoints: Sequence[tuple[str, Checkpoint]]) -> None:
    """Refuse a rule that matches no tensor of any of the models, given as (name, checkpoint).

    Raises:
        ManifestError: Names the glob, its place in the manifest, and similar globs that match.
    """
    names = [tensor.name for _, checkpoint in checkpoints for tensor in checkpoint.tensors]
    for rule in rules:
        if not any(fnmatchcase(name, rule.tensors) for name in names):
            models = shown(checkpoints[0][0]) if len(checkpoints) == 1 else f"{len(checkpoints)} models"
            raise ManifestError(
                f"{rule.place}: {shown(rule.tensors)} matches none of the {len(names)} tensors of {models}; "
                f"{_like(rule.tensors, names)}"
            )


def _like(glob: str, names: Sequence[str]) -> str:
    """Return globs similar to one that match something: names, and their beginnings and endings at dots."""
    globs: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        globs[name] = None
        for cut in range(1, len(words)):
            globs |= dict.fromkeys((".".join(words[:cut]) + ".*", "*." + ".".join(words[-cut:])))
    close = difflib.get_close_matches(glob, globs, n=3)
    there = [shown(found, 100) for found in close or names[:3]]
    return f"{'near it are' if close else 'they are called'} {', '.join(there)}"
