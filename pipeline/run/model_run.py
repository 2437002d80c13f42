"""The state of one model during a run, and its row of the result table."""

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import FALLBACKS
from birkhoff.pipeline.errors import failure_of
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.proof.subject import Subjects
from birkhoff.pipeline.registry.documents import FIGURES, BaseRecord, ShardRecord
from birkhoff.pipeline.registry.versions import Version
from birkhoff.pipeline.run.passes import Passes
from birkhoff.pipeline.run.status import Status
from birkhoff.pipeline.text import size


@dataclass(slots=True, kw_only=True)
class ModelRun:
    """The state of one model during a run. `seconds` is the wall time from the start of the run to the model's end."""

    name: str
    profile: str
    labels: dict[str, str] = field(default_factory=dict)
    """Labels for its version, from the manifest."""
    planned: Planned | None = None
    source_sha256: str = ""
    digest: Future[str] | None = None
    """What becomes `source_sha256`, while it is computed beside the run."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set once nothing is done for this model any more: its digest need not be computed to the end."""
    source_state: dict[str, list[int]] = field(default_factory=dict)
    status: Status | None = None
    error: BirkhoffError | None = None
    version: Version | None = None
    before: Version | None = None
    """The version that `latest` pointed at when the run began."""
    newer_base: BaseRecord | None = None
    """What its base means now, if its version is a difference to an older one and stays so."""
    subjects: Subjects = field(default_factory=Subjects)
    """How the model is run for its proof and its statistics."""
    passes: Passes | None = None
    records: dict[int, ShardRecord] = field(default_factory=dict)
    reused: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def fail(self, error: BirkhoffError) -> None:
        """Mark this model as failed. Other models continue."""
        self.status, self.error = "failed", error
        self.ended.set()

    @property
    def source_bytes(self) -> int:
        """Size of the source file, 0 if it could not be read."""
        return self.planned.checkpoint.nbytes if self.planned else 0

    @property
    def wants_gpu(self) -> bool:
        """Whether a GPU is of use to some of its tasks."""
        if self.subjects.proof is not None or self.subjects.statistics is not None:
            return True
        return self.planned is not None and any(task.on_gpu for task in self.planned.plan.tasks(self.name))

    def row(self) -> dict[str, object]:
        """Return the model's row of the result table, under the keys of `--json`."""
        manifest = self.version.manifest if self.version else None
        unknown = dict.fromkeys(FIGURES)
        return {
            "model": self.name,
            "profile": self.profile,
            "base": manifest.base.label if manifest and manifest.base else None,
            "base_bytes": manifest.base_bytes if manifest else None,
            "newer_base": self.newer_base.label if self.newer_base else None,
            "allocation": manifest.allocation if manifest else None,
            "version": self.version.name if self.version else None,
            "digest": self.version.digest if self.version else None,
            "same_as": self.version.same_as if self.version else None,
            "status": self.status,
            **(manifest.figures() if manifest else {**unknown, "source_bytes": self.source_bytes or None}),
            "seconds": round(self.seconds, 2),
            "shards": len(self.records) or None,
            "shards_reused": self.reused,
            "stages": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "target_db": manifest.recipe.get("target_db") if manifest else None,
            "passes": self.passes.count if self.passes else 0,
            "unproven": self.unproven,
            "warnings": self.warnings(),
            "error": str(self.error) if self.error else None,
            "failure": failure_of(self.error) if self.error else None,
        }

    @property
    def unproven(self) -> str | None:
        """Why this run could not prove the version, and how to get a proof. None if it did, or no proof was due."""
        if self.status != "published":
            return None
        proof = self.passes.proof if self.passes else None
        return self.subjects.unproven if proof is None else proof.missing or None

    def felt(self) -> str | None:
        """Return the statistics that targets were allocated by, and their origin; None without statistics."""
        statistics = self.passes.statistics if self.passes else None
        if statistics is None or self.version is None:
            return None
        record, seconds = statistics.record, sum(statistics.stages.values())
        what = f"{record.pictures} synthetic pictures" if record.adapter else f"{record.pictures} of your batches"
        origin = "found in the store" if statistics.reused else f"taken in {seconds:.0f} s and kept in the store"
        on = f"{what} with {record.probes} probes each"
        return f"targets follow from the sensitivity of its outputs on {on}, {origin}"

    def found(self) -> str | None:
        """Return the result and the cost of a search for a target of the outputs; None without a search."""
        budget = self.planned.budget if self.planned else None
        if budget is None or not budget.by_output or self.version is None or self.passes is None:
            return None
        target = self.version.manifest.recipe["target_db"]
        return f"{budget.label} is reached at {target:g} dB, the lowest such target; {self.passes.count} were proven"

    def differs(self) -> str | None:
        """Return the base of the version and the share of shards that use it; None for a model without a base."""
        if self.version is None or self.planned is None or self.planned.entry.base is None:
            return None
        manifest = self.version.manifest
        if manifest.base is None:
            return "differences to the versions in the store would save nothing; coded without a base"
        count = sum(shard.bases is not None for shard in manifest.shards)
        whole = f"{count} of {len(manifest.shards)} shards hold differences to {manifest.base.label}"
        return f"{whole}, of which it needs {size(manifest.base_bytes)} besides its own" if count else whole

    def warnings(self) -> list[str]:
        """Return results that may be unintended: a version larger than its source, or tensors that fell back to
        lossless."""
        shards = self.version.manifest.shards if self.version else ()
        fallen = {name: reason for shard in shards for name, reason in (shard.fallbacks or {}).items()}
        return [
            *self._larger(),
            *self._unproven(),
            *(f"tensor {name!r} is stored lossless: {FALLBACKS.get(why, why)}" for name, why in fallen.items()),
        ]

    def _unproven(self) -> list[str]:
        proof = self.passes.proof if self.passes and self.version else None
        return [] if proof is None or proof.record else [f"published without a proof of its masks: {proof.missing}"]

    def _larger(self) -> list[str]:
        if self.version is None or self.version.manifest.ratio >= 1:
            return []
        manifest = self.version.manifest
        stored, source = size(manifest.stored_bytes), size(manifest.source.bytes)
        tensors = sum(shard.tensors for shard in manifest.shards)
        return [
            f"the version takes {stored}, its source {source}: the metadata of {tensors} tensors takes "
            "more than coding saves; keep the source instead"
        ]
