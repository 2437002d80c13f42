"""Versions for benchmarks: made by the pipeline in this process, without a word."""

from rich.console import Console

from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.run.compress import compress
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.store.open import open_store


def compress_here(manifest: Manifest, store: str) -> ModelRun:
    """What became of the one model of a manifest; the store by its URL."""
    with open_store(store) as opened, Progress(Console(quiet=True), models=1, quiet=True) as progress:
        (run,) = compress(manifest, opened, lambda demand: InlineExecutor(opened.address, gpu=demand.gpu), progress)
    return run
