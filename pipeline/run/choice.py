"""Choose how a run's tasks are executed: by Ray's workers, or in threads of this process.

Ray takes seconds to start. So it is imported as soon as it is known to be needed, and starts in a thread, beside the
import of torch and the planning of models.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import ClusterError
from birkhoff.pipeline.plan.manifest import SHARD_SECONDS
from birkhoff.pipeline.run.cluster import Cluster, import_ray, start_cluster
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._cluster: Future[Cluster] | None = None

    def ahead(self, nbytes: int) -> None:
        """Begin to start Ray, unless that has begun, if a demand of at least so many bytes needs it. An error waits for
        `start`."""
        if nbytes and self._cluster is None and self._takes_ray(Demand(nbytes=nbytes, gpu=False)):
            # Imports in two threads wait for each other at every file: 5 s for what takes 2.5 s in turn.
            with suppress(ClusterError):
                import_ray()
            self._cluster = self._thread.submit(start_cluster, self._address)

    def start(self, demand: Demand) -> "Executor":
        """Return the executor for a demand. Raises ClusterError if Ray is needed and does not start."""
        from birkhoff.pipeline.run.inline import InlineExecutor
        from birkhoff.pipeline.run.ray import RayExecutor

        if self._cluster is not None or self._takes_ray(demand):
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
        return InlineExecutor(self._store, workers=self._workers, gpu=demand.gpu)

    def _takes_ray(self, demand: Demand) -> bool:
        if self._ray is not None:
            return self._ray
        named = self._address is not None or self._workers is not None or self._seconds is not None
        return named or not threads_suffice(demand)

    def _started(self) -> Cluster:
        started, self._cluster = self._cluster, None
        if started is None:
            return start_cluster(self._address)
        try:
            cluster = started.result()
        except BaseException:
            self._cluster = started  # it may still be starting
            raise
        return cluster  # the executor ends it

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with interrupt.held():
            self._thread.shutdown()
            if self._cluster is not None:
                with suppress(ClusterError, interrupt.Interrupted):  # then there is nothing to end
                    self._cluster.result().close()
