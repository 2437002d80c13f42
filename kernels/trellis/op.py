"""Import this module to give the codec's Viterbi search its GPU kernel: CUDA tensors then run `trellis.triton`.

Without Triton, or on a GPU that it does not support, the eager search runs instead, and the log says so once.

Reference: `birkhoff.codec.trellis.eager_viterbi`.
"""

from torch import Tensor

from birkhoff.codec import trellis
from birkhoff.kernels.decode.serving import triton_serves


@trellis.viterbi.register("cuda")
def _search(u_TL: Tensor) -> Tensor:
    if not triton_serves(u_TL.device):
        return trellis.eager_viterbi(u_TL)
    from birkhoff.kernels.trellis import triton as trellis_triton

    return trellis_triton.search(u_TL)
