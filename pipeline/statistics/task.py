"""The task of taking a model's statistics, as the driver requests it, and its result. Imports no model code."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.registry.documents import StatisticsRecord, sha256
from birkhoff.pipeline.shard.task import Reuse

SEED = 0
"""Seed of pictures, boxes and probes. Proofs use another."""

COPIES = 4
"""Memory of the pass as a multiple of its model's bytes: weights, gradients, a copy in progress, intermediate results.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a kind of device can afford: pictures, and probes for each, of a model that takes pictures up to a side."""

    device: str
    pictures: int
    probes: int
    largest_side: int | None = None
    """Pixels; None for any model."""


COUNTS = (
    Counts(device="cuda", pictures=64, probes=1, largest_side=512),
    Counts(device="cuda", pictures=24, probes=1),
    Counts(device="cpu", pictures=24, probes=1, largest_side=512),
    Counts(device="cpu", pictures=12, probes=1),
)
"""Best first. If a store has several, the first is used. Another picture tells more than another probe of the same
one: at a tenth of LiteMedSAM's bytes, 64 pictures with one probe are as good as with four, 16 with four are slightly
worse, and 24 with one are within the noise of 64. A picture of a model at 1024 pixels has as many positions as sixteen
at 256. It takes a CPU minutes, and an H200 half a second of SAM-H."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsTask:
    """A request for statistics, to be found or taken."""

    model: str
    source_sha256: str
    checkpoint: Checkpoint
    subject: Subject
    reuse: Reuse = "trust"
    index: int = -2
    """The index of no shard and no proof."""

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"the statistics of {self.model}"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is of use: it runs the model."""
        return True

    @property
    def nbytes(self) -> int:
        """Approximate memory that the task needs."""
        return COPIES * self.checkpoint.nbytes

    @property
    def effort(self) -> int:
        """Places the task before every shard, because its model can do nothing without it."""
        return self.nbytes << 10

    @property
    def signature(self) -> object:
        """Equal for models with the same statistics, so that the second finds what the first stored."""
        return keys_of(self.source_sha256, self.subject)

    @property
    def patience(self) -> int:
        """How many times longer than a shard it may take. On a CPU, each picture of a large member takes minutes."""
        return max(counts.pictures for counts in COUNTS)

    @property
    def memory_remedy(self) -> str:
        """What to do if memory is too small."""
        return "use a GPU, or a machine with more memory, or name another `allocation` in the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The result: the record, whose Hessians are all in the store, and the seconds of each stage."""

    record: StatisticsRecord
    reused: bool
    stages: dict[str, float]


def counts_on(device: str, side: int | None = None) -> Counts:
    """Return what a kind of device can afford for a model whose input has this side, pixels; None if it is unknown. An
    unknown kind counts as a CPU."""
    kind = device if any(counts.device == device for counts in COUNTS) else "cpu"
    return next(
        counts
        for counts in COUNTS
        if counts.device == kind and (counts.largest_side is None or (side is not None and side <= counts.largest_side))
    )


def keys_of(source_sha256: str, subject: Subject) -> tuple[str, ...]:
    """Return the keys under which a model's statistics may be stored, in the order of `COUNTS`."""
    return tuple(dict.fromkeys(key_of(source_sha256, subject, counts) for counts in COUNTS))


def key_of(source_sha256: str, subject: Subject, counts: Counts) -> str:
    """Return the key of statistics: everything that determines them except the device's rounding, by content, not by
    path."""
    with LOADING:
        from birkhoff.codec.output.pictures import PICTURES_VERSION
        from birkhoff.codec.output.statistics import STATISTICS_VERSION

    code = [_content(subject.builder), _content(subject.inputs)]
    run_as = [subject.adapter, subject.config[1] if subject.config else None, code]
    taken = [PICTURES_VERSION, STATISTICS_VERSION, SEED, counts.pictures, counts.probes]
    return hashlib.sha256(json.dumps([taken, source_sha256, run_as], sort_keys=True).encode()).hexdigest()


def _content(code: str | None) -> str | None:
    """Return what identifies a function of the user's code: the digest of its file, and its name."""
    if code is None:
        return None
    path, colon, function = code.partition(".py:")
    file = Path(f"{path}.py")
    return f"{sha256(file.read_bytes())}:{function}" if colon and file.is_file() else code
