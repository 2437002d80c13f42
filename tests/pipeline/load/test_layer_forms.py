import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import BirkhoffWarning, CodecError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor, lattice_of
from birkhoff.kernels.entropy.op import lattices_of
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.pipeline.load.layer_forms import LayerMaker, Memory
from tests.codec.by_profile import encode_tensor


def coded(spikes: int = 0, target_db: float = 30.0) -> CodedTensor:
    """A matrix with so many weights of 20 to 40 times the others in each run of 64."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for at in range(spikes):
        weight[:, at::64] = 20.0 * (1 + at)
    return encode_tensor("w", weight, replace(PROFILES["balanced"], target_db=target_db, path=False)).tensor


@pytest.mark.parametrize(
    ("memory", "kind", "bits", "least"),
    [
        ("uint16", HyperLinear, 8, 200),
        ("packed12", PackedHyperLinear, 6.0625, 31),
        ("packed10", PackedHyperLinear, 5.0625, 25),
    ],
)
def test_layers_take_the_memory_of_their_form_and_keep_its_fidelity(
    memory: Memory, kind: type[nn.Module], bits: float, least: float
) -> None:
    tensor, bias = coded(), torch.randn(64)
    maker = LayerMaker(memory)
    layer = maker("w", lattice_of(tensor), bias=bias, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker.report()
    assert type(layer) is kind
    held = sum(
        b.nbytes for name, b in layer.named_buffers() if name not in ("step_bits", "escape_index", "escape_bits")
    )
    assert 8 * held / tensor.weights == bits
    assert torch.equal(layer.bias, bias.bfloat16())  # type: ignore[arg-type]
    assert fidelity(decode_tensor(tensor), layer.dense_weight(torch.float32)).sqnr_db > least  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", ["uint16", "packed12", "packed10"])
@pytest.mark.parametrize("spikes", [0, 1])
def test_a_gpu_gets_the_weights_that_a_cpu_gets(memory: Memory, spikes: int) -> None:
    tensor, gpu = coded(spikes), torch.device("cuda", 0)
    there, here = (
        LayerMaker(memory)("w", lattices_of([tensor], device)[0], bias=None, dtype=torch.bfloat16)
        for device in (gpu, torch.device("cpu"))
    )
    assert {buffer.device for buffer in there.buffers()} == {gpu}
    assert torch.equal(there.dense_weight(torch.float32).cpu(), here.dense_weight(torch.float32))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("spikes", "target_db", "why"),
    [(1, 30.0, r"w \(2[0-3]\.\d dB, 6\.06 bits"), (1, 46.0, r"w \(\d+\.\d dB, 9\.06 bits")],
    ids=["too coarse", "outliers take what is saved"],
)
def test_a_layer_that_the_packed_form_does_not_suit_stays_as_it_is_and_is_named(
    spikes: int, target_db: float, why: str
) -> None:
    maker = LayerMaker("packed12")
    layers = [
        maker("w", lattice_of(tensor), bias=None, dtype=torch.float32) for tensor in (coded(spikes, target_db), coded())
    ]
    assert [type(layer) for layer in layers] == [HyperLinear, PackedHyperLinear]
    with pytest.warns(BirkhoffWarning, match=r"1 layers keep 16 bits a pair.* less than 24 dB or save nothing: " + why):
        maker.report()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(CodecError, match="'packed11': expected one of uint16, packed12, packed10"):
        LayerMaker("packed11")  # type: ignore[arg-type]


def test_int8_layers_hold_the_same_weights_in_as_much_memory() -> None:
    tensor, bias = coded(), torch.randn(64)
    maker = LayerMaker("uint16", "int8")
    layer = maker("w", lattice_of(tensor), bias=bias, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker.report()
    assert isinstance(layer, Int8HyperLinear)
    assert layer.plane.nbytes == tensor.weights
    assert torch.equal(layer.bias, bias.bfloat16())  # type: ignore[arg-type]
    assert torch.equal(layer.dense_weight(torch.float32), decode_tensor(tensor))


@pytest.mark.parametrize(("spikes", "target_db", "wider"), [(0, 30.0, False), (0, 46.0, True), (4, 46.0, True)])
def test_what_a_byte_does_not_hold_widens_a_layer(spikes: int, target_db: float, wider: bool) -> None:
    maker, tensor = LayerMaker("uint16", "int8"), coded(spikes, target_db)
    layer = maker("w", lattice_of(tensor), bias=None, dtype=torch.float32)
    assert isinstance(layer, Int8HyperLinear)
    assert bool(len(layer.extra)) == wider
    assert torch.equal(layer.dense_weight(torch.float32), decode_tensor(tensor))
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))  # few tokens scatter by 10 dB
    assert fidelity(nn.functional.linear(x, decode_tensor(tensor)), layer(x)).sqnr_db > 38


def test_a_layer_full_of_outliers_computes_in_float_and_is_named() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[0] = 20.0  # in every column
    full = encode_tensor("w", weight, replace(PROFILES["balanced"], target_db=46.0, path=False)).tensor
    maker = LayerMaker("uint16", "int8")
    layers = [maker("w", lattice_of(tensor), bias=None, dtype=torch.float32) for tensor in (full, coded())]
    assert [type(layer) for layer in layers] == [HyperLinear, Int8HyperLinear]
    with pytest.warns(BirkhoffWarning, match=r"1 layers compute in float, .*: w \(\d+ further columns for outliers\)"):
        maker.report()


def test_int8_of_a_packed_form_is_refused() -> None:
    with pytest.raises(CodecError, match="as stored, and packed12 has others: use uint16"):
        LayerMaker("packed12", "int8")
    with pytest.raises(CodecError, match="compute 'int4': expected one of float, int8, proven"):
        LayerMaker("uint16", "int4")  # type: ignore[arg-type]
