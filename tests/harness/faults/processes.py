"""SIGTERM and SIGKILL of the driver and of the store's server, just when a request of a stage comes by.

The world is that of the kill harness: three models, the real command, the real server. Between them stands the proxy,
whose rule strikes instead of a fault: at the first write of a stage, before the server sees it. The harness
`tests.harness.chaos`, which kills workers too, strikes at random moments; this one strikes where it hurts.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.harness.chaos.kills import LIMIT_SECONDS, STORE_CODES
from tests.harness.chaos.reader import BrokenError
from tests.harness.chaos.world import MODELS, World
from tests.harness.faults.catalogue import Fault
from tests.harness.faults.proxy import Proxy, Rule

Target = Literal["driver", "server"]

POINTS = {
    "upload blob": "blobs/",
    "upload record": "shards/",
    "publish manifest": "models/[^/]+/versions/",
    "name": "models/[^/]+/names/",
    "alias: swap": "models/[^/]+/aliases/",
}
STRIKE = Fault(name="strike", methods=("PUT",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A signal to a target at a stage."""

    target: Target
    number: signal.Signals
    stage: str

    @property
    def codes(self) -> tuple[int, ...]:
        """How the command may end."""
        if self.target == "server":
            return STORE_CODES
        return (-self.number,) if self.number == signal.SIGKILL else (128 + self.number,)


STRIKES = (
    Strike(target="driver", number=signal.SIGKILL, stage="name"),
    Strike(target="driver", number=signal.SIGKILL, stage="alias: swap"),
    Strike(target="server", number=signal.SIGKILL, stage="name"),
    Strike(target="driver", number=signal.SIGTERM, stage="publish manifest"),
    Strike(target="driver", number=signal.SIGKILL, stage="upload record"),
    Strike(target="driver", number=signal.SIGTERM, stage="upload blob"),
)


class Processes:
    """Runs strikes in one world, each on weights of its own."""

    def __init__(self, world: World) -> None:
        self._world, self._generation = world, 0
        world.start_store()

    def one(self, strike: Strike) -> dict[str, Any]:
        """One strike; the run after it must complete."""
        self._world.write_checkpoints(self._generation)
        self._generation += 1
        wrong: list[str] = []
        with self._proxied() as proxy:
            process = self._start(proxy)
            rule = Rule(fault=STRIKE, methods=("PUT",), key=POINTS[strike.stage])
            rule.hook = lambda: self._strike(strike, process)
            proxy.arm(rule)
            _, errors = process.communicate(timeout=LIMIT_SECONDS)
        lines = [line for line in errors.strip().splitlines() if line.strip()]
        if not rule.injected or process.returncode not in strike.codes:
            wrong.append(f"ended with {process.returncode}, expected one of {strike.codes}: {errors[-300:]}")
        if strike.target == "server":
            self._world.start_store()
        leaked = self._world.leaks()
        self._check(wrong, None)
        with self._proxied() as proxy:
            again = self._start(proxy)
            _, complaints = again.communicate(timeout=LIMIT_SECONDS)
        if again.returncode:
            wrong.append(f"the next run ended with {again.returncode}: {complaints[-300:]}")
        self._check(wrong, self._generation * len(MODELS))
        uploads = self._world.reader().uploads()
        leaked += [f"{uploads} multipart uploads"] if uploads else []
        completed = process.returncode == 0
        return {
            "fault": f"{strike.number.name} of the {strike.target}",
            "stage": strike.stage,
            "outcome": "completes" if completed else "fails",
            "line": lines[-1][:200] if lines and not completed else "",
            "wrong": wrong,
            "leaked": leaked,
        }

    def _strike(self, strike: Strike, process: "subprocess.Popen[str]") -> None:
        os.kill(process.pid if strike.target == "driver" else self._world.store_pid(), strike.number)

    def _start(self, proxy: Proxy) -> "subprocess.Popen[str]":
        manifest = str(self._world.folder / "fleet.yaml")
        words = ("compress", manifest, "--store", "s3://birkhoff/fleet", "--json", "--executor", "inline")
        return subprocess.Popen(
            self._world.command(*words),
            env={**self._world.environment, "AWS_ENDPOINT_URL_S3": proxy.endpoint},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @contextlib.contextmanager
    def _proxied(self) -> Iterator[Proxy]:
        port = int(self._world.environment["AWS_ENDPOINT_URL_S3"].rsplit(":", 1)[1])
        proxy = Proxy(target=port, prefix="/birkhoff/fleet/")
        try:
            yield proxy
        finally:
            proxy.close()

    def _check(self, wrong: list[str], versions: int | None) -> None:
        try:
            found = self._world.reader().check()
        except BrokenError as error:
            wrong.append(f"broken: {error}")
            return
        if versions is not None and found != versions:
            wrong.append(f"{found} versions, expected {versions}")


def rows(folder: Path, strikes: tuple[Strike, ...] = STRIKES) -> Iterator[dict[str, Any]]:
    """Run strikes, one after the other; what came of each."""
    world = World(folder)
    try:
        processes = Processes(world)
        for strike in strikes:
            yield processes.one(strike)
    finally:
        world.close()
