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
    A task that was put back as `alone` runs when nothing else does.
    """

    def __init__(self, tasks: Iterable[ShardTask], *, budget: int) -> None:
        self._waiting = sorted(tasks, key=lambda task: -task.nbytes)
        self._budget = budget
        self._running: Counter[object] = Counter()
        self._in_flight = 0
        self._alone: set[tuple[str, int]] = set()
        self._exclusive = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Source bytes of the running tasks."""
        return self._in_flight

    def take(self) -> ShardTask | None:
        """The next task to start, or None if all that wait must wait on."""
        idle = not self._running.total()
        for index, task in enumerate(self._waiting):
            fits = idle or (not self._exclusive and self._in_flight + task.nbytes <= self._budget)
            if fits and (idle or not self.is_alone(task)) and not self._running[task.signature]:
                self._running[task.signature] += 1
                self._in_flight += task.nbytes
                self._exclusive = self.is_alone(task)
                return self._waiting.pop(index)
        return None

    def is_alone(self, task: ShardTask) -> bool:
        """Whether a task runs only while no other does."""
        return (task.model, task.index) in self._alone

    def done(self, task: ShardTask) -> None:
        """A task that was taken has ended, well or badly."""
        self._running[task.signature] -= 1
        self._in_flight -= task.nbytes

    def put_back(self, task: ShardTask, *, alone: bool = False) -> None:
        """A task that was taken has to run again, by itself if `alone`: then after all that can run beside others."""
        self.done(task)
        if alone:
            self._alone.add((task.model, task.index))
            self._waiting.append(task)
        else:
            self._waiting.insert(0, task)

    def add(self, tasks: Iterable[ShardTask]) -> None:
        """More tasks, found necessary while others ran."""
        self._waiting = sorted([*self._waiting, *tasks], key=lambda task: -task.nbytes)

    def drop(self, model: str) -> None:
        """Forget the waiting tasks of a model that failed."""
        self._waiting = [task for task in self._waiting if task.model != model]
