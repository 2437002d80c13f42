"""Remote sharded safetensors: the shards that a downloaded index lists are beside it on the server."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from birkhoff.pipeline.checkpoint.safetensors import MAX_HEADER_BYTES
from birkhoff.pipeline.checkpoint.sniff import sniff
from birkhoff.pipeline.download.spec import SourcePart, file_name, is_remote, scheme_of
from birkhoff.pipeline.store.base import BUCKETS


def shard_parts(part: SourcePart, path: Path) -> dict[str, SourcePart]:
    """Return the source of each shard that `path`, downloaded for `part`, lists, by file name; empty if it is no index.

    A digest in the manifest is the index's; each shard is checked against its first-seen digest. Raises SourceError,
    OSError.
    """
    if sniff(path) != "JSON index":
        return {}
    urls = [url for url in part.urls if is_remote(url)]
    return {
        name: SourcePart(urls=tuple(_sibling(url, name) for url in urls), allow_http=part.allow_http)
        for name in _listed(path)
    }


def beside(index: Path, shards: Mapping[str, Path], folder: Path) -> Path:
    """Return the index in its own folder below `folder`, with links to the shards beside it. Raises OSError."""
    targets = {index.name: index, **shards}
    places = json.dumps(sorted((name, str(target)) for name, target in targets.items()))
    home = folder / hashlib.sha256(places.encode()).hexdigest()
    home.mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        with suppress(FileExistsError):
            (home / name).symlink_to(target)
    return home / index.name


def _listed(index: Path) -> list[str]:
    """Return the shard names of an index. Invalid ones are left out, because opening the index refuses them."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        return []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if isinstance(name, str) and name != index.name and _is_usable(name))


def _is_usable(name: str) -> bool:
    try:
        return file_name(f"https://host/{quote(name)}") == name and ":" not in name and "\\" not in name
    except ValueError:
        return False


def _sibling(url: str, name: str) -> str:
    """Return the address of a file in the same folder, with the same query."""
    if scheme_of(url) in ("hf", *BUCKETS):
        return f"{url.rpartition('/')[0]}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}"))
