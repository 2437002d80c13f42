"""Folders that the pipeline keeps for itself, under the birkhoff home (`BIRKHOFF_HOME`, else `.birkhoff`)."""

from pathlib import Path

from birkhoff.pipeline.home import birkhoff_home


def source_cache() -> Path:
    """Where sources that must be converted or unpacked once are kept."""
    return birkhoff_home() / "sources"
