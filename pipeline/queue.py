"""Which shard next: a pure decision over tasks, sizes and what is running; Ray only carries it out.

Largest first, so that no long shard is left alone at the end. Within a byte budget, so that memory is bounded by the
machine and not by the fleet. And never two possible twins at once: shards of equal names, shapes and recipe (a frozen
encoder in two models) probably hold equal bytes, so the second waits for the first and then finds it in the store.
"""

from collections import Counter
from collections.abc import Iterable

from birkhoff.pipeline.shard import ShardTask


class TaskQueue:
    """Tasks that wait and tasks that run.

    `budget` bounds the source bytes in flight; a single task larger than it still runs, alone.
    """

    def __init__(self, tasks: Iterable[ShardTask], *, budget: int) -> None:
        self._waiting = sorted(tasks, key=lambda task: -task.nbytes)
        self._budget = budget
        self._running: Counter[object] = Counter()
        self._in_flight = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Source bytes of the running tasks."""
        return self._in_flight

    def take(self) -> ShardTask | None:
        """The next task to start, or None if all that wait must wait on."""
        for index, task in enumerate(self._waiting):
            fits = not self._in_flight or self._in_flight + task.nbytes <= self._budget
            if fits and not self._running[task.signature]:
                self._running[task.signature] += 1
                self._in_flight += task.nbytes
                return self._waiting.pop(index)
        return None

    def done(self, task: ShardTask) -> None:
        """A task that was taken has ended, well or badly."""
        self._running[task.signature] -= 1
        self._in_flight -= task.nbytes

    def put_back(self, task: ShardTask) -> None:
        """A task that was taken has to run again."""
        self.done(task)
        self._waiting.insert(0, task)

    def drop(self, model: str) -> None:
        """Forget the waiting tasks of a model that failed."""
        self._waiting = [task for task in self._waiting if task.model != model]
