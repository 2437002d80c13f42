"""Which kernel runs a linear layer, and how: from measured tables where there is one, else from rules.

A plan is chosen from shapes alone, so it costs a dictionary look-up per call and is the same in every graph. Order of
choice: plans tuned on this machine (`birkhoff.kernels.tune`), plans shipped for the GPU, rules.

Shapes: M = tokens, N = out features, K = in features.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from birkhoff.kernels import tuned

Path = Literal["decode", "tiles", "few", "hopper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A kernel and its launch parameters; those that a path does not use stay 0.

    - `decode`: dense weight into memory, then cuBLAS.
    - `tiles`: the portable fused kernel; `block_m`, `block_n`, `warps`, `stages`.
    - `few`: the fused kernel for up to 64 tokens; `block_n`, `warps`, `unroll`.
    - `hopper`: the fused kernel for Hopper; `block_m`, `split`.
    """

    path: Path
    block_m: int = 0
    block_n: int = 0
    warps: int = 0
    stages: int = 0
    unroll: int = 0
    split: bool = False


DECODE = Plan(path="decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a plan is chosen for. `aligned`: rows of x and of the result begin at multiples of 16 bytes."""

    tokens: int
    rows: int
    columns: int
    dtype: torch.dtype
    aligned: bool

    @property
    def half(self) -> bool:
        """Whether it runs on 16-bit tensor cores."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def bucket(self) -> int:
        """Tokens rounded up to a power of two, as tables are keyed; 8192 and above are one."""
        return min(8192, 1 << max(0, self.tokens - 1).bit_length())


def candidates(problem: Problem, kernels: frozenset[str]) -> list[Plan]:
    """Every plan worth measuring for a problem on a GPU where `kernels` ("few", "hopper") run."""
    tokens, whole = problem.tokens, problem.columns % 64 == 0
    found = [DECODE]
    if problem.half and whole and problem.aligned:
        if tokens <= 64 and "few" in kernels:
            shapes = [(16, 4, 1), (16, 8, 1), (16, 8, 2), (16, 16, 1), (32, 8, 1), (32, 4, 1)]
            found += [Plan(path="few", block_n=n, warps=w, unroll=u) for n, w, u in shapes]
        if "hopper" in kernels and problem.rows % 8 == 0:
            blocks = [size for size in (16, 64, 128, 256) if size < 2 * tokens or size == 16]
            found += [Plan(path="hopper", block_m=m, split=split) for m in blocks[-3:] for split in (True, False)]
    if tokens <= 64 or not whole or not problem.aligned or tokens * problem.rows <= 1 << 22:
        sizes = [(16, 32, 4, 4), (16, 64, 4, 4), (64, 64, 4, 4), (128, 64, 4, 3), (128, 128, 8, 3)]
        fitting = [size for size in sizes if size[0] < 2 * tokens or size[0] == 16]
        found += [Plan(path="tiles", block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in fitting[-3:]]
    return found


@cache
def choose(problem: Problem, gpu: str, kernels: frozenset[str]) -> Plan:
    """The plan for a problem on the GPU named `gpu`, where `kernels` ("few", "hopper") run."""
    if problem.half and problem.aligned:
        fields = tuned.lookup(gpu, problem.rows, problem.columns, problem.bucket)
        if fields is not None:
            plan = Plan(**fields)
            if plan.path in ("decode", "tiles") or plan.path in kernels:
                return plan
    return by_rule(problem, kernels)


def by_rule(problem: Problem, kernels: frozenset[str]) -> Plan:
    """The plan for a problem that no table knows."""
    tokens = problem.tokens
    if problem.half and problem.aligned and problem.columns % 64 == 0:
        if tokens <= 64 and "few" in kernels:
            return Plan(path="few", block_n=16, warps=8, unroll=1)
        if "hopper" in kernels and problem.rows % 8 == 0:
            return Plan(path="hopper", block_m=64 if tokens <= 512 else 128 if tokens < 2048 else 256, split=True)
    if not problem.half:
        return Plan(path="tiles", block_m=16, block_n=32, warps=4, stages=4) if tokens <= 16 else DECODE
    if tokens <= 256:
        return Plan(path="tiles", block_m=16 if tokens <= 16 else 64, block_n=64, warps=4, stages=4)
    return DECODE
