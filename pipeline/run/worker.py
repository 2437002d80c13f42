"""What runs tasks one after another: a process of Ray, or a thread of this process."""

import importlib.util
import logging
import os
import threading
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

import birkhoff
from birkhoff.codec.errors import BirkhoffError
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.pipeline import logs
from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.proof.task import ProofTask
from birkhoff.pipeline.run.metrics import metrics
from birkhoff.pipeline.run.outcome import Outcome, Result, out_of_memory_outcome
from birkhoff.pipeline.run.queue import Task
from birkhoff.pipeline.shard.run import run_shard
from birkhoff.pipeline.shard.sources import SourceBuffer
from birkhoff.pipeline.shard.task import ShardTask
from birkhoff.pipeline.statistics.task import StatisticsTask
from birkhoff.pipeline.store.base import Store, StoreAddress
from birkhoff.pipeline.store.open import open_address

log: logging.Logger = logging.getLogger("birkhoff.worker")


class Worker:
    """Holds what its tasks share: the store's client, the device, and memory for sources.

    Without `gpu` it uses none. A process of Ray that was given none may see every GPU, so they are hidden from it; not
    so from a `thread`, whose program may use them itself. Each thread with a GPU has a stream of its own: on the
    stream that all begin with, they would wait for each other's kernels.
    """

    def __init__(self, store: StoreAddress, *, gpu: bool = True, thread: bool = False) -> None:
        if not gpu and not thread:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Shards are the unit of parallel work. Threads inside one would wait for each other at every small operation.
        torch.set_num_threads(1)
        logs.join_trace()
        self._address = store
        self._store: Store | None = None
        self._memory = SourceBuffer()
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        if gpu and torch.cuda.is_available():
            # The program's own choice, as a new thread begins with GPU 0. Before CUDA has started there is none.
            current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
            self._device = torch.device("cuda", current)
            self._stream = torch.cuda.Stream(self._device) if thread else None
            # Beside planning, and the first shard's reading and hashing: CUDA and Triton take seconds to start.
            threading.Thread(target=triton_serves, args=(self._device,), name="warm-up", daemon=True).start()
        self._metrics = metrics()

    @property
    def on_gpu(self) -> bool:
        """Whether it has a GPU."""
        return self._device.type == "cuda"

    @property
    def device(self) -> torch.device:
        """Where tasks for a GPU run; others run on the CPU."""
        return self._device

    def _device_for(self, task: Task) -> torch.device:
        return self._device if task.on_gpu else torch.device("cpu")

    def run(self, task: Task) -> Outcome:
        """Run one task. An error becomes its outcome."""
        if self._metrics:
            self._metrics.began(task.nbytes)
        outcome = self._run(task)
        if isinstance(task, ShardTask) and task.known:
            outcome = replace(outcome, task=replace(task, known=()))  # the driver has them
        if self._metrics:
            self._metrics.ended(outcome)
        return outcome

    def _run(self, task: Task) -> Outcome:
        log.info("start %s, %d bytes", task.label, task.nbytes)
        try:
            # Opened here, so that a store that refuses access fails the task and does not end the worker.
            self._store = self._store or open_address(self._address)
            with logs.shard(task.model, task.index), self._current(self._device_for(task)):
                return Outcome(task=task, result=self._result(task, self._store))
        except BirkhoffError as error:
            return Outcome(task=task, error=error)
        except Exception as error:
            log.debug("%s", traceback.format_exc())
            if _lacked_memory(error):
                self.trim()
                return out_of_memory_outcome(task, error)
            kind = type(error).__name__
            return Outcome(task=task, error=WorkerError(f"{task.label}: {kind}: {error}; run with --debug for more"))

    def _current(self, device: torch.device) -> AbstractContextManager[object]:
        """Launch kernels on the device, and on the worker's stream if it has one, inside the block."""
        if device.type != "cuda":
            return nullcontext()
        return torch.cuda.device(device) if self._stream is None else torch.cuda.stream(self._stream)

    def _result(self, task: Task, store: Store) -> Result:
        # Imported here, as only proofs and statistics need the code that runs models.
        if isinstance(task, ProofTask):
            from birkhoff.pipeline.proof.prove import prove

            return prove(task, store, self._device)
        if isinstance(task, StatisticsTask):
            from birkhoff.pipeline.statistics.take import take_statistics

            return take_statistics(task, store, self._device)
        return run_shard(task, store, self._device_for(task), self._memory)

    def identity(self) -> dict[str, Any]:
        """Return facts about this process: its id, whether it sees a GPU, where the package is, the origin of a
        top-level `kernels` module."""
        spec = importlib.util.find_spec("kernels")
        facts = {"pid": os.getpid(), "cuda": torch.cuda.is_available(), "package": birkhoff.__file__}
        return {**facts, "kernels": spec and spec.origin}

    def gpus(self) -> dict[str, str]:
        """Return name and memory of its GPU by the GPU's identifier; nothing without one."""
        if not self.on_gpu:
            return {}
        found = torch.cuda.get_device_properties(self._device)
        return {str(found.uuid): f"{found.name}, {found.total_memory / 2**30:.0f} GiB"}

    def trim(self) -> None:
        """Return cached GPU memory to the device."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Close the store's connections."""
        if self._store is not None:
            self._store.close()


def _lacked_memory(error: Exception) -> bool:
    """Return whether an error of Python, torch or CUDA means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
