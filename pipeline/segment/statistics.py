"""The sensitivity of a segmenter's outputs to its weights, on synthetic pictures: `codec.output` behind an adapter.

Outputs, for boxes anywhere in the picture: the masks of every token as probabilities, those of each box over their own
norm, the image embedding, and the predicted IoUs. A mask is where its logits are positive. So what moves logits far
from 0 leaves it as it is, while the probability sigmoid(l) moves by sigmoid(l) (1 - sigmoid(l)) of what l does, most
along the edge; over the norm, which is about the root of the mask's area, small objects count as large ones. The masks
that several-mask prompts get count half of the single one, the embedding a third, for prompts that were not drawn, and
the IoUs a tenth: without them, what makes those outputs would count as felt by nothing.

Worked example: logits (-8, 0.5, 6) have the probabilities (0.0003, 0.6225, 0.9975), and move these by (0.0003, 0.2350,
0.0025) of what they move by: the second pixel, on the edge, counts nearly a hundred times as much as the third.

Legend as in `adapters.base`: B pictures, K prompts per picture, M masks per prompt, S the side of the model's input.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures, synthetic_sizes
from birkhoff.codec.output.statistics import Outputs, gather
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.segment.adapters.base import Segmenter

BOXES = 4
"""K."""

KEPT_SIDE = 512
"""Largest side of a model whose whole graph is kept. SAM-H's at 1024 takes 20 GB; recomputing takes 1.5."""

OTHER_MASKS = 0.5
EMBEDDING = 0.3
IOU = 0.1
"""Weights of outputs, that of the single mask being 1."""

_LEAST_NORM = 1e-6
"""Of a mask's probabilities, where no pixel has one."""


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
    """What runs a segmenter on each of so many synthetic pictures and gives its outputs, differentiable."""
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
        found = {"embedding": (EMBEDDING, features[-1])} | _tokens("mask", masks, 1.0)
        if masks.shape[2] == 1:
            others, qualities = segmenter.decode(features, "box", asked, True)
            found |= _tokens("other mask", others, OTHER_MASKS)
            quality = torch.cat((quality, qualities), dim=-1)
        return found | {"iou": (IOU, quality)}

    return outputs


def _tokens(name: str, masks: Tensor, weight: float) -> dict[str, tuple[float, Tensor]]:
    """The probabilities [B, K, s, s] of each of M mask tokens, those of each prompt over their norm."""
    probabilities = masks.float().sigmoid()
    norms = probabilities.detach().square().sum(dim=(-2, -1), keepdim=True).sqrt()
    shares = probabilities / norms.clamp_min(_LEAST_NORM)
    return {f"{name} {number}": (weight, token) for number, token in enumerate(shares.unbind(2))}
