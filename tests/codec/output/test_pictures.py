import torch

from birkhoff.codec.output.pictures import synthetic_boxes, synthetic_pictures, synthetic_sizes


def test_same_seed_same_pictures_and_any_count_begins_alike() -> None:
    few, more = synthetic_pictures(3, 48, seed=7), synthetic_pictures(8, 48, seed=7)
    assert few.dtype == torch.uint8
    assert few.shape == (3, 3, 48, 48)
    assert torch.equal(few, more[:3])
    assert not torch.equal(few, synthetic_pictures(3, 48, seed=8))
    assert synthetic_pictures(0, 48, seed=7).shape == (0, 3, 48, 48)


def test_pictures_use_the_whole_range_and_half_are_grey() -> None:
    pictures = synthetic_pictures(8, 64, seed=0)
    assert [(int(p.min()), int(p.max())) for p in pictures] == [(0, 255)] * 8
    grey = [bool((p[0] == p[1]).all() and (p[0] == p[2]).all()) for p in pictures]
    assert grey == [False] * 4 + [True] * 4


def test_noise_has_the_spectrum_of_photographs() -> None:
    """Power falls by 6 dB an octave: numbers 1 and 5 are noise alone."""
    picture = synthetic_pictures(2, 128, seed=1)[1].double().mean(0)
    power = torch.fft.fft2(picture - picture.mean()).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(128)[:, None] * 128, torch.fft.fftfreq(128)[None] * 128)
    low, high = (power[(radius >= r) & (radius < 2 * r)].mean() for r in (8, 16))
    assert 4.5 < 10 * torch.log10(low / high) < 7.5


def test_boxes_lie_inside() -> None:
    boxes = synthetic_boxes(5, 4, 64, seed=0)
    assert boxes.shape == (5, 4, 4)
    assert bool((boxes >= 0).all() and (boxes <= 63).all() and (boxes[..., 2:] >= boxes[..., :2]).all())
    assert torch.equal(boxes, synthetic_boxes(5, 4, 64, seed=0))


def test_pictures_lie_stand_and_are_square() -> None:
    sizes = synthetic_sizes(64, 256, seed=0)
    assert all(max(size) == 256 and min(size) >= 140 for size in sizes)
    shares = [sum(kind(*size) for size in sizes) / 64 for kind in (int.__lt__, int.__gt__, int.__eq__)]
    assert all(0.2 < share < 0.5 for share in shares), shares
    assert synthetic_sizes(8, 256, seed=0) == sizes[:8]
    assert synthetic_sizes(8, 256, seed=1) != sizes[:8]
