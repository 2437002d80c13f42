"""One model on its way through a run, its line of the result table, and what the run ends with."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.tensor import FALLBACKS
from birkhoff.pipeline.artifact import ShardRecord
from birkhoff.pipeline.errors import PartialError
from birkhoff.pipeline.passes import Passes
from birkhoff.pipeline.planned import Planned
from birkhoff.pipeline.publish import Version
from birkhoff.pipeline.report import Status


@dataclass(slots=True, kw_only=True)
class ModelRun:
    """One model on its way through a run. `seconds` is wall time from the run's start to its end."""

    name: str
    profile: str
    planned: Planned | None = None
    source_sha256: str = ""
    source_state: dict[str, list[int]] = field(default_factory=dict)
    status: Status | None = None
    error: BirkhoffError | None = None
    version: Version | None = None
    before: Version | None = None
    """What `latest` pointed at when the run began."""
    passes: Passes | None = None
    records: dict[int, ShardRecord] = field(default_factory=dict)
    reused: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def fail(self, error: BirkhoffError) -> None:
        """Give this model up; the others go on."""
        self.status, self.error = "failed", error

    @property
    def source_bytes(self) -> int:
        """Size of the source file; 0 where it could not be read."""
        return self.planned.checkpoint.nbytes if self.planned else 0

    def row(self) -> dict[str, object]:
        """The model's line of the result table, under the keys of `--json`."""
        manifest = self.version.manifest if self.version else None
        unknown = dict.fromkeys(("stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median"))
        return {
            "model": self.name,
            "profile": self.profile,
            "version": self.version.name if self.version else None,
            "digest": self.version.digest if self.version else None,
            "same_as": self.version.same_as if self.version else None,
            "status": self.status,
            **(manifest.figures() if manifest else {"source_bytes": self.source_bytes or None, **unknown}),
            "seconds": round(self.seconds, 2),
            "shards": len(self.records) or None,
            "shards_reused": self.reused,
            "stages": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "target_db": manifest.recipe.get("target_db") if manifest else None,
            "passes": self.passes.count if self.passes else 0,
            "warnings": self.warnings(),
            "error": str(self.error) if self.error else None,
        }

    def warnings(self) -> list[str]:
        """Tensors that are lossless for what their weights are, though coding was asked for."""
        shards = self.version.manifest.shards if self.version else ()
        fallen = {name: reason for shard in shards for name, reason in (shard.fallbacks or {}).items()}
        return [f"tensor {name!r} is stored lossless: {FALLBACKS.get(why, why)}" for name, why in fallen.items()]


def failure(errors: Sequence[BirkhoffError | None]) -> BirkhoffError | None:
    """What the models of a run, one entry for each, make it end with: their one kind of error, or PartialError."""
    failed = [error for error in errors if error is not None]
    if not failed:
        return None
    if len(failed) == len(errors) and len({type(error) for error in failed}) == 1:
        return failed[0]
    return PartialError(f"{len(failed)} of {len(errors)} models failed")
