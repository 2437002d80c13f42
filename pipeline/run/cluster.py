"""The Ray cluster that runs shards: a private one for the duration of a run, or an existing one that the run joins.

A private cluster has no dashboard and leaves no process and no file behind, however the driver ends (see `cleanup`);
with --debug its logs stay. Nobody else can reach it. It asks for a random token that exists only in the environment of
its processes, because Ray's own token lies in ~/.ray, readable by all. Its ports are on the loopback interface, and its
files in a folder that only its user can enter, because Ray opens its own folder to everybody. `_check_private` verifies
this once Ray runs; an open cluster is not used.

A joined cluster gets this package with the job, so all nodes run the driver's code. Its nodes need the dependencies,
the store's credentials in their own environment, and the checkpoints under the driver's paths (a shared file system),
since workers read their own byte ranges.
"""

import contextlib
import gc
import io
import logging
import os
import re
import secrets
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import birkhoff
from birkhoff.codec.native.processors import processors
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import ClusterError, WorkerError
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.run.cleanup import Reaper
from birkhoff.pipeline.run.patience import START_SECONDS, START_SETTINGS, configure_ray, patient_start
from birkhoff.pipeline.store.base import StoreAddress
from birkhoff.pipeline.store.open import open_address
from birkhoff.pipeline.text import first_line

if TYPE_CHECKING:
    from birkhoff.pipeline.run.outcome import Outcome
    from birkhoff.pipeline.run.queue import Task
    from birkhoff.pipeline.run.worker import Worker

log: logging.Logger = logging.getLogger("birkhoff.cluster")

OBJECT_STORE_BYTES = 80 << 20
"""For a private cluster: tasks and records pass through the object store, never tensors."""

CPUS_TO_A_FREE_ONE = 8
"""One CPU in so many gets no worker: it is left to the driver, which plans and publishes, and to a store's server.
Workers on all of 16 are no faster than on 14, and each takes 0.6 GB."""

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""glibc's settings for workers: freed buffers stay in the heap and serve the next tensor.

By default they return to the kernel, which maps and clears every page again: a tenth of a worker's time, and the
workers of a machine wait for each other. The first value is the largest that glibc accepts. A larger second one keeps
more memory and saves no time.
"""

HIDDEN_MODULE = "rfc3987_syntax"
"""A module that takes a second to import: it builds a grammar of IRIs. Each process of Ray's imports jsonschema, which
imports it if it is installed, as Jupyter has it. Ray's schemas name no IRI, and jsonschema does without it."""

_LOOPBACK = "127.0.0.1"
_INSIDE = "r"
"""Name of Ray's folder inside ours. It is short, because the paths of sockets in it have a limit."""

_KNOCK_SECONDS = 15.0
_HOST_PORT = re.compile(r"(ray://)?\[?(?P<host>[^\[\]/]+?)\]?:(?P<port>[0-9]{1,5})")


class WorkerProcess:
    """A process of Ray that first imports what workers need, and then becomes one.

    The imports take a processor two to three seconds. They need only the store's address, so they can run while the
    driver plans. The worker's class, its GPU and the run's trace are known later.
    """

    def __init__(self, store: StoreAddress) -> None:
        gc.disable()  # imports create no garbage, but collections, which take a fifth of the time
        import birkhoff.pipeline.run.worker  # noqa: F401

        with contextlib.suppress(Exception):  # whatever is wrong with the store, the first task says
            open_address(store).close()  # imports the store's library, which only that function knows
        gc.freeze()
        gc.enable()
        self._store = store
        self._worker: Worker | None = None

    def become(self, kind: "type[Worker] | None", *, gpu: bool, environment: Mapping[str, str]) -> dict[str, Any]:
        """Become a worker of a class, by default `Worker`, with environment variables set for it. Returns its
        `identity`."""
        from birkhoff.pipeline.run.worker import Worker

        os.environ |= environment
        self._worker = (kind or Worker)(self._store, gpu=gpu)
        return self._worker.identity()

    def _as_worker(self) -> "Worker":
        assert self._worker is not None  # the driver calls `become` first, and Ray keeps the order of calls
        return self._worker

    def run(self, task: "Task") -> "Outcome":
        """Run one task. An error becomes its outcome."""
        return self._as_worker().run(task)

    def identity(self) -> dict[str, Any]:
        """Return facts about this process; see `Worker.identity`."""
        return self._as_worker().identity()

    def gpus(self) -> dict[str, str]:
        """Return its GPU; see `Worker.gpus`."""
        return self._as_worker().gpus()

    def trim(self) -> None:
        """Return cached GPU memory to the device."""
        self._as_worker().trim()


class Cluster(AbstractContextManager["Cluster"]):
    """A connection to a Ray cluster; `ray` is the module. Raises ClusterError if Ray cannot start or be reached.

    `environment` are variables for workers. Those of a private cluster inherit them from its node: Ray's own way, a
    runtime environment, lets every worker wait until an agent has started, which takes longer than all else.
    """

    def __init__(self, address: str | None, environment: Mapping[str, str] | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # GPUs are hidden from workers that have no share of one, before these import anything.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        configure_ray()
        try:
            import ray
        except ImportError as error:
            raise ClusterError("Ray", first_line(error)) from None
        self.ray: Any = ray
        self._address = address
        self._environment = dict(environment or {})
        self._actor_class: Any = ray.remote(WorkerProcess)  # once: Ray sends a class when it is first used
        self._idle: list[Any] = []
        """Processes started ahead that have not become workers."""
        self._reaper: Reaper | None = None
        self._settings = contextlib.ExitStack()
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(contextlib.redirect_stdout(_ToLog()))
        self._open()

    def worker_count(self, asked: int | None) -> int:
        """Return the number of workers for a run: `asked`, or one per CPU but for a few.

        Raises:
            WorkerError: The cluster is too small. Ray would wait for ever for the missing CPUs.
        """
        cpus = int(self.ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise WorkerError("the Ray cluster has no CPUs to give; start a node, or use --executor inline")
        if asked is not None and asked > cpus:
            raise WorkerError(f"{asked} workers asked for, the cluster has room for {cpus}, one per CPU")
        return asked or cpus - cpus // CPUS_TO_A_FREE_ONE

    def start_processes(self, store: StoreAddress, asked: int | None) -> None:
        """Start the processes of as many workers, without GPU, before they are asked for. Raises WorkerError."""
        self._idle = [self._new_process(store, 0.0) for _ in range(self.worker_count(asked))]

    def process(self, store: StoreAddress, share: float) -> Any:
        """Return a process (a handle of a `WorkerProcess`) with a share of a GPU, 0 for none: one that was started
        ahead, or a new one."""
        return self._idle.pop(0) if self._idle and not share else self._new_process(store, share)

    def end_idle(self) -> None:
        """End the processes started ahead that have not become workers."""
        while self._idle:
            self.ray.kill(self._idle.pop(), no_restart=True)

    def _new_process(self, store: StoreAddress, share: float) -> Any:
        # With a share of a GPU, a process reserves no CPU: others could have reserved all of its node's.
        kind = self._actor_class.options(
            num_cpus=0 if share else 1,
            num_gpus=share,
            max_restarts=0,
            runtime_env=None if self._address is None else {"env_vars": self._environment},
        )
        return kind.remote(store)

    def _open(self) -> None:
        ray, address = self.ray, self._address
        try:
            with _signals_kept(ray):
                if address is None:
                    self._start_twice()
                else:
                    _knock(address)
                    _read_settings(ray)
                    _quiet_init(ray, address=address, runtime_env={"py_modules": [str(Path(birkhoff.__file__).parent)]})
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            interrupt.check()  # Ray's compiled parts replace an exception of the signal handler by another one
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ClusterError(where, _reason(error)) from None

    def _start_twice(self) -> None:
        """Start the cluster; if that fails early, for instance as a port was taken meanwhile, start once more."""
        began = time.monotonic()
        try:
            self._start()
        except Exception as error:
            interrupt.check()
            if isinstance(error, OSError) or time.monotonic() - began > START_SECONDS / 2:
                raise
            log.warning("Ray did not start (%s); trying once more", first_line(error))
            self._end()
            self._start()

    def _start(self) -> None:
        # Ray puts sockets deep into this folder, and a socket's path has at most 107 bytes: TMPDIR may be too long.
        folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"), f"bf-ray-{uuid.uuid4().hex[:12]}")
        debug = log.isEnabledFor(logging.DEBUG)
        log.debug("Ray's logs are in %s", folder)
        self._reaper = Reaper(None if debug else folder)
        folder.mkdir(mode=0o700)  # the reaper runs, and will remove it
        # Ray's prestarted workers lack our workers' environment, so none would be used. If one dies while it starts,
        # the raylet never answers the driver.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 they starve on a busy machine
        path = os.pathsep.join(filter(None, (str(_hide_module(HIDDEN_MODULE, folder)), os.environ.get("PYTHONPATH"))))
        self._settings.enter_context(_private(self.ray, {**self._environment, "PYTHONPATH": path}))
        with LOADING, self._reaper.covering(), patient_start(self.ray, self._reaper.cpu_seconds):
            _quiet_init(
                self.ray,
                address="local",
                num_cpus=processors(),  # Ray's own count disregards affinity
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                # Ray makes this folder 0777; its parent stays 0700.
                _temp_dir=str(folder / _INSIDE),
            )
        _check_private(folder, self.ray)

    def lost(self) -> bool:
        """Return whether the private cluster's node has died. Always False for a joined cluster, which replaces its
        own nodes."""
        return self._address is None and not any(node["Alive"] for node in self.ray.nodes())

    def restart(self) -> None:
        """End what is left of the private cluster, and start another. Raises ClusterError."""
        self._end()
        self._open()

    def close(self) -> None:
        """Leave a joined cluster, or end the private one."""
        with self._quiet:
            self._end()

    def _end(self) -> None:
        self._idle.clear()  # they end with Ray
        try:
            self.ray.shutdown()
        finally:
            self._settings.close()
            reaper, self._reaper = self._reaper, None
            if reaper is not None:
                reaper.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def start_cluster(address: str | None) -> Cluster:
    """Return the cluster for an executor: the one at an address, or a private one. Raises ClusterError."""
    return Cluster(address, {name: os.environ.get(name, value) for name, value in _ALLOCATOR.items()})


def _reason(error: Exception) -> str:
    """Return why Ray did not start. Names the home folder if it cannot be written."""
    home = Path.home()
    if isinstance(error, OSError) and error.filename and home in Path(os.fsdecode(error.filename)).parents:
        return f"the home folder {home} cannot be written ({error.strerror}); point HOME at one that can"
    return first_line(error)


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT. Ray itself would try for ten minutes."""
    found = _HOST_PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found["host"], int(found["port"])), timeout=_KNOCK_SECONDS).close()


def _hide_module(module: str, folder: Path) -> Path:
    """Return a folder in `folder` that makes imports of a module fail where it comes first on the path."""
    found = folder / "hidden"
    found.mkdir()
    (found / f"{module}.py").write_text(f'raise ImportError("{module} is not used here")\n')
    return found


@contextlib.contextmanager
def _private(ray: Any, environment: Mapping[str, str]) -> Iterator[None]:
    """Restrict a cluster started inside the block to this user and this machine: its own token, loopback ports.

    Its processes inherit the settings and the environment. They are reset after the block, for a cluster that is joined
    later.
    """
    constants = ray._private.ray_constants
    # RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is named after its first use. On every system, 0 makes Ray stay on this machine.
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        **START_SETTINGS,
        **environment,
    }
    before = {name: os.environ.get(name) for name in settings}
    clusters = constants.ENABLE_RAY_CLUSTER
    os.environ |= settings
    constants.ENABLE_RAY_CLUSTER = False
    _read_settings(ray)
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_settings(ray: Any) -> None:
    """Make Ray read its token and its authentication mode from the environment again.

    Ray caches both at their first use, perhaps for an earlier private cluster of this process.
    """
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    ray._raylet.Config.initialize("")


def _check_private(folder: Path, ray: Any) -> None:
    """Check that others can neither enter a cluster's folder nor reach its node from another machine.

    Raises:
        WorkerError: Ray did not follow its settings.
    """
    folder.chmod(0o700)
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise WorkerError(f"{folder}: others can enter Ray's folder; set RAY_TMPDIR to a file system with permissions")
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {_LOOPBACK}:
        raise WorkerError(
            f"Ray {ray.__version__} serves {', '.join(sorted(addresses))}, expected {_LOOPBACK} alone; use "
            "--executor inline"
        )


class _ToLog(io.TextIOBase):
    """Replaces standard output while Ray runs. Ray prints its nodes' reports there, amid our JSON."""

    def write(self, text: str) -> int:
        if text.strip():
            log.info("Ray: %s", text.strip())
        return len(text)


def _quiet_init(ray: Any, **settings: Any) -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)


@contextlib.contextmanager
def _signals_kept(ray: Any) -> Iterator[None]:
    """Keep the handler of SIGTERM while Ray starts, and after it.

    Ray installs one that raises SystemExit, which is lost if it arrives in a callback, so the run would go on. Then it
    installs a compiled one that aborts; that one is replaced at the end.
    """
    before, utils = signal.getsignal(signal.SIGTERM), ray._private.utils
    install, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = install
        with contextlib.suppress(ValueError):  # not the main thread, the only one that can; no command starts Ray there
            signal.signal(signal.SIGTERM, before)
