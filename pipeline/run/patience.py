"""Start only the processes of Ray that a run needs, and wait for them for as long as they make progress.

Ray gives its control store and its node 30 s each to start, however busy the machine is. A setting can make one look
for the node last longer, but then nobody sees that it has died. An abandoned start loses its work, so on a loaded
machine the next try does no better. Inside `patient_start`, Ray's two waiting calls are retried until the processes
have started, have used no CPU time for `STALL_SECONDS`, or have taken `START_SECONDS` in total. Then Ray's own error is
raised.

The node in turn gives its agents 15 s to write down their ports, and then aborts; no setting changes that either
(ray-project/ray#65983). It does not wait for ports that it was told, so it is told free ones. Four programs that
compete with the workers for the processor are not started: the autoscaler's monitor, the log monitor, whose lines a
driver does not ask for, the server of the dashboard, which is off, and the agent for runtime environments, which no
worker has here. The node insists on that agent, so it gets a process that sleeps.
"""

import contextlib
import inspect
import logging
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
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

_PORTS = range(20_000, 32_768)
"""Ports for the agents: above those of Ray's workers, below those that Linux gives to connections."""

_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")

REASON_SECONDS = 120.0
"""Longest time until a driver is told why a worker's connection closed. Ray's own limit is one second, after which a
worker whose node was preempted, or which was killed for memory, only counts as unavailable. A cluster notices the loss
of a node after some seconds."""

_RAY_SETTINGS = {
    "RAY_agent_register_timeout_ms": f"{START_SECONDS * 1000:.0f}",
    "RAY_worker_register_timeout_seconds": f"{START_SECONDS:.0f}",
    "RAY_timeout_ms_task_wait_for_death_info": f"{REASON_SECONDS * 1000:.0f}",
}
"""How long Ray's node waits for its agents, a driver for its node, and a driver for the reason of a death."""

START_SETTINGS = {"RAY_raylet_start_wait_time_s": "1"}
"""While a node is started here: how long one look for it takes, so that its death is seen before the next."""


_RUNTIME_ENV_AGENT = "--runtime_env_agent_command="
"""The node's argument that names the agent."""


class NodeDiedError(Exception):
    """Ray's node ended while it was waited for."""


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


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface on which nobody listens now."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            taken = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", port))
                found.append(port)
        return found


def _lean(word: str) -> str:
    """An argument of the node with what it starts instead of an agent, if it names one."""
    sleep = shutil.which("sleep")
    if sleep is not None and word.startswith(_RUNTIME_ENV_AGENT):
        return f"{_RUNTIME_ENV_AGENT}{sleep} {2**31 - 1}"
    return word


@contextlib.contextmanager
def patient_start(ray: Any, cpu_seconds: Callable[[], float]) -> Iterator[None]:
    """Make `ray.init` inside the block start and wait as this module says.

    Ray has no public hook for it. What is replaced meanwhile is that of the Ray that `constraints.txt` pins;
    `tests/pipeline/run/test_patience.py` holds that it has it. Raises NodeDiedError if the node ends.
    """
    services, node, parameter = ray._private.services, ray._private.node, ray._private.parameter
    patience, raylets = Patience(cpu_seconds), list[Any]()
    get_node, wait_for_port, start_raylet = services.get_node, node.wait_for_persisted_port, services.start_raylet
    start_process = services.start_ray_process

    def told_raylet(*arguments: Any, **named: Any) -> Any:
        given = inspect.signature(start_raylet).bind(*arguments, **named).arguments
        # Of this port the node itself can only be told by the file.
        ray._raylet.persist_port(
            given["session_dir"],
            given["node_id"],
            ray._raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
            given["dashboard_agent_listen_port"],
        )
        raylets.append(start_raylet(*arguments, **named))
        return raylets[-1]

    def lean_process(command: Sequence[str], *arguments: Any, **named: Any) -> Any:
        return start_process([_lean(word) for word in command], *arguments, **named)

    def patient_node(*arguments: Any, **named: Any) -> Any:
        def ask() -> Any:
            code = raylets[-1].process.poll() if raylets else None
            if code is not None:
                raise NodeDiedError(f"its node ended with exit code {code} while it started")
            return get_node(*arguments, **named)

        return wait_for(ask, patience)

    def patient_port(*arguments: Any, timeout_ms: int, **named: Any) -> Any:
        step = min(timeout_ms, _PORT_MILLISECONDS)
        return wait_for(lambda: wait_for_port(*arguments, timeout_ms=step, **named), patience)

    def parameters(**named: Any) -> Any:
        ports = zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True)
        return kept[parameter, "RayParams"](**named | dict(ports), no_monitor=True, include_log_monitor=False)

    replaced: dict[tuple[Any, str], Any] = {
        (services, "get_node"): patient_node,
        (services, "start_raylet"): told_raylet,
        (services, "start_ray_process"): lean_process,
        (services, "start_api_server"): lambda *_, **__: ("", None),
        (node, "wait_for_persisted_port"): patient_port,
        (parameter, "RayParams"): parameters,
    }
    kept = {(module, name): getattr(module, name) for module, name in replaced}
    for (module, name), instead in replaced.items():
        setattr(module, name, instead)
    try:
        yield
    finally:
        for (module, name), before in kept.items():
            setattr(module, name, before)
