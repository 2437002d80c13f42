"""Choose the next task: pure decisions over tasks, sizes and what is running. The executors carry them out.

Long tasks go first, so that none remains alone at the end. Others go model by model, those with the least work first,
so that versions are published while the run goes on, and not all at its end. Within a byte budget, so that memory is
bounded by the machine and not by the fleet. Never run two shards that may be duplicates at once: shards with equal
names, shapes and recipe (a frozen encoder in two models) probably hold equal bytes, so the second waits, then finds the
first's record. Shards that are encoded in any case do not wait.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace

from birkhoff.pipeline.proof.task import ProofTask
from birkhoff.pipeline.registry.documents import ShardRecord
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.statistics.task import StatisticsTask

Task = ShardTask | ProofTask | StatisticsTask


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A task with what is asked of it often, and a number shared by duplicate candidates."""

    task: Task
    effort: int
    nbytes: int
    on_gpu: bool
    kind: int


TWINS_KNOWN = 8
"""Records of twins that go with a task, the last ones. Shards of a thousand fine-tunes look the same, and are not."""

LONG = 1 / 256
"""Share of all work from which a task is long."""


class TaskQueue:
    """The waiting and the running tasks.

    `budget` bounds the source bytes in flight; a task larger than the budget runs alone. A task put back as `alone`
    runs only when no other does.
    """

    def __init__(self, tasks: Iterable[Task], *, budget: int) -> None:
        self._kinds: dict[object, int] = {}
        self._records: defaultdict[int, dict[str, ShardRecord]] = defaultdict(dict)
        self._waiting: list[_Entry] = []
        self._budget = budget
        self._running: Counter[int] = Counter()
        self._in_flight = 0
        self._alone: set[tuple[str, int]] = set()
        self._exclusive = False
        self.add(tasks)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Source bytes of the running tasks."""
        return self._in_flight

    def take(self, on_gpu: Container[bool] = (False, True)) -> Task | None:
        """Return the next task to start; None if no waiting task may start now. `on_gpu` restricts it to tasks whose
        `on_gpu` it contains."""
        idle = not self._running.total()
        if self._exclusive and not idle:
            return None
        room = self._budget - self._in_flight
        for index, entry in enumerate(self._waiting):
            fits = entry.nbytes <= room and not self._running[entry.kind]
            if (idle or (fits and not self.is_alone(entry.task))) and entry.on_gpu in on_gpu:
                self._count_running(entry, 1)
                self._exclusive = self.is_alone(entry.task)
                return self._knowing(self._waiting.pop(index))
        return None

    def note(self, task: Task, record: ShardRecord) -> None:
        """Record what became of a shard, for those that may be duplicates."""
        records = self._records[self._entry(task).kind]
        records[record.key] = record
        while len(records) > TWINS_KNOWN:
            del records[next(iter(records))]

    def _knowing(self, entry: _Entry) -> Task:
        task, records = entry.task, self._records.get(entry.kind)
        return replace(task, known=tuple(records.values())) if records and isinstance(task, ShardTask) else task

    def is_alone(self, task: Task) -> bool:
        """Return whether a task must run alone."""
        return (task.model, task.index) in self._alone

    def done(self, task: Task) -> None:
        """Record that a task that was taken has ended, successfully or not."""
        self._count_running(self._entry(task), -1)

    def put_back(self, task: Task, *, alone: bool = False) -> None:
        """Queue a running task again. With `alone` it runs by itself, after all tasks that can run together."""
        self.done(task)
        if alone:
            self._alone.add((task.model, task.index))
            self._waiting.append(self._entry(task))
        else:
            self._waiting.insert(0, self._entry(task))

    def add(self, tasks: Iterable[Task]) -> None:
        """Add tasks that follow from results."""
        if more := list(map(self._entry, tasks)):
            self._waiting = _in_order([*self._waiting, *more])

    def drop(self, model: str) -> None:
        """Remove the waiting tasks of a model that failed."""
        self._waiting = [entry for entry in self._waiting if entry.task.model != model]

    def _entry(self, task: Task) -> _Entry:
        candidates = (task.model, task.index) if task.reuse == "never" else task.signature
        kind = self._kinds.setdefault(candidates, len(self._kinds))
        return _Entry(task=task, effort=task.effort, nbytes=task.nbytes, on_gpu=task.on_gpu, kind=kind)

    def _count_running(self, entry: _Entry, change: int) -> None:
        self._running[entry.kind] += change
        self._in_flight += change * entry.nbytes


def _in_order(entries: Sequence[_Entry]) -> list[_Entry]:
    models: Counter[str] = Counter()
    for entry in entries:
        models[entry.task.model] += entry.effort
    long = LONG * models.total()

    def place(entry: _Entry) -> tuple[int, str, int]:
        model = entry.task.model
        return (-1, "", -entry.effort) if entry.effort > long else (models[model], model, -entry.effort)

    return sorted(entries, key=place)
