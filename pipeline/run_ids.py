"""Ids of runs. They sort by time and begin the keys below `runs/`."""

import re

RUN_ID = r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z-[0-9a-f]{4}"
"""UTC time of the start, and four random digits for runs that start together."""


def run_of(key: str) -> str | None:
    """Return the run whose report an object belongs to, by its key; None for any other object."""
    found = re.fullmatch(rf"runs/({RUN_ID})/.+", key)
    return found[1] if found else None
