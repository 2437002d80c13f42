"""Drawn shapes: what is called a shape is lighter than all the rest, and the same on every machine."""

import hashlib

import torch

from birkhoff.codec.output.shapes import drawn_shapes


def test_shapes_are_lighter_than_the_ground() -> None:
    pixels, masks = drawn_shapes(3, (96, 128), seed=5)
    assert (tuple(pixels.shape), tuple(masks.shape)) == ((3, 3, 96, 128), (3, 4, 96, 128))
    for picture, own in zip(pixels.float().mean(dim=1), masks, strict=True):
        assert own.sum(dim=0).max() == 1, "two shapes overlap"
        assert bool((own.flatten(1).float().mean(dim=1) > 0.01).all())
        assert float(picture[own.any(dim=0)].min()) > float(picture[~own.any(dim=0)].max())


def test_a_seed_gives_the_same_pictures() -> None:
    first, again = (drawn_shapes(1, (48, 64), seed=5)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, drawn_shapes(1, (48, 64), seed=6)[0])
    assert hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16] == "bdef3ef60772ee08"
