"""Differences to a base on a GPU: the bytes that a CPU makes, and the coordinates that it reads."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import birkhoff.kernels.trellis.op  # noqa: F401  which registers the search of paths for a GPU
from birkhoff.codec.container import CodedTensor, is_difference, parse, serialise, with_bases
from birkhoff.codec.difference.encode import Base, encode
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import decode_tensor, encode_tensor, lattice_of
from birkhoff.kernels.entropy import op as entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DIGEST = "ab" * 32


def base_and_weight(shape: tuple[int, ...], apart_db: float, dtype: torch.dtype, *, path: bool) -> tuple[Base, Tensor]:
    """A stored tensor whose columns differ in size, and weights so far below which they differ from its source."""
    generator = torch.Generator().manual_seed(sum(shape) + round(apart_db))
    source = torch.randn(shape, generator=generator) * 0.05 * torch.logspace(-1, 0, shape[-1])
    weight = source + torch.randn(shape, generator=generator) * source.std() * 10 ** (-apart_db / 20)
    stored = encode_tensor("w", source, Decision(codec="lattice", target_db=30.0, path=path)).tensor
    return Base(container=DIGEST, tensor=stored), weight.to(dtype)


def read(blob: bytes, base: Base) -> CodedTensor:
    (found,) = with_bases(parse(blob), lambda _: {"w": base.tensor})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_db", [24.0, 30.0, 36.0])
@pytest.mark.parametrize("apart_db", [60, 40, 25, 12])
@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("shape", [(768, 768), (1280, 320), (131, 199), (64, 32, 3, 3)])
def test_a_gpu_makes_the_bytes_of_a_cpu(
    shape: tuple[int, ...], path: bool, apart_db: float, target_db: float, dtype: torch.dtype
) -> None:
    base, weight = base_and_weight(shape, apart_db, dtype, path=path)
    decision = Decision(codec="lattice", target_db=target_db, path=path)
    wanted = encode("w", weight, decision, base).tensor
    found = encode("w", weight.cuda(), decision, base).tensor
    assert is_difference(found) == is_difference(wanted)
    if is_difference(wanted):  # direct forms are searched by sums that a device takes in its own order
        assert serialise([found]) == serialise([wanted])


def test_outliers_and_escapes_are_the_same_bytes() -> None:
    base, weight = base_and_weight((256, 512), 35, torch.float32, path=True)
    weight[3, 5], weight[200, 100] = 40.0, -3.0
    decision = Decision(codec="lattice", target_db=30.0)
    wanted, found = (encode("w", w, decision, base).tensor for w in (weight, weight.cuda()))
    assert is_difference(wanted)
    assert serialise([found]) == serialise([wanted])


@pytest.mark.parametrize("apart_db", [60, 40, 20])
def test_a_gpu_reads_what_a_cpu_reads(apart_db: float) -> None:
    base, weight = base_and_weight((1280, 1280), apart_db, torch.float32, path=True)
    blob = serialise([encode("w", weight, Decision(codec="lattice", target_db=30.0), base).tensor])
    coded = read(blob, base)
    (found,) = entropy.lattices_of([coded], "cuda")
    assert found.to("cpu").equals(lattice_of(coded))
    assert torch.equal(found.decode().cpu(), decode_tensor(coded))
    assert torch.equal(decode_tensor(coded, "cuda").cpu(), decode_tensor(coded))


def test_a_base_of_another_device_and_type_is_no_hindrance() -> None:
    base, weight = base_and_weight((256, 256), 30, torch.float32, path=True)
    half = replace(base, tensor=replace(base.tensor, dtype="F16"))
    decision = Decision(codec="lattice", target_db=30.0)
    wanted, found = (encode("w", w, decision, half).tensor for w in (weight, weight.cuda()))
    assert serialise([found]) == serialise([wanted])
