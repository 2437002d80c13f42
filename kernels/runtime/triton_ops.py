"""Device functions shared by the kernels: `birkhoff.codec.trajectory` and `.pairs`, in the Triton language."""
# The Triton language is not Python's type system:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether these kernels are interpreted. The interpreter truncates to bfloat16 and cannot multiply it."""


@triton.jit
def coordinates(theta):
    """Return (I, J) as float32 of uint16 step numbers: 0x8180 is (1, 0)."""
    t = theta.to(tl.int32)
    return ((t >> 8) - 128).to(tl.float32), ((t & 0xFF) - 128).to(tl.float32)


@triton.jit
def position(i, j, step):
    """Return the weights (x, y) of coordinates, bit-identical to `trajectory.position`: I + J/256 is exact, one
    rounding follows."""
    return tl.fma(j, 0.00390625, i) * step, j * step


@triton.jit
def local_columns(pair):
    """Return the columns of x and of y of pair numbers counted from the start of a full block."""
    first = pair // 32 * 64 + pair % 32
    return first, first + 32


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round float32 to DTYPE, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b, accumulated in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# Two step numbers (one 32-bit register) to (I0 + J0/256, I1 + J1/256) and (J0, J1), eight instructions for four
# weights. bfloat16 holds 7 bits of a byte under the exponent of 128; the eighth bit selects the subtracted constant,
# 128 or 256.
DECODE_BF16 = tl.constexpr("""{
.reg .b32 bytes, low, off, i, j, one, shear;
mov.b32 one, 0x3f803f80;
mov.b32 shear, 0x3b803b80;
shr.b32 bytes, $2, 8;
lop3.b32 low, bytes, 0x007f007f, 0x43004300, 0xea;
lop3.b32 off, bytes, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 i, low, one, off;
lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 off, $2, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 j, low, one, off;
fma.rn.bf16x2 $0, j, shear, i;
mov.b32 $1, j;
}""")

# float16 holds the whole byte under the exponent of 1024.
DECODE_F16 = tl.constexpr("""{
.reg .b32 bytes, i, j, off, shear;
mov.b32 off, 0xe480e480;
mov.b32 shear, 0x1c001c00;
shr.b32 bytes, $2, 8;
lop3.b32 bytes, bytes, 0x00ff00ff, 0x64006400, 0xea;
add.rn.f16x2 i, bytes, off;
lop3.b32 bytes, $2, 0x00ff00ff, 0x64006400, 0xea;
add.rn.f16x2 j, bytes, off;
fma.rn.f16x2 $0, j, shear, i;
mov.b32 $1, j;
}""")


@triton.jit
def settled(acc):
    """Return the accumulator once no product runs on it.

    Triton keeps the last product of a loop iteration running into the next iteration. If its left operand is in
    registers, that iteration overwrites them while the tensor cores still read. Using the sum in between forces a wait,
    without executing anything.
    """
    if not INTERPRETED:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc


@triton.jit
def after_the_last(PDL: tl.constexpr):
    """Wait until the previous kernel is done. With programmatic dependent launch, this one has started by then.

    Nothing is read or written before, so kernels are ordered as usual; only the launch overlaps.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_come(PDL: tl.constexpr):
    """Allow the next kernel to start. Called near the end, as programs that start early occupy idle processors."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
