"""The task and the result of a proof, as the driver exchanges them with workers. Imports no model code."""

from dataclasses import dataclass, field
from typing import Any, Literal

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.registry.documents import ProofRecord, VersionManifest

COPIES = 3
"""Memory of a proof, as a multiple of its model's bytes: the model, tensors on their way into it, activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """How a model is run: the code that builds it, and its inputs. Paths are absolute."""

    adapter: str | None = None
    """The member of the family, if the manifest names it."""
    builder: str | None = None
    """As `--builder`. Default: the configuration, then the architecture that the tensors imply."""
    upstream: str | None = None
    """As `--upstream`."""
    config: tuple[str, dict[str, Any]] | None = field(default=None, hash=False)
    """The transformers configuration beside the weights: its path and its content."""
    inputs: str | None = None
    """FILE.py:function that gives batches, for a model without an adapter."""
    metric: str | None = None
    """FILE.py:function that compares two outputs."""
    pictures: str | None = None
    """The user's own folder of pictures."""
    required: bool = False
    """Whether a proof that cannot be made is an error."""
    int8: bool = False
    """Whether the version is measured on int8 tensor cores too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofTask:
    """A proof to make, of shards that are all in the store."""

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
        """About how much memory it takes."""
        return COPIES * self.checkpoint.nbytes

    @property
    def effort(self) -> int:
        """Return an effort above every shard's: a model waits for its proof, and nothing else of it can run."""
        return self.nbytes << 10

    @property
    def signature(self) -> object:
        """Return a signature unlike any other task's."""
        return (self.model, self.index)

    @property
    def patience(self) -> int:
        """How many times longer than a shard it may take: on int8 the model runs once or twice more, metered."""
        return 4 if self.subject.int8 else 1

    @property
    def memory_remedy(self) -> str:
        """The remedy if it runs out of memory."""
        return "use a machine with more memory, or leave the proof out by `proof: false` in the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The result: a record, or the reason why there is none."""

    record: ProofRecord | None
    missing: str = ""
    """Why no proof could be made, and how to get one."""
    picture: bytes = b""
    """WebP: masks of both models side by side; empty for a model without masks."""
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(self.stages.values())
