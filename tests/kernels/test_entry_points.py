"""The two entry points of `hyperlinear`, op and direct call: same results, and the right one is taken."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from birkhoff.codec import lattice
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.linear import op as linear
from birkhoff.kernels.runtime.errors import KernelError

OP = torch.ops.birkhoff.hyperlinear.default


def make(rows: int = 7, columns: int = 70, *, escapes: int = 2, device: str = "cpu") -> HyperLinear:
    weight = torch.randn(rows, columns) * 0.02
    weight.view(-1)[torch.randperm(weight.numel())[:escapes]] = 5.0
    return HyperLinear.from_lattice(lattice.quantise(weight, 0.002), torch.randn(rows), device=device).requires_grad_(
        False
    )


def by_op(layer: HyperLinear, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = OP(x, layer.theta, layer.step, layer.escape_index, layer.escape_value, layer.bias)
    return y


def ops_of(layer: HyperLinear, x: torch.Tensor) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "escapes"), [(7, 70, 2), (5, 33, 0), (20, 64, 0), (16, 128, 80)])
def test_both_doors_agree(rows: int, columns: int, escapes: int, dtype: torch.dtype, device: str) -> None:
    layer = make(rows, columns, escapes=escapes, device=device)
    wide = torch.randn(4, 3, columns + 8, device=device).to(dtype)
    inputs = [wide[..., :columns].contiguous(), wide[..., 3 : columns + 3], wide[:, 0, 8:], wide[0, 0, 1 : columns + 1]]
    for x in [*inputs, inputs[0][:0], inputs[0].transpose(0, 1)]:
        expected = by_op(layer, x)
        for _ in range(2):  # settled, then looked up
            got = layer(x)
            assert got.shape == expected.shape
            assert torch.equal(got, expected)


def test_unwatched_calls_are_no_ops() -> None:
    layer = make()
    assert "birkhoff::hyperlinear" not in ops_of(layer, torch.randn(2, 70))
    layer.requires_grad_(True)
    assert "birkhoff::hyperlinear" in ops_of(layer, torch.randn(2, 70))
    with torch.no_grad():
        assert "birkhoff::hyperlinear" not in ops_of(layer, torch.randn(2, 70))
    assert "birkhoff::hyperlinear" in ops_of(make(), torch.randn(2, 70, requires_grad=True))


class Seen(TorchDispatchMode):
    """Records which ops pass."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_subclasses_and_transforms_see_the_op() -> None:
    layer, x = make(), torch.randn(2, 70)
    with Seen() as seen:
        layer(x)
    assert seen.ops == [OP]
    with torch.device("cpu"):  # a function mode
        assert "birkhoff::hyperlinear" in ops_of(layer, x)
    assert "birkhoff::hyperlinear" in ops_of(layer, nn.Parameter(x, requires_grad=False))
    with Seen() as seen:
        torch.func.grad(lambda x: layer(x).sum())(x)
    assert OP in seen.ops


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_records_the_op() -> None:
    layer, x = make(), torch.randn(2, 70)
    traced = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    assert "birkhoff::hyperlinear" in str(traced.graph)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert OP in [node.target for node in graph.graph.nodes]


def test_what_was_settled_holds_no_tensor(device: str) -> None:
    layer, other, x = make(device=device), make(device=device), torch.randn(3, 70, device=device)
    before = layer(x)
    layer.theta, layer.step, layer.bias = other.theta, other.step, other.bias
    layer.escape_index, layer.escape_value = other.escape_index, other.escape_value
    assert torch.equal(layer(x), by_op(other, x))
    assert not torch.equal(layer(x), before)
    layer.bias = None
    assert torch.equal(layer(x), by_op(layer, x))


def test_what_is_settled_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_MOST_CALLS", 4)
    layer = make()
    for tokens in range(1, 20):
        layer(torch.randn(tokens, 70))
        assert len(linear._calls) <= 4
    linear.forget_plans()
    assert not linear._calls


def test_tensors_on_other_devices_are_named() -> None:
    layer = make()
    layer.theta = layer.theta.to("meta")
    with pytest.raises(KernelError, match="x on cpu but theta elsewhere; move the layer there"):
        layer(torch.randn(2, 70))
    layer = make()
    layer.bias = nn.Parameter(torch.zeros(8), requires_grad=False)
    with pytest.raises(KernelError, match=r"7 rows takes a bias of as many, got \[8\]"):
        layer(torch.randn(2, 70))
