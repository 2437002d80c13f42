"""Import this module to give the codec's error feedback its GPU kernels: CUDA tensors then run `feedback.triton`.

Without Triton, or on a GPU that it does not support, the eager loop runs instead, and the log says so once.

Reference: `birkhoff.codec.output.columns.eager_round_block`.
"""

from torch import Tensor

from birkhoff.codec.output import columns
from birkhoff.kernels.decode.serving import triton_serves


@columns.round_block.register_kernel("cuda")
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

    feedback_triton.round_block(w_KR, n_KR, error_KR, upper_KK, partner, start, stop, lanes, base_KR)
