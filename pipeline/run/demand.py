"""What a run asks of its executor, as far as that is known before models are planned.

Nothing here imports torch: Ray is started before it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.download.cache import DownloadCache
from birkhoff.pipeline.download.file import local_file
from birkhoff.pipeline.plan.manifest import Manifest, ModelEntry
from birkhoff.pipeline.registry.parallel import each
from birkhoff.pipeline.registry.versions import latest_version
from birkhoff.pipeline.store.base import Store

START_BYTES = 4 << 30
"""Bytes of weights in a run from which Ray's workers are worth their start. On two cores SAM-H, 2.4 GiB, takes 11 s in
threads and 19 s with Ray, SAM-B 4 s and 13 s. On 16 cores the family of 19 takes 31 s in threads, and Ray's processes
end it in 17 s: they do not share the interpreter's lock. What also makes up for Ray's start in longer runs is that a
worker that hangs or breaks costs one try of one shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a run asks of its executor: the bytes of weights that it may have to encode, and whether some of its tasks
    are for a GPU."""

    nbytes: int
    gpu: bool


def threads_suffice(demand: Demand) -> bool:
    """Return whether a run ends earlier in threads than with Ray."""
    return demand.nbytes <= START_BYTES and not (demand.gpu and _gpus() > 1)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def new_bytes(manifest: Manifest, store: Store, mirror: Path | None) -> int:
    """Return the size of the files on this machine of models of which the store has no version.

    Nothing is opened. What cannot be found or asked for counts as nothing; planning says why. `mirror` is a folder.
    """

    def size(entry: ModelEntry) -> int:
        with suppress(BirkhoffError, OSError):
            if latest_version(store, entry.name) is None:
                return sum(path.stat().st_size for path in _files(entry, mirror))
        return 0

    return sum(each(size, manifest.models))


def _files(entry: ModelEntry, mirror: Path | None) -> Sequence[Path]:
    cache = DownloadCache.at()
    return [path for part in entry.source if (path := local_file(part, cache, mirror, check=False))]
