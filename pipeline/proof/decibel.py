"""The SQNR of outputs, as proofs record it."""

import math

from birkhoff.codec.metrics import sqnr_db
from birkhoff.pipeline.registry.documents import FLOOR_DB


def decibel(energy: float, error: float) -> float | None:
    """Return the SQNR in dB, rounded to the precision on which devices agree: None without error, `FLOOR_DB` if an
    output is not finite."""
    if not error:
        return None
    return round(max(FLOOR_DB, sqnr_db(energy, error)), 1) if math.isfinite(energy + error) else FLOOR_DB
