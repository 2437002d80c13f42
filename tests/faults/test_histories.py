"""Names, aliases and compare-and-swap under concurrency, judged by the history checker; and the checker itself."""

import math
import random
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import pytest

from birkhoff.pipeline.errors import AliasError, PreconditionError, StoreUnreachableError
from birkhoff.pipeline.registry.aliases import aliases, promote, rollback
from birkhoff.pipeline.registry.names import given
from birkhoff.pipeline.registry.versions import is_whole, load_version, publish, resolve
from birkhoff.pipeline.shard.run import keep_shard
from birkhoff.pipeline.store.base import Store, StoreSettings
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from tests.harness.faults import history
from tests.harness.faults.catalogue import FAULTS
from tests.harness.faults.history import Log, Op, alias, linearizable, names, register
from tests.harness.faults.proxy import Proxy, Rule
from tests.harness.faults.stages import MODEL, shard, version
from tests.patience import PATIENT_SECONDS

pytestmark = pytest.mark.faults

THREADS = 4


def op(name: str, argument: Hashable, answer: Hashable, called: float, answered: float = math.inf) -> Op:
    return Op(name=name, argument=argument, answer=answer, called=called, answered=answered)


READ_B = op("read", None, "b", 4, 5)


@pytest.mark.parametrize(
    ("good", "ops"),
    [
        (True, [op("swap", ("a", "b"), True, 1, 3), op("read", None, "a", 2, 4), READ_B]),
        (False, [op("swap", ("a", "b"), True, 1, 2), op("read", None, "a", 3, 4)]),  # stale
        (False, [op("swap", ("a", "b"), True, 1, 3), op("swap", ("a", "c"), True, 2, 4)]),  # an update lost
        (False, [op("swap", ("a", "b"), False, 1, 2), READ_B]),  # refused, and took effect
        (True, [op("swap", ("a", "b"), None, 1), READ_B]),  # no answer, took effect
        (True, [op("swap", ("a", "b"), None, 1), op("read", None, "a", 2, 3)]),  # no answer, and none
        (False, [op("swap", ("a", "b"), None, 1), op("read", None, "b", 2, 3), op("read", None, "a", 4, 5)]),
    ],
)
def test_the_checker_tells_registers_apart(good: bool, ops: list[Op]) -> None:
    assert linearizable(ops, "a", register) is good


@pytest.mark.parametrize(
    ("good", "ops"),
    [
        (True, [op("publish", "x", 2, 1, 4), op("publish", "y", 1, 2, 3)]),
        (False, [op("publish", "x", 1, 1, 4), op("publish", "y", 1, 2, 3)]),  # one name twice
        (False, [op("publish", "x", 2, 1, 2), op("publish", "y", 1, 3, 4)]),  # the later one came first
        (False, [op("publish", "x", 2, 1, 2)]),  # a gap
        (False, [op("publish", "x", 1, 1, 2), op("list", None, 0, 3, 4)]),  # acknowledged, and gone
    ],
)
def test_the_checker_tells_names_apart(good: bool, ops: list[Op]) -> None:
    assert linearizable(ops, 0, names) is good


@pytest.mark.parametrize(
    ("good", "ops"),
    [
        (True, [op("promote", "v2", (2, "v2"), 1, 3), op("rollback", 2, (3, "v1"), 2, 4)]),
        (False, [op("promote", "v2", (2, "v2"), 1, 2), op("promote", "v3", (2, "v3"), 1, 2)]),  # one gen twice
        (False, [op("promote", "v2", (2, "v2"), 1, 2), op("read", None, (1, "v1"), 3, 4)]),  # went back
        (False, [op("promote", "v2", (2, "v2"), 1, 2), op("rollback", 2, (2, "v2"), 3, 4)]),  # not moved
    ],
)
def test_the_checker_tells_aliases_apart(good: bool, ops: list[Op]) -> None:
    assert linearizable(ops, (1, ("v1",)), alias) is good


def together(*workers: Callable[[], None]) -> None:
    """Run all at once; the first error of any is raised."""
    start = threading.Barrier(len(workers))

    def run(work: Callable[[], None]) -> None:
        start.wait(PATIENT_SECONDS)
        work()

    with ThreadPoolExecutor(len(workers)) as pool:
        for future in [pool.submit(run, work) for work in workers]:
            future.result()


@pytest.fixture
def store(s3_environment: str) -> Store:
    with open_store(s3_environment, StoreSettings(max_connections=32)) as opened:
        keep_shard(opened, shard(0).blob, shard(0).record)
        yield opened


def make(store: Store, code: str) -> int:
    """Publish a version that differs from others by `code` only; its number."""
    return int((publish(store, version(0).model_copy(update={"code": code})).name or "")[1:])


def test_of_several_publishers_each_gets_the_next_name(store: Store) -> None:
    log = Log()

    def publisher(number: int) -> None:
        for turn in range(3):
            log.call("publish", f"{number}.{turn}", lambda code=f"{number}.{turn}": make(store, code))

    def reader() -> None:
        for _ in range(20):
            log.call("list", None, lambda: len(given(store, MODEL)))

    together(*(lambda number=number: publisher(number) for number in range(THREADS)), reader)
    assert linearizable(log.ops, 0, names)
    assert sorted(op.answer for op in log.ops if op.name == "publish") == list(range(1, 3 * THREADS + 1))
    for number in range(1, 3 * THREADS + 1):
        assert is_whole(store, load_version(store, MODEL, resolve(store, f"{MODEL}@v{number}").digest))
    assert resolve(store, MODEL).name == f"v{3 * THREADS}"


def test_promotions_and_rollbacks_are_one_after_another(store: Store) -> None:
    for code in "abcd":
        make(store, code)
    promote(store, MODEL, "v1")
    log = Log()

    def state() -> tuple[int, str]:
        record = aliases(store, MODEL)["stable"]
        return record.gen, record.version

    def mover(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(4):
            name = rng.choice(["v1", "v2", "v3", "v4"])

            def move(name: str = name) -> tuple[int, str]:
                after = promote(store, MODEL, name).after
                return after.gen, after.version

            log.call("promote", name, move)

    def goer_back() -> None:
        for _ in range(4):
            before = state()[0]

            def back() -> tuple[int, str] | None:
                try:
                    after = rollback(store, MODEL).after
                except (PreconditionError, AliasError):
                    return None
                return after.gen, after.version

            log.call("rollback", before, back)

    def reader() -> None:
        for _ in range(20):
            log.call("read", None, state)

    together(lambda: mover(1), lambda: mover(2), goer_back, reader)
    assert linearizable(log.ops, (1, ("v1",)), alias)
    last = max((op.answer for op in log.ops if op.answer is not None), default=(1, "v1"))
    assert state() == last


def test_compare_and_swap_holds_although_answers_are_lost(
    store: Store, s3_environment: str, embedded_server: EmbeddedServer
) -> None:
    """A writer that gives up after a lost answer does not know whether it took effect, and nor does the checker."""
    lost = next(fault for fault in FAULTS if fault.name == "answer lost after the effect (reset)")
    log, start = Log(), b"start"
    store.create("register", start)
    proxy = Proxy(target=int(embedded_server.endpoint.rsplit(":", 1)[1]))
    rule = Rule(fault=lost, methods=("PUT",), key="", times=0)
    proxy.arm(rule)
    try:
        with open_store(s3_environment, StoreSettings(endpoint=proxy.endpoint, attempts=1)) as harmed:

            def swapper(number: int) -> None:
                for turn in range(5):
                    rule.times += turn % 2  # whoever writes next loses the answer
                    before, tag = store.read("register")
                    after = f"{number}.{turn}".encode()

                    def swap(after: bytes = after, tag: str = tag) -> bool:
                        try:
                            harmed.replace("register", after, tag=tag)
                        except PreconditionError:
                            return False
                        return True

                    log.call("swap", (before, after), swap, StoreUnreachableError)
                    log.call("read", None, lambda: store.get("register"))

            together(*(lambda number=number: swapper(number) for number in range(THREADS)))
    finally:
        proxy.close()
    assert rule.injected > 0
    assert any(op.open for op in log.ops)
    assert linearizable(log.ops, start, register)


def test_what_hangs_is_told_from_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PATIENCE_SECONDS", 2.0)
    over, done = threading.Event(), list[int]()

    def slow() -> None:
        while not over.wait(0.1):
            done.append(len(done))

    threads = [threading.Thread(target=slow, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    threading.Timer(3.0, over.set).start()
    assert history.joined(threads, lambda: len(done))
    hangs = threading.Thread(target=threading.Event().wait, args=(60.0,), daemon=True)
    hangs.start()
    assert not history.joined([hangs], lambda: len(done))
