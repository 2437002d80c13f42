"""Compile kernels for sm_90a where there is no GPU, and print what the assembler says of each as JSON.

The Gluon kernels, which cannot be interpreted, and those of Triton that are more than a few lines: the interpreter
accepts what the compiler does not. A script of its own: in the tests' process Triton may be interpreting.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction, driver

from birkhoff.kernels.entropy import triton as entropy
from birkhoff.kernels.feedback import both
from birkhoff.kernels.feedback import triton as feedback
from birkhoff.kernels.int8 import hopper as int8_hopper
from birkhoff.kernels.linear import hopper as linear_hopper
from birkhoff.kernels.linear import small_m as linear_few


class HopperOnPaper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def small_m(block_n: int, warps: int, unroll: int, tokens: int) -> Any:
    x, theta, y, step, bias = tensors(tokens, 256, 1280)
    constants = {"BIAS": True, "BM": max(8, tokens), "BN": block_n, "UNROLL": unroll, "WARPS": warps}
    return linear_few._linear_kernel.warmup(
        x, theta, step, bias, y, tokens, 256, 640, 1280, 20, **constants,
        GROUPS=block_n // 16, PDL=True, launch_pdl=True, num_warps=warps * block_n // 16, grid=(16,),
    )  # fmt: skip


def hopper(block_m: int) -> Any:
    x, theta, y, step, bias = tensors(512, 256, 1280)
    wide, narrow = linear_hopper._layouts(block_m, x.dtype)
    launch = linear_hopper.LAUNCHES[block_m]
    return linear_hopper._linear_kernel.warmup(
        TensorDescriptor.from_tensor(x, [block_m, 64], wide),
        TensorDescriptor.from_tensor(theta, [128, 32], narrow),
        TensorDescriptor.from_tensor(y, [block_m, 64], wide),
        step, bias, step, 4, 4, 1, 256, 20, BIAS=True, DEPTH=launch.depth, MULTIPLYING=launch.multiplying,
        LOADING=launch.loading, num_warps=4, maxnreg=launch.average, launch_pdl=True, grid=(4,),
    )  # fmt: skip


def int8(block_m: int, block_n: int, in_turn: bool) -> Any:
    _, _, y, step, bias = tensors(512, 256, 1280)
    q, plane = torch.empty(512, 1280, dtype=torch.int8), torch.empty(256, 1280, dtype=torch.int8)
    launch = int8_hopper.LAUNCHES[block_m, block_n, in_turn]
    average, multiplying, loading = launch.registers
    return int8_hopper._linear_kernel.warmup(
        *(TensorDescriptor.from_tensor(tensor, *tile) for tensor, tile in zip(
            (q, plane, y), int8_hopper.tiles_of(block_m, block_n, launch, y.dtype), strict=True
        )),
        torch.empty(512), step, bias, torch.empty(4, dtype=torch.int32), 4, 4, 1, 256, 512, 10, BIAS=True,
        DEPTH=launch.depth, WM=launch.along_m, WN=launch.along_n, HALVES=launch.halves,
        MULTIPLYING=multiplying, LOADING=loading, num_warps=4, maxnreg=average, launch_pdl=True, grid=(4,),
    )  # fmt: skip


def tensors(tokens: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    x, y = torch.empty(tokens, columns, dtype=torch.bfloat16), torch.empty(tokens, rows, dtype=torch.bfloat16)
    theta = torch.empty(rows, columns // 2, dtype=torch.uint16)
    return x, theta, y, torch.empty(()), torch.empty(rows, dtype=torch.bfloat16)


def launched(work: Callable[[], object]) -> dict[str, Any]:
    """Compile what a function launches, and launch nothing. Returns the kernels by name and constants."""
    found: dict[str, Any] = {}

    def take(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_(*args: Any, **options: Any) -> None:
            constants = [str(value) for name, value in options.items() if name.isupper()]
            found[" ".join([kernel.fn.__name__, *constants])] = kernel.warmup(*args, grid=grid, **options)

        return compile_

    usual = JITFunction.__getitem__
    JITFunction.__getitem__ = take  # type: ignore[method-assign, assignment]
    try:
        work()
    finally:
        JITFunction.__getitem__ = usual  # type: ignore[method-assign]
    return found


def feedbacks() -> None:
    """Of one row, too: a size of 1 is a constant to the compiler."""
    for rows in (90, 1):
        w_KR, n_KR, error_KR, base_KR = torch.empty(4, 70, rows)
        matrices = w_KR, n_KR, error_KR, torch.eye(70), torch.full((70,), -1)
        for steps in ((), (rows,)):
            both.round_both(*matrices, torch.eye(rows), steps)
        for lanes in (0, 3):
            feedback.round_block(*matrices, 0, 64, lanes, None)
            feedback.round_block(*matrices, 0, 64, lanes, base_KR)


def decoding() -> None:
    """Planes from stored streams."""
    planes, told = torch.empty(4096, dtype=torch.int8), torch.empty(32, dtype=torch.int64)
    bytes_, numbers = torch.empty(4096, dtype=torch.uint8), torch.empty(4096, dtype=torch.int64)
    rows, frequency = torch.empty(2, entropy.ROW, dtype=torch.int64), torch.empty(2, 256, dtype=torch.int16)
    count, key, value = torch.empty(1, dtype=torch.int32), torch.empty(64, dtype=torch.int64), torch.empty(64, 2)
    entropy.decode_blocks(bytes_, frequency, rows, bytes_, count)
    described = torch.empty(2, entropy.PLACE, dtype=torch.int64), torch.empty(2, 3, dtype=torch.int64)
    entropy.place_symbols(bytes_, numbers, numbers, *described, planes, told, count, key, value.to(torch.int32))


def verdict(kernel: Any) -> dict[str, Any]:
    """Spilled bytes, shared memory, and whether the assembler had to make the tensor cores wait in between."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(kernel.asm["ptx"])
        source.flush()
        command = [assembler, "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"spills": spills, "shared": kernel.metadata.shared, "serialised": "serialized" in said}


if __name__ == "__main__":
    driver.set_active(HopperOnPaper())
    compiled = {"small_m": small_m(16, 4, 4, 16), "hopper 256": hopper(256), "hopper 64": hopper(64)}
    tiles = (128, 256, False), (128, 128, True), (64, 128, False)
    compiled |= {f"int8 {tile}": int8(*tile) for tile in tiles}
    compiled |= launched(feedbacks) | launched(decoding)
    print(json.dumps({name: verdict(kernel) for name, kernel in compiled.items()}))
