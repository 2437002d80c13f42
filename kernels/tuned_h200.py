"""Plans measured on one NVIDIA H200, in bfloat16 with cold weights: every linear shape of SAM-B, L, H and SAM2-L."""

from birkhoff.kernels.plan import Plan

PLANS: dict[tuple[int, int], dict[int, Plan]] = {}
"""(rows, columns) to tokens to plan."""
