"""Nominal targets: the share of each tensor in a model's single target. Reading a version needs this without torch."""

from collections.abc import Mapping

RANGE_DB = (0.0, 72.0)
"""Range of a tensor's targets. A quarter of LiteMedSAM's weights need less than 6 dB, where other allocations end, to
make the model ten times smaller, because its masks hardly depend on them. At 0 dB a step is 3.5 times the root mean
square; below that nothing would remain."""


def targets_db(gains: Mapping[str, float], target_db: float) -> dict[str, float]:
    """Return the nominal targets of tensors, by name. Over all weights their mean is `target_db`, unless clamped."""
    low, high = RANGE_DB
    return {name: round(min(max(low, target_db + gain), high), 2) for name, gain in gains.items()}
