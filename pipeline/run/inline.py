"""An executor that runs shards in threads of this process: for a few models without a GPU, and machines without Ray.

Ray's workers take longer to start than one model takes to compress (see `demand.START_BYTES`). Reading, hashing, the
codec's native code and torch's operations leave the interpreter's lock, so shards run side by side, one per processor
up to a few; on a GPU each on a stream of its own. Statistics and proofs use all processors, and import model code: they
run in the main thread, and nothing beside them. Unlike a worker of Ray, a thread that hangs cannot be ended, and what
breaks the process ends the run. The next run continues from the store in either case. A run that is to stop ends its
threads at their next step, after the tensor or the request at hand: an exception raised in a thread from outside could
leave a lock held that others wait for.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from types import TracebackType

import torch

from birkhoff.codec.native.processors import processors
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.run.outcome import Outcome, again_alone
from birkhoff.pipeline.run.queue import Task, TaskQueue
from birkhoff.pipeline.run.worker import Worker
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.store.base import StoreAddress

CPU_WORKERS = 8
"""Most threads that share the interpreter's lock. With 16 on as many cores the family takes 43 s, with 8 it takes 31 s;
SAM-H and SAM-B together take 10.0, 7.8 and 8.1 s with 4, 8 and 12."""

GPU_WORKERS = 6
"""Most threads that share a GPU. Feedback with paths occupies few of its processors, and the CPU works on one shard
while the GPU works on others; the interpreter's lock, which every launch needs, bounds what more threads would gain."""

GPU_BYTES = 2 << 30
"""Memory of a GPU for each of these threads: an estimate for the largest matrices of SAM-H, with copies in float64."""


class InlineExecutor(AbstractContextManager["InlineExecutor"]):
    """Runs up to `workers` tasks at a time in threads of this process. By default that is one per processor up to
    `CPU_WORKERS`, and with `gpu`, if there is one, as many as its memory holds, up to `GPU_WORKERS`.

    An error of this package is the outcome of its task. A task that ran out of memory is tried once more, alone.
    """

    def __init__(self, store: StoreAddress, *, workers: int | None = None, gpu: bool = True) -> None:
        self._threads = torch.get_num_threads()
        """Number of torch's threads before a worker set it to one; restored at the end."""
        first = Worker(store, gpu=gpu, thread=True)
        self._workers = workers or _count(first)
        self._free = [first, *(Worker(store, gpu=gpu, thread=True) for _ in range(self._workers - 1))]
        self._running: set[_Thread] = set()
        self._ended: SimpleQueue[_Thread] = SimpleQueue()
        self._stopping = threading.Event()

    def run(self, queue: TaskQueue) -> Iterator[Outcome]:
        """Keep all workers busy; yield outcomes in the order in which tasks end."""
        while True:
            interrupt.check()
            by_itself = self._start(queue)
            while self._running:
                outcome = self._next()
                if self._workers == 1 or not again_alone(outcome, queue):
                    queue.done(outcome.task)
                    yield outcome
                by_itself = by_itself or self._start(queue)
            if by_itself is None:
                return
            outcome = self._free[0].run(by_itself)
            queue.done(by_itself)
            yield outcome

    def gpus(self) -> dict[str, str]:
        """Return name and memory of every GPU of its workers, by the GPU's identifier."""
        return dict(item for worker in self._free for item in worker.gpus().items())

    def _start(self, queue: TaskQueue) -> Task | None:
        """Start shards until all workers are busy, or none may start now. Returns a task for which all must end."""
        while self._free and (task := queue.take()):
            if not isinstance(task, ShardTask):
                return task
            with interrupt.deferred():
                thread = _Thread(self._free.pop(), task, self._ended, self._stopping)
                self._running.add(thread)
                thread.start()
        return None

    def _next(self) -> Outcome:
        """Wait for the thread that ends next."""
        ended = self._ended.get()
        self._running.remove(ended)
        self._free.append(ended.worker)
        return ended.outcome()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stopping.set()
        for thread in self._running:
            if thread.ident is not None:
                thread.join()
        for worker in (*self._free, *(thread.worker for thread in self._running)):
            worker.close()
        torch.set_num_threads(self._threads)


class _Thread(threading.Thread):
    """Runs one task on a worker until its end or `stopping`, and reports to a queue when it has ended."""

    def __init__(self, worker: Worker, task: Task, ended: "SimpleQueue[_Thread]", stopping: threading.Event) -> None:
        super().__init__(name=task.label)
        self.worker, self.task = worker, task
        self._ended, self._stopping = ended, stopping
        self._found: Outcome | BaseException | None = None

    def run(self) -> None:
        try:
            with interrupt.ends_with(self._stopping):
                self._found = self.worker.run(self.task)
        except BaseException as error:  # of the user, who asked to stop; `outcome` raises it in the main thread
            self._found = error
        finally:
            self._ended.put(self)

    def outcome(self) -> Outcome:
        """Return how the task ended, or raise what stopped it."""
        if isinstance(self._found, Outcome):
            return self._found
        raise self._found or interrupt.Interrupted()


def _count(worker: Worker) -> int:
    if not worker.on_gpu:
        return min(processors(), CPU_WORKERS)
    free, _ = torch.cuda.mem_get_info(worker.device)
    return max(1, min(processors(), GPU_WORKERS, free // GPU_BYTES))
