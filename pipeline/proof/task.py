"""The proof of a model's final bytes as the driver hands it out, and what comes back. Imports no model code."""

from dataclasses import dataclass, field
from typing import Any, Literal

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.registry.documents import ProofRecord, VersionManifest

COPIES = 3
"""Memory of a proof over the bytes of its model: the model, tensors on their way into it, what it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """How a model is run: code that builds it, and what it is run on. Paths are absolute."""

    adapter: str | None = None
    """The family's member, where the manifest names it."""
    builder: str | None = None
    """As `--builder`; left out: the configuration, then the architecture that the tensors tell."""
    upstream: str | None = None
    """As `--upstream`."""
    config: tuple[str, dict[str, Any]] | None = field(default=None, hash=False)
    """The transformers configuration that goes with the weights: where it was found, and what it says."""
    inputs: str | None = None
    """FILE.py:function that gives batches, for a model that no adapter knows."""
    metric: str | None = None
    """FILE.py:function that compares two outputs."""
    pictures: str | None = None
    """The user's own folder of pictures."""
    required: bool = False
    """Whether a proof that cannot be made is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofTask:
    """A proof to be made, of shards that are all in the store."""

    model: str
    manifest: VersionManifest
    """Of the version that would be published."""
    checkpoint: Checkpoint
    subject: Subject
    reuse: Literal["never"] = "never"
    index: int = -1
    """No shard's."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"the proof of {self.model}"

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return COPIES * self.checkpoint.nbytes

    @property
    def effort(self) -> int:
        """It comes before every shard: only its model waits for it, and nothing can follow beside it."""
        return self.nbytes << 10

    @property
    def signature(self) -> object:
        """Equal to no other task's."""
        return (self.model, self.index)

    @property
    def patience(self) -> int:
        """Times as long as a shard that it may take."""
        return 1

    @property
    def memory_remedy(self) -> str:
        """What to do where it has no memory."""
        return "use a machine with more memory, or leave the proof out by `proof: false` in the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What comes back: the record, or why there is none."""

    record: ProofRecord | None
    missing: str = ""
    """Why no proof could be made, and how to have one."""
    picture: bytes = b""
    """WebP: masks of both models side by side; empty for a model without masks."""
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages.values())
