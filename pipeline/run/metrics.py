"""Metrics of the workers, on Ray's own Prometheus endpoint.

Every node of a Ray cluster serves them beside Ray's own, with or without dashboard; `ray.nodes()` gives each node's
`MetricsExportPort`. Ray adds the prefix `ray_` and collects every 10 s, so a scrape is up to 10 s late, and the last
seconds of a private cluster are lost. Scrape a cluster joined by `--address`, and read a run's end in its report.

| name | kind | labels |
|---|---|---|
| `ray_birkhoff_shards_total` | counter: ended tasks | `model`, `result`: see below |
| `ray_birkhoff_source_bytes_total` | counter: bytes before coding, of shards made or reused | `model`, `result` |
| `ray_birkhoff_stored_bytes_total` | counter: bytes of their containers | `model`, `result` |
| `ray_birkhoff_stage_seconds_total` | counter: worker seconds | `stage`: `read`, `key`, `find`, `encode`, ... |
| `ray_birkhoff_shard_seconds` | histogram: all stages of a shard | `result` |
| `ray_birkhoff_failures_total` | counter: shards that failed | `model`, `kind`: class of the error |
| `ray_birkhoff_retries_total` | counter: shards tried again | `model`, `reason`: see below |
| `ray_birkhoff_sqnr_db` | histogram: SQNR of every tensor coded by this run | `model` |
| `ray_birkhoff_working_bytes` | gauge: source bytes of the running shard, 0 between shards | |

A shard's result is `made`, `reused`, `estimated` or `failed`, a proof's `proven`, that of statistics `taken`, whether
they are measured or found in the store. A retry's reason is `worker died`, `out of memory` or `node lost`.

Ray computes the sum of a histogram from the middles of its buckets; counts are exact.
"""

import sys
from typing import TYPE_CHECKING, Any

from birkhoff.pipeline.proof.task import Proof
from birkhoff.pipeline.shard.task import ShardResult
from birkhoff.pipeline.statistics.task import Statistics

if TYPE_CHECKING:
    from birkhoff.pipeline.run.outcome import Outcome

_KINDS = {Proof: "proven", Statistics: "taken"}
"""Results of tasks other than shards."""

SQNR_BOUNDARIES = [18.0, 21.0, 24.0, 27.0, 29.0, 30.0, 31.0, 33.0, 36.0, 39.0, 42.0, 48.0]
SECONDS_BOUNDARIES = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0, 300.0, 900.0]


class Metrics:
    """The metrics of one process. Needs a process that Ray knows: a worker, or the driver after `ray.init`."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        by_result = ("model", "result")
        self._shards = Counter("birkhoff_shards", "Shards that ended.", by_result)
        self._source = Counter("birkhoff_source_bytes", "Bytes of shards before coding.", by_result)
        self._stored = Counter("birkhoff_stored_bytes", "Bytes of the shards' containers.", by_result)
        self._stages = Counter("birkhoff_stage_seconds", "Worker seconds by stage.", ("stage",))
        self._seconds = Histogram("birkhoff_shard_seconds", "Seconds a shard took.", SECONDS_BOUNDARIES, ("result",))
        self._failures = Counter("birkhoff_failures", "Shards that failed.", ("model", "kind"))
        self._retries = Counter("birkhoff_retries", "Shards given out again.", ("model", "reason"))
        self._sqnr = Histogram("birkhoff_sqnr_db", "SQNR of coded tensors, dB.", SQNR_BOUNDARIES, ("model",))
        self._working: Any = Gauge("birkhoff_working_bytes", "Source bytes of the shard at work.")

    def began(self, nbytes: int) -> None:
        """Record that a shard has started."""
        self._working.set(nbytes)

    def ended(self, outcome: "Outcome") -> None:
        """Record that a shard has ended, successfully or not."""
        self._working.set(0)
        task, result = outcome.task, outcome.result
        kind = "failed" if result is None else _KINDS.get(type(result), "estimated")
        if isinstance(result, ShardResult):
            kind = "reused" if result.reused else "made"
            tags = {"model": task.model, "result": kind}
            _add(self._source, task.nbytes, tags)
            _add(self._stored, result.record.bytes, tags)
            if not result.reused:
                for db in result.record.sqnr_db:
                    self._sqnr.observe(db, {"model": task.model})
        self._shards.inc(1, {"model": task.model, "result": kind})
        if result is not None:
            for stage, seconds in result.stages.items():
                _add(self._stages, seconds, {"stage": stage})
            self._seconds.observe(sum(result.stages.values()), {"result": kind})
        else:
            self._failures.inc(1, {"model": task.model, "kind": type(outcome.error).__name__})

    def retried(self, model: str, reason: str) -> None:
        """Record that a shard is tried again."""
        self._retries.inc(1, {"model": model, "reason": reason})


def _add(counter: Any, value: float, tags: dict[str, str]) -> None:
    """Add `value` to a counter, unless it is 0, which Ray refuses."""
    if value > 0:
        counter.inc(value, tags)


def metrics() -> Metrics | None:
    """Return this process's metrics; None if Ray does not run in it."""
    ray = sys.modules.get("ray")
    return Metrics() if ray is not None and ray.is_initialized() else None
