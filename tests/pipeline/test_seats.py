from itertools import count

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.seats import QUEUED_PER_WORKER, Seats
from birkhoff.pipeline.shard import ShardTask


class Method:
    """Stands for a remote method: each call gives a new reference."""

    def __init__(self) -> None:
        self._calls = count()

    def remote(self, _task: ShardTask) -> object:
        return self, next(self._calls)


class Actor:
    def __init__(self) -> None:
        self.run = Method()


def started(workers: int) -> Seats:
    seats = Seats(lambda: (Actor(), object()), workers)
    for seat in seats:
        seats.count_start(seat)
    return seats


def hand_out(seats: Seats, waiting: int) -> list[int]:
    """Give tasks as long as a worker takes one; how many each then holds."""
    while waiting and (seat := seats.free(waiting)):
        seat.give(ShardTask(model="m", index=waiting, tensors=(), profile=PROFILES["balanced"]))
        waiting -= 1
    return [len(seat.tasks) for seat in seats]


def test_workers_hold_a_task_ahead_while_many_wait() -> None:
    assert hand_out(started(4), 100) == [QUEUED_PER_WORKER] * 4


def test_the_last_tasks_wait_for_an_idle_worker() -> None:
    seats = started(4)
    assert hand_out(seats, 4) == [1] * 4
    assert hand_out(seats, 3) == [1] * 4  # three wait: none lies behind another
    first = next(iter(seats))
    first.ended(next(iter(first.tasks)))
    assert seats.free(3) is first


def test_no_worker_is_free_before_it_has_started() -> None:
    assert Seats(lambda: (Actor(), object()), 2).free(10) is None
