"""Choose how a run's tasks are executed: by Ray's workers, or in threads of this process.

Ray takes seconds to start. So it starts as soon as it is known to be needed, before models are planned. Its driver
imports no torch, which takes two seconds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from birkhoff.pipeline.errors import ClusterError
from birkhoff.pipeline.plan.manifest import SHARD_SECONDS
from birkhoff.pipeline.run.cluster import Cluster, start_cluster
from birkhoff.pipeline.run.demand import Demand, threads_suffice
from birkhoff.pipeline.store.base import StoreAddress

if TYPE_CHECKING:
    from birkhoff.pipeline.run.outcome import Executor


class Choice(AbstractContextManager["Choice"]):
    """The executor of a run, started once its demand is known.

    Args:
        store: The store of the run.
        ray: Whether it must be Ray's workers (True) or threads (False). With None, threads run a demand that they
            suffice for, unless a setting is given that only Ray's workers have, and every demand if Ray does not start.
        address: The Ray cluster to join; None for a private one.
        workers: How many workers or threads.
        shard_seconds: How long a worker of Ray may take for a shard; None for the default.
        told: Is called with the reason if Ray should have run the tasks and threads do.
    """

    def __init__(
        self,
        store: StoreAddress,
        *,
        ray: bool | None,
        address: str | None,
        workers: int | None,
        shard_seconds: float | None,
        told: Callable[[str], object],
    ) -> None:
        self._store, self._ray, self._address, self._workers = store, ray, address, workers
        self._seconds, self._told = shard_seconds, told
        self.in_threads: bool = False
        """Whether `start` chose threads of this process."""
        self._cluster: Cluster | None = None
        self._failed: ClusterError | None = None

    def ahead(self, nbytes: int, *, workers: bool = False) -> None:
        """Start Ray, unless it has started, if a demand of at least so many bytes needs it. Start the processes of
        `workers` with it if they will not have to wait for downloads, since each holds 0.2 GB.

        If Ray does not start, `start` says so. Raises WorkerError if the cluster is too small.
        """
        started = self._cluster is not None or self._failed is not None
        if nbytes and not started and self._takes_ray(Demand(nbytes=nbytes, gpu=False)):
            try:
                self._cluster = start_cluster(self._address)
                if workers:
                    self._cluster.start_processes(self._store, self._workers)
            except ClusterError as error:
                self._failed = error

    def start(self, demand: Demand) -> "Executor":
        """Return the executor for a demand. Raises ClusterError if Ray is needed and does not start."""
        if self._cluster is not None or self._takes_ray(demand):
            from birkhoff.pipeline.run.ray import RayExecutor

            try:
                return RayExecutor(
                    self._store,
                    cluster=self._started(),
                    workers=self._workers,
                    shard_seconds=SHARD_SECONDS if self._seconds is None else self._seconds,
                    gpu=demand.gpu,
                )
            except ClusterError as error:
                if self._ray or self._address is not None:
                    raise
                self._told(error.reason)
        from birkhoff.pipeline.run.inline import InlineExecutor  # with torch, which Ray's driver does not need

        self.in_threads = True
        return InlineExecutor(self._store, workers=self._workers, gpu=demand.gpu)

    def _takes_ray(self, demand: Demand) -> bool:
        if self._ray is not None:
            return self._ray
        named = self._address is not None or self._workers is not None or self._seconds is not None
        return named or not threads_suffice(demand)

    def _started(self) -> Cluster:
        if self._failed is not None:
            raise self._failed
        cluster, self._cluster = self._cluster, None  # the executor ends it
        return start_cluster(self._address) if cluster is None else cluster

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._cluster is not None:
            self._cluster.close()
