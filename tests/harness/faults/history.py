"""A small history checker: were these concurrent operations one after another, in some order that the clock allows?

Operations are logged with the times of their call and of their answer. A history is linearizable if each of them can be
given a moment between the two so that, in the order of these moments, every answer is the one that a sequential model
gives (Herlihy and Wing 1990). The search is that of Wing and Gong (1993), with states that were tried remembered (Lowe
2017): fast for histories of some hundred operations of few threads.
"""

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

State = TypeVar("State", bound=Hashable)
Answer = TypeVar("Answer", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """What one caller did. `answered` is infinite where no answer came: it took effect at any later time, or never."""

    name: str
    argument: Hashable
    answer: Hashable
    called: float
    answered: float

    @property
    def open(self) -> bool:
        """Whether nobody knows if it took effect."""
        return self.answered == math.inf


@dataclass
class Log:
    """Where threads write down what they do."""

    ops: list[Op] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(
        self, name: str, argument: Hashable, act: Callable[[], Answer], unknown: type[Exception] | None = None
    ) -> Answer | None:
        """Do something and log it; an error `unknown` leaves it open, and returns None."""
        called = time.monotonic()
        try:
            answer, answered = act(), time.monotonic()
        except Exception as error:
            if unknown is None or not isinstance(error, unknown):
                raise
            answer, answered = None, math.inf
        with self.lock:
            self.ops.append(Op(name=name, argument=argument, answer=answer, called=called, answered=answered))
        return answer


PATIENCE_SECONDS = 240.0
"""What does not move for so long hangs; how long all of it takes on a busy machine is no finding."""


class Stall:
    """Tells whether what `moved` returns has stood still for `PATIENCE_SECONDS`."""

    def __init__(self, moved: Callable[[], object]) -> None:
        self._moved = moved
        self._seen, self._since = moved(), time.monotonic()

    def over(self) -> bool:
        """Look once more."""
        if (now := self._moved()) != self._seen:
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since > PATIENCE_SECONDS


def joined(threads: Iterable[threading.Thread], moved: Callable[[], object]) -> bool:
    """Wait for threads while something moves; whether all have ended."""
    stall = Stall(moved)
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
            if stall.over():
                return False
    return True


def linearizable(ops: Sequence[Op], start: State, step: Callable[[State, Op], State | None]) -> bool:
    """Whether some allowed order explains every answer.

    `step` is the model: the state after an operation with this answer, None where the answer is impossible. For an open
    operation it is asked for the state after its effect, or None where it would have had none.
    """
    order = sorted(ops, key=lambda op: op.called)
    closed = sum(1 << place for place, op in enumerate(order) if not op.open)
    tried: set[tuple[int, State]] = set()
    stack: list[tuple[int, State]] = [(0, start)]
    while stack:
        done, state = stack.pop()
        if done & closed == closed:
            return True
        if (done, state) in tried:
            continue
        tried.add((done, state))
        # Whatever is next was called before any of the others had its answer.
        deadline = min(op.answered for place, op in enumerate(order) if not done >> place & 1)
        for place, op in enumerate(order):
            if op.called > deadline:
                break
            if not done >> place & 1 and (after := step(state, op)) is not None:
                stack.append((done | 1 << place, after))
    return False


def register(state: Hashable, op: Op) -> Hashable | None:
    """One object under compare-and-swap: `read` -> body; `swap` of (old, new) -> whether it took effect."""
    if op.name == "read":
        return state if op.answer == state else None
    old, new = op.argument  # type: ignore[misc]
    if op.open:
        return new if state == old else None
    if op.answer:
        return new if state == old else None
    return state if state != old else None


def names(state: int, op: Op) -> int | None:
    """Version names of a model: `publish` -> the number given, `list` -> how many there are."""
    if op.name == "list":
        return state if op.answer == state else None
    return state + 1 if op.answer == state + 1 else None


Alias = tuple[int, tuple[str, ...]]
"""Generation, and the versions by which an alias came to where it is."""


def alias(state: Alias, op: Op) -> Alias | None:
    """An alias: answers are (gen, version) after the operation, None for a rollback that was refused."""
    gen, trail = state
    if op.name == "read":
        return state if op.answer == (gen, trail[-1]) else None
    if op.name == "promote":
        after = state if trail[-1] == op.argument else (gen + 1, (*trail, str(op.argument)))
    elif op.answer is None:
        return state  # somebody moved it first: refused without an effect
    elif op.answer == (gen, trail[-1]) and op.argument == gen:
        return None  # said to have moved it, and did not
    elif op.answer == (gen, trail[-1]):
        return state  # another rollback had done it
    elif len(trail) == 1:
        return None  # there was nowhere to go back to
    else:
        after = (gen + 1, trail[:-1])
    return after if op.answer == (after[0], after[1][-1]) else None


def lifetime(state: str, op: Op) -> str | None:
    """One version name: absent, live, retired. `publish`, `retire`, and `read` -> "whole", "no", or what never may be.

    A version that is live is whole: any other answer of a reader, such as "broken", has no state that explains it.
    """
    if op.name == "publish":
        return "live" if state == "absent" else None
    if op.name == "retire":
        return "retired" if state == "live" else None
    if op.answer == "whole":
        return state if state == "live" else None
    return state if op.answer == "no" and state != "live" else None


def highest(state: int, op: Op) -> int | None:
    """The alias `latest`: `publish` of a number moves it there unless it is further on; `latest` -> the number."""
    if op.name == "latest":
        return state if op.answer == state else None
    return max(state, op.answer) if isinstance(op.answer, int) else None
