"""The packed form: its kernel gives the codec's bits, and its layer behaves like an nn.Linear of the decoded weight."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from birkhoff.codec import lattice, packed
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.kernels.packed.op import packed_weight
from birkhoff.kernels.runtime.errors import KernelError

# whole groups, one block over, ragged, odd, narrower than a block, one column, more than one program
SHAPES = [(3, 256), (5, 192), (37, 131), (5, 200), (70, 33), (2, 2), (3, 1), (1, 9000), (2, 4224)]


def make(rows: int, columns: int, bits: int) -> packed.PackedTensor:
    weight = torch.randn(rows, columns)
    weight[0, 0] = 90.0
    return packed.pack(lattice.quantise(weight, 0.021), bits)


def layer_and_weight(bits: int = 12, *, bias: bool = True) -> tuple[PackedHyperLinear, torch.Tensor]:
    form = make(7, 70, bits)
    assert form.escape_index.numel()
    return PackedHyperLinear.from_packed(form, torch.randn(7) if bias else None), form.decode()


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kernel_gives_the_references_bits(rows: int, columns: int, dtype: torch.dtype, bits: int, device: str) -> None:
    form = make(rows, columns, bits)
    layer = PackedHyperLinear.from_packed(form, device=device)
    assert torch.equal(layer.dense_weight(dtype).cpu(), form.decode(dtype))


def test_every_scale_and_step_number(device: str) -> None:
    theta = torch.arange(1 << 12, dtype=torch.int32).repeat(4).view(256, 64)
    form = packed.PackedTensor(
        bits=12,
        low=(theta & 255).to(torch.uint8),
        high=packed._pack_high(theta >> 8, 12),
        scale=torch.arange(256).to(torch.uint8)[:, None],
        step=0.0371,
        columns=128,
        escape_index=torch.empty(0, dtype=torch.int64),
        escape_value=torch.empty(0),
    )
    layer = PackedHyperLinear.from_packed(form, device=device)
    assert torch.equal(layer.weight.cpu(), form.decode())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_linear_layer_of_the_decoded_weight(dtype: torch.dtype) -> None:
    layer, weight = layer_and_weight()
    for shape in ((70,), (2, 3, 70), (0, 70)):
        x = torch.randn(shape, dtype=dtype)
        assert layer.bias is not None
        assert torch.equal(layer(x), functional.linear(x, weight.to(dtype), layer.bias.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [10, 12])
def test_the_op_and_the_call_that_nobody_watches_agree(bits: int, dtype: torch.dtype, device: str) -> None:
    layer = layer_and_weight(bits)[0].to(device).requires_grad_(False)
    op = torch.ops.birkhoff.packed_linear.default
    wide = torch.randn(4, 3, 78, device=device).to(dtype)
    for x in (wide[..., :70].contiguous(), wide[..., 3:73], wide[:, 0, 8:], wide[0, 0, 1:71], wide[:0, :, :70]):
        assert torch.equal(layer(x), op(x, *layer._planes(), bits, layer.bias))


def test_calls_that_nobody_watches_are_no_ops() -> None:
    layer, _ = layer_and_weight()
    for watched in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer.requires_grad_(watched)(torch.randn(2, 70))
        assert ("birkhoff::packed_linear" in {event.key for event in profile.key_averages()}) is watched


def test_gradients_reach_the_input_and_the_bias() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(5, 70, requires_grad=True)
    mine = torch.autograd.grad(layer(x).square().sum(), [x, layer.bias])
    theirs = torch.autograd.grad(functional.linear(x, weight, layer.bias).square().sum(), [x, layer.bias])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    layer, _ = layer_and_weight()
    planes = layer._planes()
    x = torch.randn(3, 70, requires_grad=True)
    torch.library.opcheck(torch.ops.birkhoff.packed_linear.default, (x, *planes, 12, layer.bias))
    torch.library.opcheck(torch.ops.birkhoff.packed_weight.default, (*planes, 12, 70, torch.float32))


def test_moves_stores_and_copies_like_a_layer() -> None:
    layer, weight = layer_and_weight(10)
    empty = PackedHyperLinear(70, 7, bits=10)
    empty.load_state_dict(layer.state_dict())
    for other in (empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, weight)
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert layer.step.dtype == layer.escape_value.dtype == torch.float32
    assert torch.equal(layer.dense_weight(torch.float32), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 70)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    layer, _ = layer_and_weight()
    with pytest.raises(KernelError, match="70 features got an input of shape"):
        layer(torch.randn(3, 71))
    with pytest.raises(KernelError, match=r"bias \[7\], got \[8\]"):
        PackedHyperLinear.from_packed(make(7, 70, 12), torch.zeros(8))
    with pytest.raises(KernelError, match=r"pass those of codec\.packed\.pack"):
        packed_weight(layer._planes(), 12, 75, torch.float32)
