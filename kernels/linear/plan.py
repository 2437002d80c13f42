"""Choose the kernel of a linear layer and its launch parameters, by rules.

`tuned` has measured plans. Rules are for the shapes and GPUs that are not in its tables.

Shapes: M = tokens, N = out features (rows of W), K = in features (columns of W).
"""

from dataclasses import dataclass
from typing import Literal

import torch

Path = Literal["decode", "tiles", "small_m", "hopper", "int8_fused", "int8_tiles", "int8_hopper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A kernel and its launch parameters, 0 if its path does not use them. Made by the functions below."""

    path: Path
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 0
    stages: int = 0
    unroll: int = 0
    split: bool = False
    in_turn: bool = False


DECODE = Plan(path="decode")
"""Decode the dense weight into memory, then use cuBLAS."""


def tiles(block_m: int, block_n: int, warps: int, stages: int, unroll: int = 1) -> Plan:
    """Return a plan for the portable fused kernel, `linear.triton`."""
    return Plan(path="tiles", block_m=block_m, block_n=block_n, warps=warps, stages=stages, unroll=unroll)


def small_m(block_n: int, warps: int, unroll: int) -> Plan:
    """Return a plan for the fused kernel for up to 64 tokens, `linear.small_m`."""
    return Plan(path="small_m", block_n=block_n, warps=warps, unroll=unroll)


def hopper(block_m: int, *, split: bool = False) -> Plan:
    """Return a plan for the fused kernel for Hopper, `linear.hopper`."""
    return Plan(path="hopper", block_m=block_m, split=split)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The input of the choice of a plan.

    `aligned`: rows of x begin at multiples of 16 bytes. `tf32`: allowed for float32. `int8`: on int8 tensor cores, by
    the plans of `kernels.int8.plan`.
    """

    tokens: int
    rows: int
    columns: int
    dtype: torch.dtype
    aligned: bool
    tf32: bool = False
    int8: bool = False

    @property
    def half(self) -> bool:
        """Whether it runs on 16-bit tensor cores."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def bucket(self) -> int:
        """Tokens rounded up to a power of two, the key of tables. 8192 and above share one."""
        return min(8192, 1 << max(0, self.tokens - 1).bit_length())


_TILES = [
    *[(16, 32, 4, 4, 1), (16, 32, 4, 4, 2), (16, 64, 4, 4, 1), (16, 64, 4, 4, 2), (16, 64, 4, 3, 4)],
    *[(32, 64, 4, 4, 1), (32, 64, 4, 4, 2), (32, 64, 4, 3, 4)],
    *[(64, 64, 4, 4, 1), (64, 64, 4, 4, 2), (64, 64, 4, 2, 4), (128, 32, 4, 3, 1), (128, 64, 4, 2, 1)],
    *[(128, 64, 4, 3, 1), (128, 128, 8, 3, 1), (256, 64, 8, 2, 1)],
]
"""Arguments of `tiles` worth trying."""


def candidates(problem: Problem, kernels: frozenset[str]) -> list[Plan]:
    """Return every plan worth measuring for a problem on a GPU where `kernels` ("small_m", "hopper") run."""
    tokens, whole = problem.tokens, problem.columns % 64 == 0
    found = [DECODE]
    if problem.half and whole and problem.aligned:
        if tokens <= 64 and "small_m" in kernels:
            shapes = [(16, 4, 2), (16, 4, 4), (16, 8, 1), (16, 8, 2), (16, 8, 4)]
            shapes += [(32, 4, 2), (32, 4, 4), (32, 8, 2), (64, 4, 2)]
            shapes += [(16, 2, 2), (16, 2, 4)]
            found += [small_m(*shape) for shape in shapes]
        if "hopper" in kernels and problem.rows % 8 == 0:
            sizes = [size for size in (16, 32, 64, 128, 256) if size < 2 * tokens or size == 16]
            found += [hopper(size, split=split) for size in sizes[-3:] for split in (True, False)]
    if not problem.half:
        return [*found, tiles(16, 32, 4, 4)] if tokens <= 64 else found  # float32 sums need the registers
    if tokens <= 64 or not whole or not problem.aligned or tokens * problem.rows <= 1 << 22:
        sizes = [size for size in (16, 32, 64, 128, 256) if size < 2 * tokens or size == 16][-3:]
        blocks = problem.columns // 64
        found += [tiles(*shape) for shape in _TILES if shape[0] in sizes and blocks % shape[-1] == 0]
        if problem.rows <= 32 and tokens > 64:
            found += [tiles(64, 32, 4, 3)]
    return found


def by_rule(problem: Problem, kernels: frozenset[str]) -> Plan:
    """Return the plan for a problem outside the tables: on average within 7 % of the best in the H200's table."""
    tokens, rows, blocks = problem.tokens, problem.rows, problem.columns // 64
    if not problem.half:
        return tiles(16, 32, 4, 4) if problem.tf32 and tokens <= 16 else DECODE
    whole = problem.aligned and problem.columns % 64 == 0
    on_hopper = whole and "hopper" in kernels and rows % 8 == 0
    if tokens <= 16 and whole and "small_m" in kernels and blocks > 1:
        return _few_by_rule(rows, blocks)
    if tokens <= 64:
        if on_hopper and blocks >= 32:
            return hopper(32, split=True)
        return tiles(16, 32, 4, 4) if tokens <= 32 or rows <= 1536 else tiles(64, 64, 4, 4)
    if rows <= 32:
        return tiles(64, 32, 4, 3)
    if tokens <= 512:
        return hopper(128, split=True) if on_hopper and blocks >= 48 else tiles(64, 64, 4, 4)
    if on_hopper and (rows >= 3000 or blocks <= 4 < rows // 128) and blocks <= 24:
        return hopper(256 if rows >= 3000 else 128)
    if blocks <= 4 and tokens * rows <= 1 << 21:
        return tiles(64, 64, 4, 4) if tokens <= 1024 else tiles(128, 64, 4, 3)
    return DECODE


def _few_by_rule(rows: int, blocks: int) -> Plan:
    if blocks > 24:
        return small_m(16, 8, 4)
    return small_m(16, 4, 4) if rows <= 2048 and blocks > 8 else small_m(16, 4, 2)
