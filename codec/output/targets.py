"""Nominal targets: what tensors get of a model's one target. Needs no torch: whoever reads a version asks for it."""

from collections.abc import Mapping

RANGE_DB = (0.0, 72.0)
"""Targets that a tensor can have. A quarter of LiteMedSAM's weights want less than the 6 dB at which others end when
the model is to be ten times smaller: its masks hardly feel them. At 0 dB a step is 3.5 times the root mean square, and
less would leave nothing."""

FIXED_POINT_DB = 44.0
"""Nominal targets from which a weight is 16 bits of fixed point, which reach some 80 times the root mean square at
60 dB, and 20 times at 72. Nodes of pairs would take 0.2 bits a weight more there, 2 more at 48 dB: escapes of 40
bits."""


def targets_db(gains: Mapping[str, float], target_db: float) -> dict[str, float]:
    """Nominal targets of tensors whose weights have the mean `target_db` (but for the ends of the range), by name."""
    low, high = RANGE_DB
    return {name: round(min(max(low, target_db + gain), high), 2) for name, gain in gains.items()}
