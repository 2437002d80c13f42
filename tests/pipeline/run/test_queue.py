from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.pipeline.checkpoint.descriptors import StoredTensor
from birkhoff.pipeline.registry.documents import ShardRecord
from birkhoff.pipeline.run.queue import TWINS_KNOWN, TaskQueue
from birkhoff.pipeline.shard.task import ShardTask, TensorPlan


def task(index: int, floats: int, *, model: str = "m", name: str | None = None) -> ShardTask:
    tensor = StoredTensor(
        name=name or f"{model}.{index}",
        dtype="float32",
        shape=(floats,),
        stride=(1,),
        offset=0,
        nbytes=4 * floats,
        path="/none",
    )
    plan = TensorPlan(tensor=tensor, decision=Decision(codec="planes"))
    return ShardTask(model=model, index=index, tensors=(plan,), recipe=PROFILES["balanced"].recipe())


def record(key: str) -> ShardRecord:
    return ShardRecord(
        key=key, blob="0" * 64, bytes=1, source_bytes=200, tensors=1, sqnr_db=(), probe_db=(), probe_error=0.0
    )


def test_largest_first() -> None:
    queue = TaskQueue([task(0, 10), task(1, 30), task(2, 20)], budget=10**9)
    assert [queue.take().index for _ in range(3)] == [1, 2, 0]  # type: ignore[union-attr]
    assert queue.take() is None


def fleet() -> list[ShardTask]:
    """Models of 300, 100 and 200 shards of one size, the last with one that is long."""
    sizes = {"large": [1000] * 300, "small": [1000] * 100, "medium": [1000] * 199 + [1 << 22]}
    return [task(n, floats, model=model) for model, own in sizes.items() for n, floats in enumerate(own)]


def test_models_end_one_after_the_other_those_with_the_least_work_first() -> None:
    queue = TaskQueue(fleet(), budget=10**12)
    taken = [found.model for found in iter(queue.take, None)]
    assert taken == ["medium"] + ["small"] * 100 + ["medium"] * 199 + ["large"] * 300


def test_what_is_added_later_has_its_place_too() -> None:
    tasks = fleet()
    queue = TaskQueue(tasks[:300], budget=10**12)
    assert [queue.take() for _ in range(10)] == tasks[:10]
    queue.add(tasks[300:])
    assert [found.model for found in iter(queue.take, None)][:102] == ["medium"] + ["small"] * 100 + ["medium"]


def test_many_small_tensors_go_before_few_larger_ones() -> None:
    decoder = replace(task(0, 10), tensors=task(0, 10).tensors * 100)
    queue = TaskQueue([task(1, 8 << 20), decoder], budget=10**9)
    assert queue.take() == decoder


def test_the_budget_holds_and_smaller_tasks_fill_it() -> None:
    queue = TaskQueue([task(0, 100), task(1, 60), task(2, 30)], budget=560)
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert (first.index, second.index, queue.in_flight) == (0, 2, 520)
    assert queue.take() is None
    queue.done(first)
    assert queue.take() is not None


def test_a_task_above_the_budget_runs_alone() -> None:
    queue = TaskQueue([task(0, 1000), task(1, 1)], budget=8)
    big = queue.take()
    assert big is not None
    assert queue.take() is None
    queue.done(big)
    assert queue.take() is not None


def test_twins_wait_for_each_other_and_others_overtake() -> None:
    duplicates = [task(0, 50, model="a", name="enc"), task(0, 50, model="b", name="enc")]
    queue = TaskQueue([*duplicates, task(1, 1)], budget=10**9)
    first, other = queue.take(), queue.take()
    assert first is not None
    assert other is not None
    assert (first.model, other.index) == ("a", 1)
    assert queue.take() is None
    queue.done(first)
    assert queue.take() == duplicates[1]


def test_twins_know_what_became_of_each_other() -> None:
    tasks = [task(0, 50, model=model, name="enc") for model in "abc"]
    queue, records = TaskQueue([*tasks, task(1, 1)], budget=10**9), [record(key * 64) for key in "12"]
    for found, expected in zip(records, tasks, strict=False):
        assert queue.take() == replace(expected, known=tuple(records[: tasks.index(expected)]))
        queue.done(expected)
        queue.note(expected, found)
    assert queue.take() == replace(tasks[2], known=tuple(records))
    assert queue.take() == task(1, 1)  # it has no twin


def test_only_the_last_of_many_twins_are_known() -> None:
    tasks = [task(0, 50, model=f"m{n}", name="enc") for n in range(TWINS_KNOWN + 4)]
    queue, records = TaskQueue(tasks, budget=10**9), [record(f"{n:064x}") for n in range(len(tasks))]
    known: tuple[ShardRecord, ...] = ()
    for found in records:
        taken = queue.take()
        assert isinstance(taken, ShardTask)
        known = taken.known
        queue.done(taken)
        queue.note(taken, found)
    assert known == tuple(records[-1 - TWINS_KNOWN : -1])


def test_twins_that_are_made_anew_in_any_case_do_not_wait() -> None:
    duplicates = [replace(task(0, 50, model=model, name="enc"), reuse="never") for model in "ab"]
    queue = TaskQueue(duplicates, budget=10**9)
    assert [queue.take(), queue.take()] == duplicates


def test_tasks_for_a_gpu_and_others_are_taken_apart() -> None:
    (plan,) = task(1, 50).tensors
    for_gpu = replace(task(1, 50), tensors=(replace(plan, decision=Decision(codec="paper")),))
    queue = TaskQueue([task(0, 100), for_gpu, task(2, 10)], budget=10**9)
    assert queue.take([True]) == for_gpu
    assert queue.take([True]) is None
    assert [found.index for found in iter(lambda: queue.take([False]), None)] == [0, 2]


def test_put_back_runs_again_and_drop_forgets() -> None:
    queue = TaskQueue([task(0, 5, model="a"), task(0, 4, model="b")], budget=10**9)
    first = queue.take()
    assert first is not None
    queue.put_back(first)
    assert queue.in_flight == 0
    assert queue.take() == first
    queue.drop("b")
    assert len(queue) == 0


def test_a_task_put_back_as_alone_runs_last_and_by_itself() -> None:
    queue = TaskQueue([task(0, 30), task(1, 20), task(2, 10)], budget=10**9)
    first = queue.take()
    assert first is not None
    queue.put_back(first, alone=True)
    others = [queue.take(), queue.take()]
    assert [other and other.index for other in others] == [1, 2]
    assert queue.take() is None
    for other in others:
        assert other is not None
        queue.done(other)
    again = queue.take()
    assert again == first
    assert queue.is_alone(first)
    assert queue.take() is None


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abc")), max_size=25), st.integers(1, 300), st.data())
@settings(max_examples=100, deadline=None)
def test_every_task_runs_once_within_the_bounds(items: list[tuple[int, str]], budget: int, data: st.DataObject) -> None:
    queue = TaskQueue([task(n, floats, name=name) for n, (floats, name) in enumerate(items)], budget=budget)
    running: list[ShardTask] = []
    ended: list[int] = []
    while len(queue) or running:
        while (started := queue.take()) is not None:
            running.append(started)
        assert running, "nothing runs although tasks wait"
        assert sum(t.nbytes for t in running) <= budget or len(running) == 1
        assert len({t.signature for t in running}) == len(running)
        done = running.pop(data.draw(st.integers(0, len(running) - 1)))
        queue.done(done)
        ended.append(done.index)
    assert sorted(ended) == list(range(len(items)))
