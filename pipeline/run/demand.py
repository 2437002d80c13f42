"""What a run asks of its executor, as far as that is known before models are planned.

Importing this imports no torch. Only a small run with tasks for a GPU asks it how many there are.
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
"""Bytes of weights in a run from which Ray's workers are worth their start. On two cores SAM-H, 2.4 GiB, takes 12 s in
threads and 13 s with Ray, SAM-B 4 s and 6 s, and both take 20 s for 4.4 GiB. On 16 cores the family of 19 takes 31 s
in threads, and Ray's processes end it in 17 s: they do not share the interpreter's lock. What also makes up for Ray's
start in longer runs is that a worker that hangs or breaks costs one try of one shard."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known of a run before anything is opened."""

    new_bytes: int
    """The size of the files on this machine of models of which the store has no version."""
    complete: bool
    """Whether all files of all models are on this machine, so that nothing waits for a download."""


def look_ahead(manifest: Manifest, store: Store, mirror: Path | None) -> Outlook:
    """Return what is known of a run. `mirror` is a folder.

    What cannot be found or asked for counts as no bytes, and as not here; planning says why.
    """

    def look(entry: ModelEntry) -> Outlook:
        with suppress(BirkhoffError, OSError):
            files = _files(entry, mirror)
            sizes = sum(path.stat().st_size for path in files)
            new = latest_version(store, entry.name) is None
            return Outlook(new_bytes=sizes if new else 0, complete=len(files) == len(entry.source))
        return Outlook(new_bytes=0, complete=False)

    found = each(look, manifest.models)
    return Outlook(new_bytes=sum(one.new_bytes for one in found), complete=all(one.complete for one in found))


def _files(entry: ModelEntry, mirror: Path | None) -> Sequence[Path]:
    cache = DownloadCache.at()
    return [path for part in entry.source if (path := local_file(part, cache, mirror, check=False))]
