"""`plan --check-sources`: ask the server of each address of a manifest, without downloading anything."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from birkhoff.pipeline.download.file import look, mirrored, on_this_machine
from birkhoff.pipeline.download.http import FetchSettings
from birkhoff.pipeline.download.resolve import mirror_folder
from birkhoff.pipeline.download.spec import SourcePart, is_remote, shown_url
from birkhoff.pipeline.errors import SourceError, SourceGoneError

AddressState = Literal["here", "mirror", "answers", "gone", "fails"]
"""`here`: on this machine. `mirror`: in the mirror, no server is asked. `answers`: the server has it. `gone`: the
server has no such file, or a path does not exist. `fails`: no answer, or a refusal that may be temporary."""

_AT_ONCE = 16
"""Servers asked at a time."""
_WAIT = FetchSettings(connect_timeout=10.0, read_timeout=20.0, attempts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of a model's source, and the answer.

    nbytes: The size according to server or disk, in bytes; None if unknown.
    problem: Why there is no file; empty if there is one.
    """

    model: str
    url: str
    state: AddressState
    nbytes: int | None = None
    problem: str = ""

    @property
    def good(self) -> bool:
        """Whether the address has a file."""
        return self.state in ("here", "mirror", "answers")


def check_addresses(
    sources: Mapping[str, Sequence[SourcePart]],
    *,
    mirror: Path | None = None,
    settings: FetchSettings = _WAIT,
) -> list[Address]:
    """Return the state of every address of some models, in order. Each server is asked once per address.

    Args:
        sources: Each model's source by name, with absolute paths.
        mirror: See `resolve.mirror_folder`.
        settings: Time-outs and attempts for each server.

    Raises:
        SourceError: The mirror is not a folder.
    """
    folder = mirror_folder(mirror)
    asked = {(part.allow_http, url): part for parts in sources.values() for part, url in _addresses(parts)}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(asked, pool.map(lambda key: _state(key[1], asked[key], folder, settings), asked), strict=True))
    return [
        replace(found[part.allow_http, url], model=model)
        for model, parts in sources.items()
        for url, part in {url: part for part, url in _addresses(parts)}.items()
    ]


def _addresses(parts: Sequence[SourcePart]) -> Iterator[tuple[SourcePart, str]]:
    return itertools.chain.from_iterable(((part, url) for url in part.urls) for part in parts)


def _state(url: str, part: SourcePart, mirror: Path | None, settings: FetchSettings) -> Address:
    alone = part.model_copy(update={"urls": (url,)})
    try:
        if not is_remote(url):
            path = on_this_machine(url)
            return Address(model="", url=url, state="here", nbytes=path.stat().st_size)
        if kept := mirrored(alone, mirror):
            return Address(model="", url=shown_url(url), state="mirror", nbytes=kept.stat().st_size)
        return Address(model="", url=shown_url(url), state="answers", nbytes=look(url, part, settings).size)
    except SourceGoneError as error:
        return Address(model="", url=shown_url(url), state="gone", problem=str(error))
    except SourceError as error:
        return Address(model="", url=shown_url(url), state="fails", problem=str(error))
