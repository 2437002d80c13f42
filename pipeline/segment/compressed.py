"""A segmenter that computes on compressed weights."""

from pathlib import Path

from torch import nn

from birkhoff.pipeline.load.builders import compressed_model
from birkhoff.pipeline.load.layer_forms import Compute
from birkhoff.pipeline.segment.adapters.base import Segmenter
from birkhoff.pipeline.segment.adapters.families import segmenter_of


def compressed_segmenter(
    reference: str,
    store: str | None = None,
    *,
    builder: str | None = None,
    upstream: Path | None = None,
    near: Path | None = None,
    adapter: str | None = None,
    device: str,
    compute: Compute = "float",
) -> Segmenter:
    """Return an artifact's model behind an adapter: the named one, else the artifact's own, else the usual one.

    `compute` is as in `load_into`. A model that no adapter runs is refused after its headers were read and before its
    weights are fetched.

    Raises:
        BuilderError: Nothing can build it, or no adapter runs it.
        ModelMismatchError, ArtifactNotFoundError, IntegrityError, StoreError: As in `compressed_model`.
    """
    found: list[Segmenter] = []

    def accept(model: nn.Module, own: str | None) -> None:
        found.append(segmenter_of(model, own if adapter is None else adapter))

    model = compressed_model(
        reference, store, builder=builder, upstream=upstream, near=near, device=device, compute=compute, accept=accept
    )
    (segmenter,) = found
    segmenter.model = model
    return segmenter
