"""The sensitivity of a segmenter's outputs to its weights, on synthetic pictures: `codec.output` behind an adapter.

The outputs, each divided by its norm, are the image embedding, the logits of every mask token and the predicted IoUs,
for boxes anywhere in the picture. The masks of multi-mask prompts get half the weight of the single one, the IoUs a
third. Without them, parameters that only affect those masks would seem to have no effect.

Legend as in `adapters.base`: B pictures, K prompts per picture, M masks per prompt, S the side of the model's input.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures
from birkhoff.codec.output.statistics import Outputs, gather
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.segment.adapters.base import Segmenter

BOXES = 4
"""K."""

KEPT_SIDE = 512
"""Largest side of a model whose whole graph is kept. SAM-H's at 1024 takes 20 GB; recomputing takes 1.5."""

OTHER_MASKS = 0.5
IOU = 0.3
"""Weights of outputs, relative to the embedding and the single mask."""


def statistics(
    segmenter: Segmenter,
    *,
    seed: int,
    keep: Callable[[str, Tensor], object],
    pictures: int,
    probes: int,
    wanted: Collection[str] | None = None,
) -> dict[str, float]:
    """Return the mean sensitivity of each parameter of a segmenter's model, by name; Hessians are passed to `keep`.

    Deterministic for a model, seed and device. Other arguments, results and errors as in `gather`.
    """
    with recomputed(segmenter.blocks.values() if segmenter.side > KEPT_SIDE else ()):
        return gather(
            segmenter.model,
            outputs_of(segmenter, pictures, seed),
            batches=pictures,
            probes=probes,
            seed=seed + 2,
            keep=keep,
            wanted=wanted,
        )


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of these modules for the backward pass, which runs each again.

    The graph of a whole encoder then takes little more than that of its largest block.
    """
    with ExitStack() as stack:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(delattr, block, "forward")  # restores the class's own method
        yield


def outputs_of(segmenter: Segmenter, count: int, seed: int) -> Callable[[int], Outputs]:
    """Return a function that runs a segmenter on one of `count` synthetic pictures and returns its differentiable
    outputs."""
    drawn = synthetic_pictures(count, segmenter.side, seed)
    boxes = synthetic_boxes(count, BOXES, segmenter.side, seed + 1)

    def outputs(number: int) -> Outputs:
        interrupt.check()
        parameter = next(segmenter.model.parameters())
        picture, asked = drawn[number : number + 1], boxes[number : number + 1].to(parameter.device)
        values = segmenter.preprocessing.values(picture, segmenter.encoder_side, parameter.device).to(parameter.dtype)
        features = segmenter.embed(values)
        masks, quality = segmenter.decode(features, "box", asked, False)
        found = {"embedding": (1.0, features[-1])} | _tokens("mask", masks, 1.0)
        if masks.shape[2] == 1:
            others, qualities = segmenter.decode(features, "box", asked, True)
            found |= _tokens("other mask", others, OTHER_MASKS)
            quality = torch.cat((quality, qualities), dim=-1)
        return found | {"iou": (IOU, quality)}

    return outputs


def _tokens(name: str, masks: Tensor, weight: float) -> dict[str, tuple[float, Tensor]]:
    """Return the logits [B, K, s, s] of each of M mask tokens."""
    return {f"{name} {number}": (weight, token) for number, token in enumerate(masks.unbind(2))}
