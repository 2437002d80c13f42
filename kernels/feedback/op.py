"""Import this module to give the codec's error feedback its GPU kernels: CUDA tensors then run `feedback.triton`, or
`feedback.both` where rows have feedback too.

Without Triton, or on a GPU that it does not support, the eager loops run instead, and the log says so once.

Reference: `birkhoff.codec.output.columns.eager_round_block`.
Reference: `birkhoff.codec.output.rows.eager_round_both`, with rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from birkhoff.codec.output import columns, rows
from birkhoff.kernels.decode.serving import triton_serves


@columns.round_block.register("cuda")
def _round_block(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    start: int,
    stop: int,
    lanes: int,
    base_KR: Tensor | None,
) -> None:
    if not triton_serves(w_KR.device):
        columns.eager_round_block(w_KR, n_KR, error_KR, upper_KK, partner, start, stop, lanes, base_KR)
        return
    from birkhoff.kernels.feedback import triton as feedback_triton

    with torch.cuda.device(w_KR.device):
        feedback_triton.round_block(w_KR, n_KR, error_KR, upper_KK, partner, start, stop, lanes, base_KR)


@rows.round_both.register("cuda")
def _round_both(
    w_KR: Tensor,
    n_KR: Tensor,
    error_KR: Tensor,
    upper_KK: Tensor,
    partner: Tensor,
    upper_RR: Tensor,
    steps: Sequence[int],
) -> None:
    if not triton_serves(w_KR.device):
        rows.eager_round_both(w_KR, n_KR, error_KR, upper_KK, partner, upper_RR, steps)
        return
    from birkhoff.kernels.feedback import both

    with torch.cuda.device(w_KR.device):
        both.round_both(w_KR, n_KR, error_KR, upper_KK, partner, upper_RR, steps)
