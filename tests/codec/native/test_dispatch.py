"""Functions with a version for some devices: the reference elsewhere, and nothing of torch's compiler."""

import subprocess
import sys

import torch
from torch import Tensor

from birkhoff.codec.native.dispatch import Dispatched

MODULES = """
import sys, torch
from birkhoff.codec import trellis
trellis.viterbi(torch.zeros(8, 4))
assert not [name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
"""


def test_the_version_of_the_first_tensors_device_runs_else_the_reference() -> None:
    add = Dispatched(lambda x, other: x + other)

    @add.register("meta")
    def _add(x: Tensor, other: int) -> Tensor:
        return x.new_zeros(other)

    assert add(torch.ones(3), 2).tolist() == [3, 3, 3]
    assert add(torch.ones(3, device="meta"), 2).shape == (2,)


def test_a_call_leaves_the_compiler_alone() -> None:
    subprocess.run([sys.executable, "-c", MODULES], check=True)
