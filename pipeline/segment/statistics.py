"""What the outputs of a segmenter feel of its weights, on synthetic pictures: `codec.output` behind an adapter.

Outputs, each over its own norm: the image embedding, the logits of every mask token and the predicted IoUs, for boxes
anywhere in the picture. The masks that several-mask prompts get count half of the single one, the IoUs a third of it:
without them, what makes those masks would count as felt by nothing.

Legend as in `adapters.base`: B pictures, K prompts for each, M masks a prompt, S the side of the model's input.
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
"""Up to so many pixels of a model's side its whole graph is kept. That of SAM-H at 1024 takes 20 GB, this way 1.5."""

OTHER_MASKS = 0.5
IOU = 0.3
"""Weights of outputs, that of the embedding and of the single mask being 1."""


def statistics(
    segmenter: Segmenter,
    *,
    seed: int,
    keep: Callable[[str, Tensor], object],
    pictures: int,
    probes: int,
    wanted: Collection[str] | None = None,
) -> dict[str, float]:
    """Mean sensitivity of each parameter of a segmenter's model, by name; Hessians go to `keep`.

    The same for the same model, seed and device. Arguments, result and errors else as in `gather`.
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
    """Of what these modules compute, backward passes keep the inputs alone: each then runs once more.

    So the graph of a whole encoder takes little more than that of its largest block.
    """
    with ExitStack() as stack:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(delattr, block, "forward")  # the class's own is there again
        yield


def outputs_of(segmenter: Segmenter, count: int, seed: int) -> Callable[[int], Outputs]:
    """What runs a segmenter on each of so many synthetic pictures and gives its outputs, differentiable."""
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
    """The logits [B, K, s, s] of each of M mask tokens."""
    return {f"{name} {number}": (weight, token) for number, token in enumerate(masks.unbind(2))}
