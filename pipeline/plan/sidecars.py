"""Sidecar files: small files that go with the weights of a version, such as transformers' `config.json`.

    files: [configs/config.json, configs/preprocessor_config.json]   # of a model in the manifest
    files: []                                                        # none

By default they are the files that transformers keeps beside a local safetensors source, if a configuration is among
them; from the Hugging Face Hub also model card and licence. They are text, few and small, and never code. Imports no
torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.families import BESIDE, CONFIG_FILE, HUB_FILES
from birkhoff.pipeline.registry.documents import MAX_FILE_BYTES, FileRecord, sha256

_CODE_KEYS = re.compile(r"auto_map|custom_pipelines|\w*_implementation(_internal)?")
"""Settings that can name code to download and run: modules and kernels of the Hugging Face Hub. They are removed
from every configuration. A configuration that came with weights loses far more (`load.stored_config`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A file's bytes and its record."""

    record: FileRecord
    body: bytes = field(repr=False)


def named(paths: Sequence[str]) -> tuple[Companion, ...]:
    """Return the files that a manifest names, sorted by name. Raises SourceError."""
    found = [_read(Path(path).name, Path(path)) for path in paths]
    return tuple(sorted(found, key=lambda sidecar: sidecar.record.name))


def of_hub(weights: Path) -> tuple[Companion, ...]:
    """Return the repository's files beside weights that came from the Hub, sorted by name."""
    found = (weights.with_name(name) for name in HUB_FILES)
    return tuple(_read(path.name, path) for path in sorted(found) if path.is_file())


def beside(weights: Path) -> tuple[Companion, ...]:
    """Return transformers' files beside weights, sorted by name; none without a configuration.

    A configuration named after the weights is taken alone, because the other files may belong to other weights. Raises
    SourceError for a file that is too large or empty.
    """
    config = config_beside(weights)
    if config is None:
        return ()
    paths = {CONFIG_FILE: config}
    if config.name == CONFIG_FILE:
        paths |= {name: path for name in BESIDE if (path := config.with_name(name)).is_file()}
    return tuple(_read(name, paths[name]) for name in sorted(paths))


def config_beside(place: Path) -> Path | None:
    """Return the transformers configuration of a folder, or of a file or its folder; None if there is none."""
    candidates = [place / CONFIG_FILE] if place.is_dir() else [place.with_suffix(".json"), place.parent / CONFIG_FILE]
    found = place.exists()
    return next((path for path in candidates if found and path.is_file() and settings_of(path)), None)


def settings_of(path: Path) -> dict[str, Any] | None:
    """Return the settings of a transformers configuration file; None if it is not one."""
    try:
        with path.open("rb") as file:
            return settings_in(file.read(MAX_FILE_BYTES + 1))
    except OSError:
        return None


def settings_in(body: bytes) -> dict[str, Any] | None:
    """Return the settings of a transformers configuration, without those that name code; None if it is not one."""
    try:
        found = json.loads(body)
        if len(body) > MAX_FILE_BYTES or not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
            return None
        return _without_code(found)
    except (ValueError, RecursionError):
        return None


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: _cleaned(value) for key, value in settings.items() if not _CODE_KEYS.fullmatch(key)}


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_code(value)
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _read(name: str, path: Path) -> Companion:
    try:
        if not path.is_file():
            raise SourceError(f"{path}: no such file; correct `files` of the model")
        with path.open("rb") as file:
            body = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not 0 < len(body) <= MAX_FILE_BYTES:
        size = f"more than {MAX_FILE_BYTES} bytes" if body else "empty"
        raise SourceError(
            f"{path}: expected a file of 1 to {MAX_FILE_BYTES} bytes to go with the weights, it is {size}; name the "
            "files that should: `files: [...]` of the model, or `files: []` for none"
        )
    return Companion(record=FileRecord(name=name, blob=sha256(body), bytes=len(body)), body=body)
