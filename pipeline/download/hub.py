"""Files of the Hugging Face Hub, through huggingface_hub, with the user's cache, tokens, endpoint and offline mode.

    hf://ORG/REPO/PATH/FILE           the default branch
    hf://ORG/REPO@REV/PATH/FILE       a branch, tag or commit; a slash in it as %2F

A revision is resolved once. The first-seen record holds the commit, and from then on the file at that commit is used.
Files stay in the hub's cache (`HF_HOME`), whose snapshot folders keep them together.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import birkhoff
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.download.cache import Remote
from birkhoff.pipeline.download.http import Report
from birkhoff.pipeline.download.spec import HubPlace, check_plain_http, hub_place
from birkhoff.pipeline.errors import SourceError, SourceGoneError
from birkhoff.pipeline.text import first_line

try:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from tqdm import tqdm
except ImportError:
    raise SourceError("hf:// sources need huggingface_hub: pip install 'birkhoff-compression[hub]'") from None

log: logging.Logger = logging.getLogger("birkhoff.fetch")

_NAME, _VERSION = "birkhoff-compression", birkhoff.__version__
_HTTP: type[Exception] = errors.HfHubHTTPError.__bases__[0]
"""The HTTP client's base error, for connections and answers; the client depends on the library's version."""
_FAILURES = (_HTTP, errors.FileMetadataError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)


class HubTransport:
    """Reads hf:// addresses. Has no connection of its own."""

    def __init__(self, *, allow_http: bool = False) -> None:
        try:
            check_plain_http(constants.ENDPOINT, allowed=allow_http)
        except ValueError as error:
            raise SourceError(f"HF_ENDPOINT: {error}") from None

    def close(self) -> None:
        """See `file._Transport`."""

    def look(self, url: str) -> Remote:
        """Return size, ETag and commit of a file, asked once. Raises SourceError."""
        place = hub_place(url)
        address = huggingface_hub.hf_hub_url(place.repository, place.path, revision=place.revision)
        try:
            found = huggingface_hub.get_hf_file_metadata(address, library_name=_NAME, library_version=_VERSION)
        except _FAILURES as error:
            raise _refusal(url, place, error) from None
        return Remote(size=found.size, etag=found.etag, commit=found.commit_hash)

    def fetch(self, url: str, report: Report | None) -> tuple[Path, Remote]:
        """Return the file in the hub's cache, downloaded if needed, with its facts. Raises SourceError, OSError."""
        place = hub_place(url)
        try:
            path = _download(place, place.path, report)
        except _FAILURES as error:
            raise _refusal(url, place, error) from None
        commit = path.parents[len(Path(place.path).parts) - 1].name  # .../snapshots/<commit>/<path>
        return path, Remote(size=path.stat().st_size, etag=path.resolve().name, commit=commit)

    def companions(self, url: str, names: Iterable[str]) -> None:
        """Fetch those of these files that are beside a pinned file into the hub's cache. Raises SourceError."""
        place = hub_place(url)
        folder = place.path.rpartition("/")[0]
        wanted = {f"{folder}/{name}" if folder else name for name in names}
        try:
            info = huggingface_hub.HfApi(library_name=_NAME, library_version=_VERSION).model_info(
                place.repository, revision=place.revision
            )
            for path in sorted(wanted & {entry.rfilename for entry in info.siblings or ()}):
                _download(place, path, None)
        except _FAILURES as error:
            raise _refusal(url, place, error) from None


def _download(place: HubPlace, path: str, report: Report | None) -> Path:
    """Return a file of the repository at the revision of `place`, in the hub's cache."""
    found = huggingface_hub.hf_hub_download(
        place.repository,
        path,
        revision=place.revision,
        tqdm_class=_reporting(path, report),
        library_name=_NAME,
        library_version=_VERSION,
    )
    return Path(found)


def cached(url: str, commit: str) -> Path | None:
    """Return the file at a commit in the hub's cache; None if it is not there. No server is asked."""
    place = hub_place(url)
    found = huggingface_hub.try_to_load_from_cache(place.repository, place.path, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _refusal(url: str, place: HubPlace, error: Exception) -> SourceError:
    """Return the library's error as one line with a remedy."""
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{url}: {place.repository} is gated; accept its terms on its page and give a token: HF_TOKEN, or "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceGoneError(
            f"{url}: the hub has no {place.repository}, or hides it; check the name, and for a private one give a "
            "token: HF_TOKEN, or `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceGoneError(f"{url}: {place.repository} has no revision {place.revision!r}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return SourceGoneError(f"{url}: {place.repository} has no file {place.path}")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return SourceError(f"{url}: not in the hub's cache, and HF_HUB_OFFLINE asks no server; unset it once")
    return SourceError(f"{url}: {constants.ENDPOINT} cannot be asked ({first_line(cause)})")


def _reporting(path: str, report: Report | None) -> type[Any]:
    """Return a progress bar for the library that draws nothing and calls `report`."""
    name = path.rpartition("/")[2]

    class Reporting(tqdm):  # type: ignore[misc]
        def display(self, *_: Any, **__: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            interrupt.check()
            self.n += n or 0
            if report is not None:
                report(name, int(self.n), None if self.total is None else int(self.total))

        def close(self) -> None:
            pass

    return Reporting
