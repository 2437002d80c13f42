"""Wait for Ray's own processes for as long as they make progress.

Ray gives its control store and its node 30 s each to start, however busy the machine is, and no setting changes the
second limit. An abandoned start loses its work, so on a loaded machine the next try does no better. Inside
`patient_start`, Ray's two waiting calls are retried until the processes have started, have used no CPU time for
`STALL_SECONDS`, or have taken `START_SECONDS` in total. Then Ray's own error is raised.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from birkhoff.pipeline import interrupt

log: logging.Logger = logging.getLogger("birkhoff.cluster")

START_SECONDS = 300.0
"""Longest total time of a start."""

STALL_SECONDS = 30.0
"""Longest time of a start without progress."""

STALL_CPU_SECONDS = 0.15
"""CPU time within `STALL_SECONDS` that still counts as no progress: 0.5 % of a core, as idle processes use."""

SLOW_SECONDS = 20.0
"""A warning is logged once a start takes longer."""

_POLL_SECONDS = 0.5
_PORT_MILLISECONDS = 1000

_RAY_SETTINGS = {
    "RAY_agent_register_timeout_ms": f"{START_SECONDS * 1000:.0f}",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
}
"""How long Ray's node waits for its agents, and a driver for its node."""


class Patience:
    """Decides whether to keep waiting. `cpu_seconds` returns the CPU time that the awaited processes have used so
    far."""

    def __init__(self, cpu_seconds: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._cpu_seconds, self._clock = cpu_seconds, clock
        self._began = self._moved = clock()
        self._cpu = cpu_seconds()
        self._remarked = False

    def over(self) -> bool:
        """Return whether the processes have stalled or have used up `START_SECONDS`."""
        now, cpu = self._clock(), self._cpu_seconds()
        if abs(cpu - self._cpu) > STALL_CPU_SECONDS:  # it also drops when a process ends
            self._moved, self._cpu = now, cpu
        if now - self._began > SLOW_SECONDS and not self._remarked:
            self._remarked = True
            log.warning("Ray is slow to start on this machine; waiting while it makes progress")
        return now - self._moved > STALL_SECONDS or now - self._began > START_SECONDS


def wait_for(ask: Callable[[], Any], patience: Patience) -> Any:
    """Call `ask` until it raises no RuntimeError, and return its result. Raises its last error once `patience` is
    over."""
    while True:
        interrupt.check()
        try:
            return ask()
        except RuntimeError:
            if patience.over():
                raise
        time.sleep(_POLL_SECONDS)


def configure_ray() -> None:
    """Make Ray's processes wait for each other as long as this module does. Call it before Ray is imported."""
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def patient_start(ray: Any, cpu_seconds: Callable[[], float]) -> Iterator[None]:
    """Make `ray.init` inside the block wait as the module describes.

    Ray has no public hook for this, so two functions of the Ray pinned in `constraints.txt` are replaced.
    `tests/pipeline/run/test_patience.py` checks that they exist.
    """
    services, node, patience = ray._private.services, ray._private.node, Patience(cpu_seconds)
    get_node, wait_for_port = services.get_node, node.wait_for_persisted_port

    def patient_node(*arguments: Any, **named: Any) -> Any:
        return wait_for(lambda: get_node(*arguments, **named), patience)

    def patient_port(*arguments: Any, timeout_ms: int, **named: Any) -> Any:
        step = min(timeout_ms, _PORT_MILLISECONDS)
        return wait_for(lambda: wait_for_port(*arguments, timeout_ms=step, **named), patience)

    services.get_node, node.wait_for_persisted_port = patient_node, patient_port
    try:
        yield
    finally:
        services.get_node, node.wait_for_persisted_port = get_node, wait_for_port
