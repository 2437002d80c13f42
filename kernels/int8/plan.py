"""Choose the kernel that multiplies bytes and its launch: the plans worth trying, and rules between them.

Measured plans are in `tuned_h200` and the user's table (`linear.tuned`). Rules cover all other problems.

Shapes: M = tokens, N = out features, K = in features.
"""

from birkhoff.kernels.linear.plan import Plan, Problem

LEAST_ROWS = 768
"""Out features below which a GPU loses more time by quantising a layer's tokens than it gains by multiplying bytes."""


def int8_tiles(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Plan:
    """Return a plan of the portable kernel, `int8.triton`."""
    return Plan(path="int8_tiles", block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages)


def int8_fused(block_m: int, block_n: int, block_p: int, warps: int, stages: int = 3) -> Plan:
    """Return a plan of the portable kernel that also quantises, `int8.fused`."""
    return Plan(path="int8_fused", block_m=block_m, block_n=block_n, block_k=block_p, warps=warps, stages=stages)


def int8_hopper(block_m: int, block_n: int, *, in_turn: bool = False, split: bool = False) -> Plan:
    """Return a plan of the kernel for Hopper, `int8.hopper`."""
    return Plan(path="int8_hopper", block_m=block_m, block_n=block_n, in_turn=in_turn, split=split)


_TILES = [
    *[(16, 32, 128, 4, 4), (16, 32, 256, 4, 4), (32, 32, 256, 4, 4), (64, 16, 256, 4, 4), (64, 32, 128, 4, 6)],
    *[(64, 32, 256, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (128, 128, 128, 8, 4)],
]
"""Arguments of `int8_tiles` worth trying."""

_FUSED = [
    *[(16, 32, 64, 4), (16, 64, 64, 4), (32, 32, 64, 4), (32, 64, 64, 4), (32, 128, 64, 4), (64, 32, 64, 4)],
    *[(64, 64, 32, 4), (64, 64, 64, 4), (64, 128, 64, 4), (64, 128, 64, 8), (64, 256, 64, 8), (128, 64, 64, 8)],
    *[(128, 128, 64, 8), (128, 256, 64, 8)],
]
"""Arguments of `int8_fused` worth trying if rows of W are short or few."""

_HALF_ONLY = (128, 256)
"""The one of these that takes 232 KB of shared memory for float32 tokens, more than Hopper has."""


_HOPPER = [(64, 64, True), (64, 128, True), (64, 128, False), (128, 64, True), (128, 64, False), (64, 256, True)]
_HOPPER += [(64, 256, False), (128, 128, True), (128, 128, False), (256, 128, False), (128, 256, False)]
"""Arguments of `int8_hopper` worth trying: the tile, and whether in turn."""


def candidates(problem: Problem, kernels: frozenset[str]) -> list[Plan]:
    """Return every plan worth measuring for a problem on a GPU that runs `kernels` ("int8_hopper")."""
    tokens = problem.bucket
    found = [int8_tiles(*shape) for shape in _TILES if shape[0] < 2 * max(tokens, 16) and tokens <= 64 * shape[0]]
    if problem.columns <= 576 or problem.rows <= 320:
        blocks = [shape for shape in _FUSED if shape[0] < 2 * max(tokens, 16) and tokens <= 256 * shape[0]]
        found += [
            int8_fused(*shape)
            for shape in blocks
            if shape[1] < 2 * max(problem.rows, 32) and (problem.half or shape[:2] != _HALF_ONLY)
        ]
    if runs_on_hopper(problem, kernels):
        shapes = [
            shape for shape in _HOPPER if shape[0] < 2 * tokens and tokens * problem.rows < shape[0] * shape[1] << 13
        ]
        found += [
            int8_hopper(block_m, block_n, in_turn=in_turn, split=split)
            for block_m, block_n, in_turn in shapes
            for split in (False, True)
        ]
    return found


def runs_on_hopper(problem: Problem, kernels: frozenset[str]) -> bool:
    """Return whether the kernel for Hopper supports a problem: 16-bit outputs, rows at multiples of 16 bytes."""
    return "int8_hopper" in kernels and problem.half and problem.aligned and problem.rows % 8 == 0


def by_rule(problem: Problem, kernels: frozenset[str]) -> Plan:
    """Return the plan for a problem that is in no table.

    A kernel that quantises by itself does so again for each tile of rows, so only very few rows get it. Of 108 problems
    with up to 288 columns or 256 rows that were measured on an H200 it is the fastest in 12, none with 288 rows or
    more, and with 1024 rows and 4096 tokens it takes three times as long as cuBLAS.
    """
    tokens, rows, long = problem.tokens, problem.rows, problem.columns >= 2048
    if rows <= 32 and tokens > 64:
        return int8_fused(16, 32, 64, 4)
    if tokens <= 16 or (tokens <= 64 and problem.columns <= 288):
        return int8_tiles(16, 32, 256, 4, 4)
    if tokens <= 64:
        return int8_tiles(64, 16 if long or rows <= 1536 else 32, 256, 4, 4)
    if not runs_on_hopper(problem, kernels):
        return int8_tiles(64, 64, 128, 4, 4) if tokens * rows < 1 << 22 else int8_tiles(128, 128, 128, 8, 4)
    if tokens <= 256:
        return int8_hopper(128, 64, in_turn=True, split=True) if long else int8_tiles(64, 64, 128, 4, 4)
    if tokens * rows < 1 << 19:
        return int8_tiles(64, 64, 128, 4, 4)
    if rows <= 256:
        return int8_hopper(128, 64, in_turn=True, split=True)
    if tokens <= 2048 and rows < 3000 and not long:
        return int8_hopper(128, 64, in_turn=True, split=True)
    return int8_hopper(128, 128, in_turn=True, split=long)
