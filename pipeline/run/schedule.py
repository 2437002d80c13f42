"""The schedule lock: runs of the same models take turns. A scheduled run gives up if another run is active; others
wait."""

import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.errors import BusyError
from birkhoff.pipeline.registry.leases import schedule_lock
from birkhoff.pipeline.store.base import Store

_POLL_SECONDS = 1.0


@contextmanager
def in_turn(
    store: Store, models: Iterable[str], *, wait: bool, tell: Callable[[str], object] = lambda _: None
) -> Iterator[None]:
    """Hold the schedule lock of these models in the store for the block.

    With `wait`, wait for an earlier run, after passing its holder to `tell`. The lease of a run that died on this
    machine is not waited for, so the same command resumes at once. If two machines share a host name, a live run may be
    taken for a dead one; then both work, and publish the same versions.

    Raises:
        BusyError: Another run is active, and `wait` is not set.
        StoreError: The store failed.
    """
    names, told = list(models), False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(schedule_lock(store, names))
                break
            except BusyError as error:
                if not wait:
                    raise
                if _dead_here(error):
                    break
                if not told:
                    tell(f"another run of these models is at work ({error.holder}); waiting for it to end")
                told = True
            interrupt.check()
            time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # two waiting runs must not collide again
        yield


def _dead_here(error: BusyError) -> bool:
    """Return whether the holder was a process of this machine that no longer runs."""
    if error.host != socket.gethostname() or error.pid is None:
        return False
    try:
        os.kill(error.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
