"""Strict JSON for stored files: duplicate keys are an error, while Python's parser keeps the last one."""

import json
from collections.abc import Sequence
from typing import Any


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


def unique_keys(pairs: Sequence[Any]) -> dict[str, Any]:
    """Return a dict of pairs. Raises ValueError if one is no pair, DuplicateKeyError if two keys are equal."""
    table: dict[str, Any] = dict(pairs)
    if len(table) < len(pairs):
        raise DuplicateKeyError("a key appears twice")
    return table


def parse(text: str | bytes | bytearray) -> Any:
    """Parse JSON. Bytes are read as UTF-8, while the json module guesses the encoding.

    Raises:
        DuplicateKeyError: An object has a key twice.
        ValueError, RecursionError: The text is not JSON, or is nested too deeply.
    """
    return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=unique_keys)
