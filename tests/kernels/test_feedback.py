"""The Triton kernels of error feedback against the eager loop."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.codec.output import columns, rows


def block(rows: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, a factor whose numbers are short enough that every sum is exact, and partners."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-4096, 4097, (count, rows), generator=g) / 256
    upper = torch.eye(count) * 2 + (torch.randint(-1, 2, (count, count), generator=g) / 4).triu(1)
    half = count // 2
    partner = torch.full((count,), -1)
    partner[half : 2 * half] = torch.randperm(half, generator=g)
    return w, upper, partner


def run(
    rounded: Callable[..., None],
    matrices: tuple[Tensor, Tensor, Tensor],
    device: str,
    spans: list[tuple[int, int]],
    lanes: int,
    base: Tensor | None,
) -> tuple[Tensor, Tensor]:
    w, upper, partner = (tensor.clone().to(device) for tensor in matrices)
    n, error = torch.zeros_like(w), torch.zeros_like(w)
    base = None if base is None else base.clone().to(device)
    for start, stop in spans:
        rounded(w, n, error, upper, partner, start, stop, lanes, base)
    return n.cpu(), error.cpu()


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (70, 9)])
@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize("again", [False, True])
def test_same_numbers_as_the_eager_loop(device: str, rows: int, count: int, lanes: int, again: bool) -> None:
    from birkhoff.kernels.feedback import triton as feedback_triton

    w, upper, partner = block(rows, count)
    spans, base = [(0, count // 2), (count // 2, count)], w.round() if again else None
    expected = run(columns.eager_round_block, (w, upper, partner), "cpu", spans, lanes, base)
    found = run(feedback_triton.round_block, (w, upper, partner), device, spans, lanes, base)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("height", "width", "lanes"),
    [(1, 1, 0), (1, 70, 0), (70, 1, 0), (70, 9, 0), (9, 140, 0), (130, 66, 0), (1, 1, 1), (70, 2, 1), (8, 19, 2)],
)
def test_both_sides_give_the_numbers_of_the_eager_loop(device: str, height: int, width: int, lanes: int) -> None:
    """And paths that readers can follow."""
    from birkhoff.kernels.feedback import both

    w, upper_KK, partner = block(height, width)
    upper_RR = block(1, height, seed=1)[1]
    steps = [len(range(lane, height, lanes)) for lane in range(lanes)]
    n, error = torch.full_like(w, torch.nan), torch.full_like(w, torch.nan)
    here = [tensor.clone().to(device) for tensor in (w, n, error, upper_KK, partner, upper_RR)]
    both.round_both(*here, steps)
    found = here[1].cpu()
    factor = rows.RowFactor(order=torch.arange(height), upper=upper_RR, steps=np.array(steps, dtype=np.int64))

    def nearest(u: Tensor, out: Tensor) -> None:
        rows.reference_round_rows_(u.clone(), out, factor, both.PATH_ROWS)

    columns.round_columns(w, n, error, upper_KK, partner, 0, width, None, nearest)
    torch.testing.assert_close(here[2].cpu(), error, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, n)
    for lane in found.split(steps, dim=1) if steps else ():
        for path in lane.contiguous():
            assert torch.equal(trellis.numbers(trellis.symbols(path).to(torch.int16), 1).float(), path)
