"""HyperLinear as a module: it moves, stores, copies and trains around like an nn.Linear of the decoded weight."""

import copy
import io
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from birkhoff.codec import lattice
from birkhoff.kernels.decode import serving
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.linear import op as linear
from birkhoff.kernels.runtime import device as runtime
from birkhoff.kernels.runtime.errors import KernelError


def layer_and_weight(rows: int = 7, columns: int = 70, *, bias: bool = True) -> tuple[HyperLinear, torch.Tensor]:
    weight = torch.randn(rows, columns) * 0.02
    weight[1, 3], weight[-1, -1] = 3.0, -5.0  # escapes at this step
    code = lattice.quantise(weight, 0.002)
    assert len(code.escapes) == 2
    return HyperLinear.from_lattice(code, torch.randn(rows) if bias else None), code.decode()


def test_forward_is_the_linear_layer_of_the_decoded_weight() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(2, 3, 70)
    assert torch.equal(layer(x), functional.linear(x, weight, layer.bias))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.dense_weight(torch.bfloat16), weight.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(70,), (1, 70), (0, 70), (2, 0, 70), (4, 1, 2, 70)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, layer.bias))


def test_non_contiguous_input() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(70, 5, 3).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(3, 70, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.bias is not None
    assert torch.equal(y, functional.linear(x, weight.to(dtype), layer.bias.to(dtype)))


def test_moving_to_a_dtype_leaves_the_code_alone() -> None:
    layer, weight = layer_and_weight()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "_like"}
    layer.half().to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    for name, buffer in before.items():
        now = getattr(layer, name)
        assert now.dtype == buffer.dtype, name
        assert torch.equal(now, buffer), name
    assert torch.equal(layer.dense_weight(torch.float32), weight)


def test_autocast_decides_the_dtype() -> None:
    layer, weight = layer_and_weight()
    x = torch.randn(3, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = functional.linear(x, weight, layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_into_an_empty_layer(assign: bool) -> None:
    layer, _ = layer_and_weight()
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    with torch.device("meta" if assign else "cpu"):
        empty = HyperLinear(70, 7)
    empty.load_state_dict(torch.load(stored, weights_only=True), assign=assign)
    x = torch.randn(2, 70)
    assert torch.equal(empty(x), layer(x))


def test_an_empty_layer_is_zero() -> None:
    assert torch.equal(HyperLinear(5, 3, bias=False)(torch.randn(2, 5)), torch.zeros(2, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: object) -> None:
    layer, _ = layer_and_weight()
    other = copied(layer)  # type: ignore[operator]
    x = torch.randn(2, 70)
    assert torch.equal(other(x), layer(x))
    assert other.theta.data_ptr() != layer.theta.data_ptr()


def test_gradients_reach_input_and_bias() -> None:
    layer, _ = layer_and_weight(rows=4, columns=9)
    layer.double()
    assert layer.bias is not None
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.bias))
    assert not layer.theta.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_adapters_train_around_it() -> None:
    model = nn.Sequential(nn.Linear(70, 70), layer_and_weight()[0], nn.Linear(7, 1))
    model(torch.randn(4, 70)).sum().backward()
    first = model[0].weight
    assert isinstance(first, nn.Parameter)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    layer, _ = layer_and_weight()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (3, 5):
        x = torch.randn(tokens, 70, requires_grad=True)
        expected = layer(x)
        got = compiled(x)
        assert torch.equal(got, expected)
        (want,) = torch.autograd.grad(expected.sum(), x)
        (have,) = torch.autograd.grad(got.sum(), x)
        torch.testing.assert_close(have, want)


def test_exports_with_a_dynamic_batch() -> None:
    layer, _ = layer_and_weight()
    program = torch.export.export(layer, (torch.randn(3, 70),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    x = torch.randn(11, 70)
    assert torch.equal(program.module()(x), layer(x))


def test_op_is_registered_soundly() -> None:
    layer, _ = layer_and_weight(rows=4, columns=9)
    x = torch.randn(3, 9, requires_grad=True)
    buffers = (layer.theta, layer.step, layer.escape_index, layer.escape_value)
    torch.library.opcheck(torch.ops.birkhoff.hyperlinear.default, (x, *buffers, layer.bias))


def test_wrong_shapes_are_named() -> None:
    layer, weight = layer_and_weight()
    with pytest.raises(KernelError, match=r"70 features got an input of shape \[2, 71\]"):
        layer(torch.randn(2, 71))
    with pytest.raises(KernelError, match=r"bias \[7\], got \[8\]"):
        HyperLinear.from_lattice(lattice.quantise(weight, 0.002), torch.zeros(8))


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Level and text of what is said over three calls on the CPU."""
    serving._serves.cache_clear()
    linear.forget_plans()
    layer, _ = layer_and_weight()
    with caplog.at_level(logging.INFO, logger="birkhoff.kernels"):
        for _ in range(3):
            layer(torch.randn(2, 70))
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "birkhoff.kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_falling_back_without_a_gpu_is_said_once_and_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtime, "_GPU_FILES", ((tmp_path, "nvidia[0-9]*"),))
    assert fallbacks(caplog) == [(logging.INFO, "kernels on cpu run eagerly: no CUDA device")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
def test_a_gpu_that_torch_cannot_use_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(runtime, "_GPU_FILES", ((tmp_path, "nvidia[0-9]*"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ((level, said),) = fallbacks(caplog)
    assert level == logging.WARNING
    assert said.startswith("kernels on cpu run eagerly: there is a GPU, but torch ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose, as from a worker that is to have none
    caplog.clear()
    assert fallbacks(caplog) == [(logging.INFO, "kernels on cpu run eagerly: no CUDA device")]
