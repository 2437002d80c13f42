"""Statistics of a model as the driver asks for them, and what comes back. Imports no model code."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from birkhoff.codec.output.pictures import PICTURES_VERSION
from birkhoff.codec.output.statistics import STATISTICS_VERSION
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.proof.task import Subject
from birkhoff.pipeline.registry.documents import StatisticsRecord, sha256
from birkhoff.pipeline.shard.task import Reuse

SEED = 0
"""Of pictures, boxes and probes; those of proofs are others."""

COPIES = 4
"""Memory of the pass over the bytes of its model: weights, gradients, a copy on its way, what it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a kind of device can pay for: pictures, and probes of each."""

    device: str
    pictures: int
    probes: int


COUNTS = (Counts(device="cuda", pictures=64, probes=1), Counts(device="cpu", pictures=12, probes=1))
"""Best first; of those that a store has the first is taken. A further picture tells more than a further probe of the
same: at a tenth of LiteMedSAM's bytes 64 pictures of one probe keep what 64 of four keep, 16 of four a little less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsTask:
    """Statistics to be found, or taken."""

    model: str
    source_sha256: str
    checkpoint: Checkpoint
    subject: Subject
    reuse: Reuse = "trust"
    index: int = -2
    """No shard's, and no proof's."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"the statistics of {self.model}"

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return COPIES * self.checkpoint.nbytes

    @property
    def effort(self) -> int:
        """It comes before every shard: its model can do nothing without."""
        return self.nbytes << 10

    @property
    def signature(self) -> object:
        """Equal for models that have the same: the second finds what the first has kept."""
        return keys_of(self.source_sha256, self.subject)

    @property
    def patience(self) -> int:
        """Times as long as a shard that it may take: on a CPU each picture of a large member takes minutes."""
        return max(counts.pictures for counts in COUNTS)

    @property
    def memory_remedy(self) -> str:
        """What to do where it has no memory."""
        return "use a GPU, or a machine with more memory, or name another `allocation` in the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What comes back: the record, all of whose Hessians are in the store, and the seconds of each stage."""

    record: StatisticsRecord
    reused: bool
    stages: dict[str, float]


def counts_on(device: str) -> Counts:
    """What a kind of device takes; one that is not known, as much as a CPU."""
    return next((counts for counts in COUNTS if counts.device == device), COUNTS[-1])


def keys_of(source_sha256: str, subject: Subject) -> tuple[str, ...]:
    """Keys under which the statistics of a model may be stored, in the order of `COUNTS`."""
    return tuple(key_of(source_sha256, subject, counts) for counts in COUNTS)


def key_of(source_sha256: str, subject: Subject, counts: Counts) -> str:
    """Key of statistics: everything that decides them but for the device's rounding, by content and not by path."""
    code = [_content(subject.builder), _content(subject.inputs)]
    run_as = [subject.adapter, subject.config[1] if subject.config else None, code]
    taken = [PICTURES_VERSION, STATISTICS_VERSION, SEED, counts.pictures, counts.probes]
    return hashlib.sha256(json.dumps([taken, source_sha256, run_as], sort_keys=True).encode()).hexdigest()


def _content(code: str | None) -> str | None:
    """What tells a function of the user's code: the digest of its file, and its name."""
    if code is None:
        return None
    path, colon, function = code.partition(".py:")
    file = Path(f"{path}.py")
    return f"{sha256(file.read_bytes())}:{function}" if colon and file.is_file() else code
