"""A cell: one fault in one stage, what came of it, and what must hold after it, seen by a reader of its own.

After the fault the stage is called once more without any: it must then complete, whatever the first call left. Then:
every version that was ever acknowledged verifies down to its blobs, none is there twice, and no temporary file, partial
download, probe, lease or multipart upload is left.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.errors import exit_code
from birkhoff.pipeline.registry.fencing import SWEEP_KEY, read_sweep
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store, StoreAddress, StoreSettings
from birkhoff.pipeline.store.open import wrapped
from birkhoff.pipeline.store.s3 import S3Store, connect
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer, environment
from tests.harness.chaos.reader import BrokenError, Reader
from tests.harness.chaos.reader import connect as connect_reader
from tests.harness.faults.catalogue import FAULTS, Fault
from tests.harness.faults.proxy import Proxy, Rule
from tests.harness.faults.stages import STAGES, Cell, Stage

Depth = Literal["first", "second", "lasting"]
DEPTHS: tuple[Depth, ...] = ("first", "second", "lasting")
"""Which matching requests are harmed: one, the first or the second; or every one."""

READ_SECONDS = 0.5
ATTEMPTS = 3
LASTING = 10**6
MAX_LINE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault in a stage."""

    fault: Fault
    stage: Stage
    depth: Depth

    @property
    def methods(self) -> tuple[str, ...]:
        """The requests it can meet."""
        return tuple(method for method in self.stage.methods if method in self.fault.methods)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.fault.name} / {self.stage.name} / {self.depth}"


@dataclass(slots=True, kw_only=True)
class Result:
    """What a case came to; `wrong` is empty where all held."""

    case: Case
    injected: int = 0
    completed: bool = False
    message: str = ""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """One word."""
        if not self.injected:
            return "not met"
        return "completes" if self.completed else "fails"


def cases(depths: Iterable[Depth] = DEPTHS) -> list[Case]:
    """Every fault in every stage that makes a request it can meet."""
    made = [Case(fault=fault, stage=stage, depth=depth) for stage in STAGES for fault in FAULTS for depth in depths]
    return [case for case in made if case.methods]


class Lane:
    """What one thread keeps from case to case: a proxy, and clients, which take longer to make than a case takes."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._bucket = server.bucket
        self.proxy = Proxy(target=int(server.endpoint.rsplit(":", 1)[1]))
        self._direct = StoreSettings(endpoint=server.endpoint)
        self._harmed = StoreSettings(
            endpoint=self.proxy.endpoint, read_timeout=READ_SECONDS, connect_timeout=5.0, attempts=ATTEMPTS
        )
        self._clients = {settings: connect(settings) for settings in (self._direct, self._harmed)}
        self.reader = connect_reader(environment(server.home))

    def close(self) -> None:
        """Close proxy and clients."""
        self.proxy.close()
        for client in (*self._clients.values(), self.reader):
            client.close()

    def stores(self, prefix: str) -> tuple[Store, Store]:
        """The store below a prefix: straight, and by way of the proxy."""
        self.proxy.prefix = f"/{self._bucket}/{prefix}/"
        url = f"s3://{self._bucket}/{prefix}"
        direct, harmed = (
            wrapped(S3Store(StoreAddress.parse(url, settings), client, self._bucket, prefix))
            for settings, client in self._clients.items()
        )
        return direct, harmed


class Suite:
    """Runs cases against one server, each in a prefix of its own."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._numbers = itertools.count()
        self._lanes: SimpleQueue[Lane] = SimpleQueue()

    def run(self, chosen: Iterable[Case], threads: int, report: Callable[[Result], None]) -> list[Result]:
        """Run cases, several at once; `report` hears of each."""
        found = []
        lanes = [Lane(self._server) for _ in range(threads)]
        try:
            for lane in lanes:
                self._lanes.put(lane)
            with ThreadPoolExecutor(threads) as pool:
                for result in pool.map(self._one, chosen):
                    report(result)
                    found.append(result)
        finally:
            for lane in lanes:
                lane.close()
        return found

    def _one(self, case: Case) -> Result:
        lane = self._lanes.get()
        try:
            return self._in(lane, case, f"faults-{next(self._numbers)}")
        finally:
            self._lanes.put(lane)

    def _in(self, lane: Lane, case: Case, prefix: str) -> Result:
        result, start = Result(case=case), time.monotonic()
        folder = self._folder / prefix
        folder.mkdir()
        direct, harmed = lane.stores(prefix)
        case.stage.prepare(direct)
        self._meet(Cell(store=harmed, folder=folder), case, lane.proxy, result)
        self._check(result, direct, folder, Reader(lane.reader, self._server.bucket, f"{prefix}/"))
        result.seconds = time.monotonic() - start
        return result

    def _meet(self, cell: Cell, case: Case, proxy: Proxy, result: Result) -> None:
        """The stage with the fault, and once more without."""
        rule = Rule(
            fault=case.fault,
            methods=case.methods,
            key=case.stage.key,
            skip=1 if case.depth == "second" else 0,
            times=LASTING if case.depth == "lasting" else 1,
        )
        proxy.arm(rule)
        self._act(cell, case, result)
        proxy.arm(None)
        result.injected = rule.injected
        self._judge(case, result)
        try:
            case.stage.act(cell)
        except Exception as error:
            result.wrong.append(f"called again without a fault: {type(error).__name__}: {error}")

    def _act(self, cell: Cell, case: Case, result: Result) -> None:
        try:
            case.stage.act(cell)
            result.completed = True
        except BirkhoffError as error:
            result.message = str(error)
            exit_code(error)
            if "\n" in result.message or not 0 < len(result.message) <= MAX_LINE:
                result.wrong.append(f"no clear line: {result.message[:200]!r}")
        except Exception as error:
            result.wrong.append(f"{type(error).__name__} is no error of ours: {error}")

    def _judge(self, case: Case, result: Result) -> None:
        """Whether the outcome is the one the catalogue tells."""
        expected = case.fault.expected(case.stage.name, lasting=case.depth == "lasting")
        if result.injected and expected not in ("either", result.outcome):
            result.wrong.append(f"{result.outcome}, expected that it {expected}: {result.message}")

    def _check(self, result: Result, direct: Store, folder: Path, reader: Reader) -> None:
        stage = result.case.stage
        try:
            if (versions := reader.check()) != stage.versions:
                result.wrong.append(f"{versions} versions, expected {stage.versions}")
        except BrokenError as error:
            result.wrong.append(f"broken: {error}")
        with contextlib.suppress(BirkhoffError):
            if stage.published is not None and resolve(direct, stage.published).name != "v2":
                result.wrong.append("latest is not at the version published")
        keys = set(reader.objects())
        result.wrong += [f"lost: {key}" for key in stage.there if key not in keys]
        result.leaked += [f"not collected: {key}" for key in stage.gone if key in keys]
        sweep = read_sweep(direct)
        over = {SWEEP_KEY} if sweep is not None and sweep[0].state == "ended" else set()  # stays on S3
        result.leaked += sorted(key for key in keys - over if key.startswith(("probe/", "runs/")))
        found: list[dict[str, Any]] = reader.client.list_multipart_uploads(Bucket=reader.bucket).get("Uploads", [])
        result.leaked += [f"upload {entry['Key']}" for entry in found if entry["Key"].startswith(reader.prefix)]
        result.leaked += [
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".part" in path.name
        ]
