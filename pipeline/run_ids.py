"""Ids of runs. They sort by time, and begin the keys below `runs/`."""

import re

RUN_ID = r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z-[0-9a-f]{4}"
"""The start in UTC, and four random hex digits that separate runs of the same start."""


def run_of(key: str) -> str | None:
    """Return the run that an object's key belongs to; None if it is not part of a report."""
    found = re.fullmatch(rf"runs/({RUN_ID})/.+", key)
    return found[1] if found else None
