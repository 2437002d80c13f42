"""Logs: lines or JSON on standard error, and a trace of every run in files that outlive a kill.

A run's trace lies under `<home>/runs/<id>/`: `driver-<pid>.jsonl`, and one file for each worker process on that
worker's machine. Before each step that may take the process down (a tensor read, encoded or proven, a shard uploaded)
its worker writes a line with model, shard, tensor, bytes and stage, straight to the file. So after an out-of-memory
kill the file's last line says what was at work, and `last_step` finds it for the error's message.

Every JSON line has `time` (UTC, ISO 8601), `level`, `logger` and `event`, and those of `model`, `shard`, `tensor`,
`bytes`, `stage`, `status` and `seconds` that belong to the event.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from birkhoff.pipeline.paths import birkhoff_home
from birkhoff.pipeline.text import printable

FOLDER_VARIABLE = "BIRKHOFF_RUN_LOG"
"""Tells worker processes the folder of the run's trace."""

KEPT_TRACES = 20
"""Runs whose traces stay on this machine."""

_TAIL_BYTES = 8192


class LogFormat(StrEnum):
    """How lines on standard error look."""

    TEXT = "text"
    JSON = "json"


class _Lines(logging.Formatter):
    """Format lines for people. Untrusted text is made `printable`; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line, without traceback."""
        return printable(super().formatMessage(record))


_package = logging.getLogger("birkhoff")
_steps = logging.getLogger("birkhoff.step")
_shard: dict[str, Any] = {}
"""Model and index of the shard that this process works on: a worker has one at a time."""


def configure(form: LogFormat, *, debug: bool) -> None:
    """Send log records to standard error: warnings (everything with `debug`), as JSON also the run's events."""
    handler = logging.StreamHandler(sys.stderr)
    if form is LogFormat.JSON:
        handler.setFormatter(_json())
        handler.setLevel(logging.DEBUG if debug else logging.INFO)
    else:
        handler.setFormatter(_Lines("%(levelname)s %(name)s: %(message)s"))
        handler.setLevel(logging.DEBUG if debug else logging.WARNING)
    handler.addFilter(lambda record: debug or record.name != _steps.name)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], force=True)
    _package.setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("botocore", "boto3", "urllib3", "asyncio", "azure", "msal", "google"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def as_json() -> bool:
    """Whether standard error is to hold JSON alone."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


@contextlib.contextmanager
def trace(run: str) -> Iterator[Path | None]:
    """Keep a run's trace in files for as long as the block lasts, and drop the oldest traces.

    Yields the folder, or None where it cannot be written, which is a warning: a trace must not stop a run.
    """
    folder = birkhoff_home() / "runs" / run
    try:
        _prune(folder.parent)
        handler = _file(folder, "driver")
    except OSError as error:
        _package.warning("no trace of this run: %s: %s", folder, error.strerror)
        yield None
        return
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        _package.removeHandler(handler)
        handler.close()
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before


def environment() -> dict[str, str]:
    """Variables that a worker process needs for its part of the trace."""
    return {FOLDER_VARIABLE: os.environ[FOLDER_VARIABLE]} if FOLDER_VARIABLE in os.environ else {}


def join_trace() -> None:
    """Write this process's part of the trace, if there is one and it does not yet."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or any(isinstance(handler, logging.FileHandler) for handler in _package.handlers):
        return
    try:
        _file(Path(folder), "worker")
    except OSError as error:
        _package.warning("no trace of this worker: %s: %s", folder, error.strerror)


@contextlib.contextmanager
def shard(model: str, index: int) -> Iterator[None]:
    """Steps inside the block belong to this shard."""
    _shard.update(model=model, shard=index)
    try:
        yield
    finally:
        _steps.info("end", extra=dict(_shard))
        _shard.clear()


def step(stage: str, nbytes: int, tensor: str | None = None) -> None:
    """Note a step before it is taken: it may be the last thing that this process does."""
    if _steps.isEnabledFor(logging.INFO):
        more = {} if tensor is None else {"tensor": tensor}
        _steps.info("step", extra={**_shard, **more, "stage": stage, "bytes": nbytes})


def last_step(model: str, index: int) -> str | None:
    """The step that a shard did not come back from, for a message: `encode of blocks.3.weight, 19660800 bytes`.

    None where none is known: no trace, the worker was on another machine, or it was at no step of the shard.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return None
    found = [line for path in Path(folder).glob("*.jsonl") for line in _tail(path)]
    steps = [line for line in found if (line.get("model"), line.get("shard")) == (model, index)]
    last = max(steps, key=lambda line: str(line.get("time")), default={})
    if "stage" not in last:
        return None
    what = f" of {last['tensor']}" if "tensor" in last else ""
    return f"{last['stage']}{what}, {last.get('bytes')} bytes"


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """The last whole lines of a trace."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


class _TraceFile(logging.FileHandler):
    """A file of a trace. The first line that cannot be written is a warning, and the rest goes nowhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's)
        _package.removeHandler(self)
        _package.warning("no more trace of this run: %s: %s", self.baseFilename, sys.exc_info()[1])


def _file(folder: Path, kind: str) -> logging.Handler:
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered below the handler's own flush: a line is with the kernel before the step begins.
    handler = _TraceFile(folder / f"{kind}-{os.getpid()}.jsonl", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_json())
    _package.addHandler(handler)
    if _package.getEffectiveLevel() > logging.INFO:
        _package.setLevel(logging.INFO)
    return handler


def _json() -> JsonFormatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger", "message": "event"},
        timestamp="time",
    )


def _prune(parent: Path) -> None:
    """Leave room for one more trace."""
    from birkhoff.pipeline.run_ids import run_of  # pydantic takes 0.1 s, and every command imports this module

    runs = sorted(path for path in parent.glob("*") if run_of(f"runs/{path.name}/x"))
    for path in runs[: max(0, len(runs) - KEPT_TRACES + 1)]:
        shutil.rmtree(path, ignore_errors=True)
