"""Shell completion of MODEL[@REF]: models of the store, and after `@` their aliases and versions.

Completion must be fast and silent. If the store does not answer within a second, or is an embedded server that does not
run, nothing is completed. No server is started.
"""

from collections.abc import Iterator

import typer

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.store.open import open_address

_SECONDS = 1.0


def references(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `MODEL[@REF]`."""
    try:
        return [found for found in _known(context.params.get("store"), incomplete) if found.startswith(incomplete)]
    except (BirkhoffError, OSError):
        return []  # a shell is waiting; running the command shows the error


def _known(store: str | None, incomplete: str) -> Iterator[str]:
    from birkhoff.pipeline.registry.aliases import aliases
    from birkhoff.pipeline.registry.names import names
    from birkhoff.pipeline.registry.versions import models
    from birkhoff.pipeline.store.base import StoreAddress, StoreSettings
    from birkhoff.pipeline.store.default import default_store_url, http_allowed

    settings = StoreSettings(connect_timeout=_SECONDS, read_timeout=_SECONDS, attempts=1, allow_http=http_allowed())
    model, at, _ = incomplete.partition("@")
    with open_address(StoreAddress.parse(default_store_url(store), settings)) as opened:
        if not at:
            yield from models(opened)
            return
        yield from (f"{model}@{alias}" for alias in aliases(opened, model))
        yield from (f"{model}@{name}" for name, _ in names(opened, model))
