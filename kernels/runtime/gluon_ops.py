"""Device functions shared by the Gluon kernels."""
# Gluon is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from birkhoff.kernels.runtime.triton_ops import DECODE_BF16, DECODE_F16


@gluon.jit
def decoded(theta, DTYPE: gl.constexpr):
    """Return (I + J/256, J) of step numbers as bfloat16 or float16, in their layout (an even number per thread in a
    row)."""
    if gl.bfloat16 == DTYPE:
        bf16: gl.constexpr = (gl.bfloat16, gl.bfloat16)
        first, second = gl.inline_asm_elementwise(DECODE_BF16, "=r,=r,r", [theta], dtype=bf16, is_pure=True, pack=2)
    else:
        f16: gl.constexpr = (gl.float16, gl.float16)
        first, second = gl.inline_asm_elementwise(DECODE_F16, "=r,=r,r", [theta], dtype=f16, is_pure=True, pack=2)
    return first, second
