"""Reports in a store: ids, writing, finding, retention.

The page is written before the document, so a run that has a document is complete.
"""

import logging
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import ArtifactNotFoundError, ObjectNotFoundError
from birkhoff.pipeline.registry.documents import report_key
from birkhoff.pipeline.report.document import PAGE_FILE, REPORT_FILE, RunReport
from birkhoff.pipeline.run_ids import run_of
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.report")

LATEST = "latest"


class RunClock:
    """A run's id, and the time since its start."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        self.run: str = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z-{secrets.token_hex(2)}"
        self.started: str = now.isoformat(timespec="seconds")
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the run began."""
        return round(time.perf_counter() - self._start, 2)


def write_report(store: Store, report: RunReport) -> None:
    """Store the page, then the document. Raises StoreError."""
    from birkhoff.pipeline.report.html import render  # with jinja2, which readers of reports do without

    store.create(report_key(report.run, PAGE_FILE), render(report).encode())
    store.create(report_key(report.run, REPORT_FILE), report.to_bytes())


def runs(store: Store) -> list[str]:
    """Return the ids of runs with a report, oldest first."""
    found = ((run_of(info.key), info.key) for info in store.list("runs/"))
    return [run for run, key in found if run and key.endswith(f"/{REPORT_FILE}")]


def read_report(store: Store, reference: str = LATEST) -> RunReport:
    """Return a run's report. `reference` is its id, a unique prefix of it, or `latest`.

    Raises:
        ArtifactNotFoundError: No run matches, or several do.
        IntegrityError: The stored document is damaged.
    """
    run = _find(store, reference)
    key = report_key(run, REPORT_FILE)
    try:
        return read_document(RunReport, key, store.get(key))
    except ObjectNotFoundError:
        raise ArtifactNotFoundError(f"{store.url}: the report of run {run} was deleted") from None


def _find(store: Store, reference: str) -> str:
    known = runs(store)
    matching = known[-1:] if reference == LATEST else [run for run in known if run.startswith(reference)]
    if len(matching) == 1:
        return matching[0]
    if not known:
        raise ArtifactNotFoundError(
            f"{store.url} has no reports yet: `compress` writes one unless everything is up to date"
        )
    what = f"{len(matching)} runs start with" if matching else "no run starts with"
    raise ArtifactNotFoundError(f"{store.url}: {what} {reference!r}; the newest are {_newest(known)}")


def _newest(known: Iterable[str]) -> str:
    return ", ".join(list(known)[-3:])
