"""Whole checkpoints through our codec and through its baselines: verified, then timed."""

import ctypes
import math
import multiprocessing
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from birkhoff.codec import paper, rate
from birkhoff.codec.container import parse, serialise
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.metrics import Fidelity, fidelity, sqnr_db
from birkhoff.codec.profiles import PROFILES, Profile
from birkhoff.codec.tensor import decode_tensor
from tests.codec.by_profile import encode_tensor
from tests.harness.benchmarks import baselines
from tests.harness.benchmarks.checkpoints import Checkpoint
from tests.harness.benchmarks.common import processor_seconds

REPEATS = 3


class WrongResultError(BirkhoffError):
    """A codec gave back something other than it should: nothing is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One codec on one checkpoint.

    `bytes` counts everything stored. The errors are over the tensors that baselines code; `least_db` and `median_db`
    over those among them that came back changed. Seconds are processor time of one thread for the whole checkpoint.
    """

    name: str
    about: str
    weights: int
    bytes: int
    source_bytes: int
    sqnr_db: float
    least_db: float
    median_db: float
    max_abs: float
    encode_s: float
    decode_s: float
    at_equal_error: float | None = None
    """Bits a weight of our default coder, every tensor at this row's error on it or less."""

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.bytes / self.weights

    @property
    def ratio(self) -> float:
        """Bytes of the float32 source file over stored bytes."""
        return self.source_bytes / self.bytes

    def record(self) -> dict[str, Any]:
        """For the JSON file; infinite decibels become None."""
        values = {**asdict(self), "bits": self.bits, "ratio": self.ratio}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Coder(Protocol):
    """Encodes all tensors of a checkpoint and decodes them again."""

    def encode(self, tensors: Mapping[str, Tensor]) -> Any: ...

    def decode(self, coded: Any) -> dict[str, Tensor]: ...

    def size(self, coded: Any) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """Our codec: a container, every byte of it counted. `overrides` names the profile of single tensors."""

    profile: Profile
    overrides: Mapping[str, Profile]

    def encode(self, tensors: Mapping[str, Tensor]) -> bytes:
        coded = (encode_tensor(name, t, self.overrides.get(name, self.profile)).tensor for name, t in tensors.items())
        return serialise(list(coded))

    def decode(self, coded: bytes) -> dict[str, Tensor]:
        return {stored.name: decode_tensor(stored) for stored in parse(coded)}

    def size(self, coded: bytes) -> int:
        return len(coded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """A baseline on the tensors named `lossy`; all others lie beside them as they are."""

    baseline: baselines.Baseline
    lossy: frozenset[str]

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[baselines.Part, ...], tuple[int, ...]]]:
        return {
            name: (self.baseline.encode(t) if name in self.lossy else (t,), tuple(t.shape))
            for name, t in tensors.items()
        }

    def decode(self, coded: Any) -> dict[str, Tensor]:
        return {
            name: self.baseline.decode(parts, shape) if name in self.lossy else parts[0]
            for name, (parts, shape) in coded.items()
        }

    def size(self, coded: Any) -> int:
        return sum(baselines.size(parts) for parts, _ in coded.values())


def run(checkpoint: Checkpoint, name: str, about: str, coder: Coder) -> tuple[Row, dict[str, Fidelity]]:
    """Code a checkpoint, check what comes back, and time both ways; also the error of every lossy tensor.

    Raises:
        WrongResultError: names, shapes or dtypes came back changed, or a tensor that should not change did.
    """
    tensors = checkpoint.tensors
    coded = coder.encode(tensors)
    errors = _errors(
        checkpoint, coder.decode(coded), exact=not isinstance(coder, Ours) or coder.profile.codec != "paper"
    )
    energy, error = (sum(getattr(found, key) for found in errors.values()) for key in ("energy", "error"))
    changed = [found.sqnr_db for found in errors.values() if found.error]
    row = Row(
        name=name,
        about=about,
        weights=checkpoint.weights,
        bytes=coder.size(coded),
        source_bytes=checkpoint.file_bytes,
        sqnr_db=sqnr_db(energy, error),
        least_db=min(changed, default=math.inf),
        median_db=statistics.median(changed) if changed else math.inf,
        max_abs=max(found.max_abs for found in errors.values()),
        encode_s=processor_seconds(lambda: coder.encode(tensors), REPEATS),
        decode_s=processor_seconds(lambda: coder.decode(coded), REPEATS),
    )
    return row, errors


def _errors(checkpoint: Checkpoint, decoded: Mapping[str, Tensor], *, exact: bool) -> dict[str, Fidelity]:
    tensors = checkpoint.tensors
    if list(decoded) != list(tensors):
        raise WrongResultError(f"{checkpoint.name}: other tensors came back than went in")
    lossy = checkpoint.lossy()
    for name, tensor in tensors.items():
        back = decoded[name]
        if (back.shape, back.dtype) != (tensor.shape, tensor.dtype):
            raise WrongResultError(
                f"{name}: {list(tensor.shape)} {tensor.dtype} became {list(back.shape)} {back.dtype}"
            )
        if exact and name not in lossy and not torch.equal(back, tensor):
            raise WrongResultError(f"{name}: stored as it is, yet it came back changed")
    return {name: fidelity(tensors[name], decoded[name]) for name in lossy}


def ours(checkpoint: Checkpoint, profile: Profile, overrides: Mapping[str, Profile] | None = None) -> Row:
    """Our codec under one profile, its promise checked tensor by tensor."""
    coder = Ours(profile=profile, overrides=overrides or {})
    row, errors = run(checkpoint, profile.name, profile.summary, coder)
    for name, found in errors.items():
        least = target_db(checkpoint.tensors[name], profile) if name not in coder.overrides else 0.0
        if found.sqnr_db < least:
            raise WrongResultError(f"{name}: {found.sqnr_db:.3f} dB under profile {profile.name}, promised {least:.3f}")
    return row


def target_db(weight: Tensor, profile: Profile) -> float:
    """The least SQNR that a profile promises for a tensor it codes."""
    if profile.codec == "paper":
        return -math.inf
    if profile.target_db is not None:
        return profile.target_db
    published = paper.published_error(weight, per_row=weight.dim() == 2)
    highest = rate.TARGET_DB_RANGE[1]
    return highest if published is None else min(published, highest)


def theirs(checkpoint: Checkpoint, baseline: baselines.Baseline) -> Row:
    """A baseline, and beside it our default coder with every tensor at the baseline's error or less."""
    lossy = checkpoint.lossy()
    row, errors = run(checkpoint, baseline.name, baseline.about, Theirs(baseline=baseline, lossy=frozenset(lossy)))
    if baseline.lossless:
        return row
    overrides = {name: at(found.sqnr_db) for name, found in errors.items()}
    coder = Ours(profile=PROFILES["balanced"], overrides=overrides)
    coded = coder.encode(checkpoint.tensors)
    found = _errors(checkpoint, coder.decode(coded), exact=True)
    worse = [name for name in lossy if found[name].sqnr_db < errors[name].sqnr_db]
    if worse:
        raise WrongResultError(f"{worse[0]}: worse than {baseline.name} where it should be at least as good")
    return replace(row, at_equal_error=8 * coder.size(coded) / row.weights)


def at(sqnr: float) -> Profile:
    """Our default coder at another target; lossless (no tensor is large enough) for targets out of its reach."""
    lowest, highest = rate.TARGET_DB_RANGE
    balanced = PROFILES["balanced"]
    if sqnr > highest:
        return replace(balanced, name="lossless", min_weights=1 << 62)
    return replace(balanced, name=f"{sqnr:.2f} dB", target_db=max(sqnr, lowest))


def two_processes(checkpoint: Checkpoint, profile: Profile) -> tuple[float, float]:
    """Weights a second, encoding and decoding, of two processes that each code the whole checkpoint at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    with ProcessPoolExecutor(2, mp_context=context, initializer=_share, initargs=(barrier,)) as pool:
        jobs = [pool.submit(_both_ways, checkpoint, profile) for _ in range(2)]
        times = [job.result() for job in jobs]
    encode, decode = (sum(checkpoint.weights / seconds for seconds in column) for column in zip(*times, strict=True))
    return encode, decode


_barrier: Any = None


def _share(barrier: Any) -> None:
    global _barrier  # a barrier reaches a worker when it starts, and only then
    _barrier = barrier
    torch.set_num_threads(1)


def _both_ways(checkpoint: Checkpoint, profile: Profile) -> tuple[float, float]:
    coder = Ours(profile=profile, overrides={})
    coded = coder.encode(checkpoint.tensors)
    coder.decode(coded)
    _barrier.wait()
    encode_s = processor_seconds(lambda: coder.encode(checkpoint.tensors), REPEATS)
    _barrier.wait()
    return encode_s, processor_seconds(lambda: coder.decode(coded), REPEATS)


def peak_memory(weight: Tensor, profile: Profile) -> float:
    """Greatest memory of a process while it encodes a tensor, the tensor included, over the tensor's bytes; Linux."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, weight, profile).result()


def _peak(weight: Tensor, profile: Profile) -> float:
    torch.set_num_threads(1)
    weight = weight.clone()  # what came from the other process would count only when first touched
    encode_tensor("warm up", torch.randn(1024, 256), profile)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    encode_tensor("weight", weight, profile)
    return 1 + (status("VmHWM") - before) / weight.nbytes


def status(key: str) -> int:
    """A line of `/proc/self/status` that is in kB, in bytes; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
