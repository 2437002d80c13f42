"""Strict JSON for stored files: a duplicate key is an error, while Python's parser keeps the last one."""

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """An object that has one of its keys twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of pairs whose keys all differ. Raises DuplicateKeyError."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise DuplicateKeyError("a key appears twice")
    return table


def parse(text: str | bytes | bytearray) -> Any:
    """Parse JSON; bytes are UTF-8 (the json module would guess among encodings).

    Raises:
        DuplicateKeyError: an object has one of its keys twice.
        ValueError, RecursionError: the text is no JSON, or nested too deeply.
    """
    return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=unique_keys)
