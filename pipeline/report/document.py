"""The report of a run: the result of every model, tensor by tensor.

`runs/<id>/report.json` holds a `RunReport`, `report.html` shows it to people. `report.schema.json` beside this file is
its JSON schema, as printed by `birkhoff report --schema`. Sizes are in bytes, times in seconds, SQNR and targets in dB,
ratios are source bytes divided by stored bytes. Fields without a value are left out.

A run writes its report when all its models have ended, successfully or not. A run that found everything up to date
writes none, so that a schedule does not fill the store with copies.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from birkhoff.pipeline.documents import Digest, Document
from birkhoff.pipeline.registry.documents import ProofRecord
from birkhoff.pipeline.run.environment import Environment
from birkhoff.pipeline.run.status import Status
from birkhoff.pipeline.run_ids import RUN_ID

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


class LayerRecord(Document):
    """A stored tensor: the entry in its shard's header, and the measurements of its validation."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    """`lattice` and `paper` are lossy; `raw` and `planes` are lossless."""
    shard: int
    """Index of its shard in the model."""
    bits_per_weight: float
    """Stored bits per weight, excluding the header's entry."""
    sqnr_db: float | None = None
    """SQNR of the decoded tensor against its source; not set for a lossless tensor."""
    target_db: float | None = None
    """Promised minimum of `sqnr_db`; not set if nothing was promised."""
    nominal_db: float | None = None
    """Under `allocation: output`, the nominal target that determines the step. `sqnr_db` may be lower."""
    max_abs_error: float = 0.0
    """Greatest |w - w'|, in the unit of the weights."""
    probe_db: float | None = None
    """SQNR of HyperLinear's output on random inputs against the source weight, for coded matrices."""
    reason: str | None = None
    """Why the tensor was kept lossless."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class ShardTiming(Document):
    """Time taken by one shard."""

    model: str
    index: int
    first: str
    """Its first tensor."""
    tensors: int
    source_bytes: int
    stored_bytes: int | None = None
    seconds: float
    stages: dict[str, float]
    reused: bool
    error: str | None = None


class TensorChange(Document):
    """A tensor that differs from the version before. Fields ending in `_a` hold old values, in `_b` new ones."""

    name: str
    change: str
    """`added`, `removed`, `changed`, or `recoded` (same source, another recipe)."""
    bits_per_weight_a: float | None = None
    bits_per_weight_b: float | None = None
    sqnr_db_a: float | None = None
    sqnr_db_b: float | None = None


class ChangeRecord(Document):
    """Changes of a new version against the one that `latest` pointed at before the run."""

    version: str | None
    """The version before."""
    digest: Digest
    stored_bytes: int
    ratio: float
    sqnr_db_min: float | None = None
    sqnr_db_median: float | None = None
    recipe: tuple[str, ...] = ()
    """Differences of the recipe, such as `target_db 30.0 -> 36.0`."""
    shards_same: int
    shards_new: int
    tensors: dict[str, int] | None = None
    """Tensors by kind of change; not set if too much differs to compare tensors one by one."""
    listed: tuple[TensorChange, ...] = ()
    """The first changed tensors."""


class ModelRecord(Document):
    """One model of a run. `seconds` is the time from the run's start to the model's end."""

    name: str
    profile: str
    allocation: str | None = None
    """How the target was divided among tensors."""
    base: str | None = None
    """The base version, to which tensors may be coded as differences: `sam-b@v3`."""
    base_bytes: int | None = None
    """Bytes of that version that readers need too."""
    status: Status
    seconds: float
    error: str | None = None
    source: str | None = None
    """Name of the source file, without its folder."""
    source_sha256: str | None = None
    version: str | None = None
    digest: Digest | None = None
    source_bytes: int | None = None
    stored_bytes: int | None = None
    ratio: float | None = None
    sqnr_db_min: float | None = None
    sqnr_db_median: float | None = None
    agreement_mean: float | None = None
    """Mean IoU of the version's masks with the original's, as its proof measured it."""
    agreement_p5: float | None = None
    """The 5th percentile of that IoU over the prompts."""
    output_db: float | None = None
    """SQNR of its mask logits, or of its outputs, in the proof."""
    proof: ProofRecord | None = None
    """The whole proof, even if it prevented publication."""
    unproven: str | None = None
    """Why this run could not make a proof, and how to get one."""
    masks: str | None = None
    """The proof's picture, a WebP in base64: both models' masks side by side, where they agree least."""
    probe_error: float | None = None
    """Greatest relative error of HyperLinear against `F.linear` with the decoded weight."""
    shards: int | None = None
    shards_reused: int = 0
    """Shards that the store already had, from an earlier run or from another model of this run."""
    reused_bytes: int = 0
    """Stored bytes of those shards."""
    stages: dict[str, float] = Field(default_factory=dict)
    """Worker seconds by stage."""
    layers: tuple[LayerRecord, ...] = ()
    """Every tensor of a version published by this run, in the checkpoint's order."""
    changes: ChangeRecord | None = None
    """Not set for a first version."""


class Totals(Document):
    """Sums over the models that have a version."""

    models: int
    published: int = 0
    up_to_date: int = 0
    failed: int = 0
    source_bytes: int = 0
    stored_bytes: int = 0
    """Sum over the models. A shard that models share counts for each."""
    unique_bytes: int = 0
    """Bytes of distinct shards: what the models take together, as equal shards are stored once."""
    new_bytes: int = 0
    """Bytes of the shards that this run made."""
    shards: int = 0
    shards_reused: int = 0
    sqnr_db_min: float | None = None
    sqnr_db_median: float | None = None


class RunReport(Document):
    """The document `runs/<id>/report.json`."""

    version: Literal[1] = 1
    """Version of this document's format."""
    run: Annotated[str, Field(pattern=f"^{RUN_ID}$")]
    started: str
    """UTC, in ISO 8601."""
    seconds: float
    store: str
    """URL of the store, without credentials."""
    settings: dict[str, Any]
    """The manifest without its sources, and the command's options."""
    environment: Environment
    totals: Totals
    error: str | None = None
    """The error that ended the run before all its models had ended."""
    models: tuple[ModelRecord, ...]
    slowest: tuple[ShardTiming, ...] = ()
    """The shards that took longest, longest first."""


def schema() -> str:
    """Return the JSON schema of `RunReport`, the content of `report.schema.json`."""
    found = RunReport.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **found}, indent=2) + "\n"
