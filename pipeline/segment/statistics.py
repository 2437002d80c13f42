"""Measure how a segmenter's outputs depend on its weights, on synthetic pictures: `codec.output` behind an adapter.

The outputs, for boxes anywhere in the picture, are the masks of every token as probabilities, those of each box divided
by their norm; the image embedding; and the predicted IoUs. A mask is where its logits are positive, so moving logits
far from 0 does not change it. The probability sigmoid(l) moves by sigmoid(l) (1 - sigmoid(l)) per unit of l, which is
largest along the edge. The norm is about the root of the mask's area, so small objects count as much as large ones. The
masks of prompts with several masks weigh half of the single mask, the embedding a third, for prompts that were not
drawn, and the IoUs a tenth. Without these, the weights behind those outputs would seem to have no effect.

Worked example: logits (-8, 0.5, 6) have the probabilities (0.0003, 0.6225, 0.9975), which move by (0.0003, 0.2350,
0.0025) per unit. The second pixel, on the edge, counts nearly a hundred times as much as the third.

Legend as in `adapters.base`: B pictures, K prompts per picture, M masks per prompt, S the side of the model's input.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures, synthetic_sizes
from birkhoff.codec.output.statistics import Outputs, gather
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.segment.adapters.base import Segmenter

BOXES = 6
OTHER_BOXES = 1
"""K, of single masks and of several: decoding is a third of the pass, and the several weigh less."""

KEPT_SIDE = 512
"""Largest side of a model whose whole graph is kept. The graph of SAM-H at 1024 takes 20 GB; recomputing takes 1.5."""

OTHER_MASKS = 0.5
EMBEDDING = 0.3
IOU = 0.1
"""Weights of outputs, relative to the single mask."""

_LEAST_NORM = 1e-6
"""Norm of a mask's probabilities if they are all near 0."""


def statistics(
    segmenter: Segmenter,
    *,
    seed: int,
    keep: Callable[[str, Hessian], object],
    pictures: int,
    probes: int,
    wanted: Collection[str] | None = None,
) -> dict[str, float]:
    """Return the mean sensitivity of each parameter of a segmenter's model, by name. Pass Hessians to `keep`.

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
    """Return a function that runs a segmenter on one of `count` synthetic pictures and returns its outputs with a
    graph."""
    side = segmenter.side
    drawn = synthetic_pictures(count, side, seed)
    sizes = synthetic_sizes(count, side, seed + 3)
    boxes = synthetic_boxes(count, BOXES, side, seed + 1)

    def outputs(number: int) -> Outputs:
        interrupt.check()
        parameter = next(segmenter.model.parameters())
        height, width = sizes[number]
        picture = drawn[number : number + 1, :, :height, :width]
        fitted = segmenter.preprocessing.fitted((height, width), side)
        inside = torch.tensor([fitted[1], fitted[0]] * 2) / side
        asked = (boxes[number : number + 1] * inside).to(parameter.device)
        values = segmenter.preprocessing.values(picture, segmenter.encoder_side, parameter.device).to(parameter.dtype)
        features = segmenter.embed(values)
        masks, quality = segmenter.decode(features, "box", asked, False)
        quality = quality.flatten()
        found = {"embedding": (EMBEDDING, features[-1])} | _tokens("mask", masks, 1.0)
        if masks.shape[2] == 1:
            others, qualities = segmenter.decode(features, "box", asked[:, :OTHER_BOXES], True)
            found |= _tokens("other mask", others, OTHER_MASKS)
            quality = torch.cat((quality, qualities.flatten()))
        return found | {"iou": (IOU, quality)}

    return outputs


def _tokens(name: str, masks: Tensor, weight: float) -> dict[str, tuple[float, Tensor]]:
    """Return the probabilities [B, K, s, s] of each of M mask tokens, those of each prompt divided by their norm."""
    probabilities = masks.float().sigmoid()
    norms = probabilities.detach().square().sum(dim=(-2, -1), keepdim=True).sqrt()
    shares = probabilities / norms.clamp_min(_LEAST_NORM)
    return {f"{name} {number}": (weight, token) for number, token in enumerate(shares.unbind(2))}
