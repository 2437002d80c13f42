"""Logs: lines or JSON on standard error, and a trace of every run in files that survive a kill.

A run's trace is stored under `<home>/runs/<id>/`: `driver-<pid>.jsonl`, and one file per worker process on the worker's
machine. Before each step that may kill the process (reading, encoding or proving a tensor, uploading a shard) the
worker writes a line with model, shard, tensor, bytes and stage, unbuffered. So after an out-of-memory kill the last
line names the step, and `last_step` finds it for the error's message.

Every JSON line has `time` (UTC, ISO 8601), `level`, `logger` and `event`, and depending on the event `model`, `shard`,
`tensor`, `bytes`, `stage`, `status` and `seconds`.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.paths import birkhoff_home
from birkhoff.pipeline.text import printable

FOLDER_VARIABLE = "BIRKHOFF_RUN_LOG"
"""Environment variable that tells worker processes the folder of the run's trace."""

KEPT_TRACES = 20
"""Maximum number of traces kept on this machine."""

_TAIL_BYTES = 8192


class LogFormat(StrEnum):
    """Format of the lines on standard error."""

    TEXT = "text"
    JSON = "json"


class _Lines(logging.Formatter):
    """Format lines for people. Untrusted text is made `printable`; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the line without traceback."""
        return printable(super().formatMessage(record))


_package = logging.getLogger("birkhoff")
_steps = logging.getLogger("birkhoff.step")
_shard: ContextVar[Mapping[str, Any]] = ContextVar("shard", default=MappingProxyType({}))
"""Model and index of the shard that this thread works on."""


def configure(form: LogFormat, *, debug: bool) -> None:
    """Send log records to standard error: warnings, with `debug` everything, as JSON also the run's events."""
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
    """Return whether standard error holds only JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


@contextlib.contextmanager
def trace(run: str) -> Iterator[Path | None]:
    """Write a run's trace to files during the block, and delete the oldest traces.

    Yields the folder. If it cannot be written, logs a warning and yields None, so that the run continues.
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
    """Return the variables that a worker process needs to write its part of the trace."""
    return {FOLDER_VARIABLE: os.environ[FOLDER_VARIABLE]} if FOLDER_VARIABLE in os.environ else {}


def join_trace() -> None:
    """Start writing this process's part of the trace, if the run has one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or any(isinstance(handler, logging.FileHandler) for handler in _package.handlers):
        return
    try:
        _file(Path(folder), "worker")
    except OSError as error:
        _package.warning("no trace of this worker: %s: %s", folder, error.strerror)


@contextlib.contextmanager
def shard(model: str, index: int) -> Iterator[None]:
    """Attribute the steps inside the block to this shard."""
    before = _shard.set({"model": model, "shard": index})
    try:
        yield
    finally:
        _steps.info("end", extra=dict(_shard.get()))
        _shard.reset(before)


def step(stage: str, nbytes: int, tensor: str | None = None) -> None:
    """Log a step before it is taken, as it may kill the process. Raises Interrupted if the user has asked to stop."""
    interrupt.check()
    if _steps.isEnabledFor(logging.INFO):
        more = {} if tensor is None else {"tensor": tensor}
        _steps.info("step", extra={**_shard.get(), **more, "stage": stage, "bytes": nbytes})


def last_step(model: str, index: int) -> str | None:
    """Return the step that a shard did not finish, for a message: `encode of blocks.3.weight, 19660800 bytes`.

    None if it is unknown: there is no trace, the worker was on another machine, or the shard was between steps.
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
    """Yield the last complete lines of a trace."""
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
    """A file of a trace. The first line that cannot be written causes a warning, and the trace ends."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's)
        _package.removeHandler(self)
        _package.warning("the trace of this run ends here: %s: %s", self.baseFilename, sys.exc_info()[1])


def _file(folder: Path, kind: str) -> logging.Handler:
    folder.mkdir(parents=True, exist_ok=True)
    # The handler flushes every line and nothing below buffers it, so the kernel has the line before the step begins.
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
    """Delete the oldest traces, to make room for one more."""
    from birkhoff.pipeline.run_ids import run_of  # it imports pydantic (0.1 s), and every command imports this module

    runs = sorted(path for path in parent.glob("*") if run_of(f"runs/{path.name}/x"))
    for path in runs[: max(0, len(runs) - KEPT_TRACES + 1)]:
        shutil.rmtree(path, ignore_errors=True)
