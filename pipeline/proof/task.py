"""The task and the result of a proof, as the driver exchanges them with workers. Imports no model code."""

from dataclasses import dataclass, field
from typing import Any, Literal

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.registry.documents import ProofRecord, VersionManifest

COPIES = 3
"""Memory of a proof as a multiple of its model's bytes: the model, the tensors being loaded, and activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """How a model is run: the code that builds it, and its inputs. Paths are absolute."""

    adapter: str | None = None
    """The adapter, if the manifest names one."""
    builder: str | None = None
    """As `--builder`. By default the configuration decides, then the architecture that the tensors imply."""
    upstream: str | None = None
    """As `--upstream`."""
    config: tuple[str, dict[str, Any]] | None = field(default=None, hash=False)
    """The path and content of the transformers configuration beside the weights."""
    inputs: str | None = None
    """FILE.py:function that yields batches, for a model without an adapter."""
    metric: str | None = None
    """FILE.py:function that compares two lists of outputs."""
    pictures: str | None = None
    """The user's own folder of pictures."""
    required: bool = False
    """Whether a proof that cannot be made is an error."""
    int8: bool = False
    """Whether the version is measured on int8 tensor cores too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofTask:
    """A proof to make. All its shards are in the store."""

    model: str
    manifest: VersionManifest
    """The manifest of the version to be published."""
    checkpoint: Checkpoint
    subject: Subject
    reuse: Literal["never"] = "never"
    index: int = -1
    """Not the index of a shard."""

    @property
    def label(self) -> str:
        """The task's name in messages."""
        return f"the proof of {self.model}"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is of use: it runs the model."""
        return True

    @property
    def nbytes(self) -> int:
        """An estimate of the memory that the proof needs."""
        return COPIES * self.checkpoint.nbytes

    @property
    def effort(self) -> int:
        """An effort above every shard's, so that proofs start first: a model's version waits for its proof."""
        return self.nbytes << 10

    @property
    def signature(self) -> object:
        """A signature that no other task has."""
        return (self.model, self.index)

    @property
    def patience(self) -> int:
        """How many times longer than a shard it may take: on int8 the model runs once or twice more, metered."""
        return 4 if self.subject.int8 else 1

    @property
    def memory_remedy(self) -> str:
        """What to do if the proof runs out of memory."""
        return "use a machine with more memory, or leave the proof out by `proof: false` in the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A proof's record, or the reason why there is none."""

    record: ProofRecord | None
    missing: str = ""
    """Why no proof could be made, and how to get one."""
    picture: bytes = b""
    """WebP with both models' masks side by side, empty for a model without masks."""
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        """The sum over all stages."""
        return sum(self.stages.values())
