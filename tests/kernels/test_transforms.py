"""Under `torch.func`, forward-mode AD, FLOP counters and on the meta device, the layers do what `nn.Linear` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from birkhoff.codec import lattice, packed
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.kernels.runtime.errors import KernelError

ROWS, COLUMNS = 5, 9

FORMS = ["uint16", "packed12", "packed10"]


def pair(form: str, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[CompressedLinear, nn.Linear]:
    """A layer of a form, and the `nn.Linear` of its decoded weight."""
    weight = torch.randn(ROWS, COLUMNS) * 0.02
    weight[1, 3] = 5.0  # an escape
    code = lattice.quantise(weight, 0.002)
    held = torch.randn(ROWS, dtype=dtype) if bias else None
    layer: CompressedLinear = (
        HyperLinear.from_lattice(code, held, dtype=dtype)
        if form == "uint16"
        else PackedHyperLinear.from_packed(packed.pack(code, 12 if form == "packed12" else 10), held, dtype=dtype)
    )
    linear = nn.Linear(COLUMNS, ROWS, bias, dtype=dtype)
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    return layer, linear


def squares(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).sin().square().sum()


def dual(layer: nn.Module) -> tuple[Tensor, Tensor]:
    with fwd.dual_level():
        made = fwd.make_dual(torch.ones(3, COLUMNS, dtype=torch.float64), torch.full((3, COLUMNS), 0.5).double())
        value, tangent = fwd.unpack_dual(layer(made))
        assert tangent is not None
        return value, tangent


def bias_only(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The derivative along the bias alone, the input having none."""
    tangents = (torch.arange(ROWS).double(),)
    x = torch.ones(2, COLUMNS, dtype=torch.float64)
    found: tuple[Tensor, Tensor] = jvp(
        lambda b: functional_call(layer, {"bias": b}, (x,)), (torch.ones(ROWS).double(),), tangents
    )
    return found


def per_sample(layer: nn.Module) -> Any:
    """Gradients of the bias for each of a batch of inputs."""
    x = torch.linspace(-1, 1, 4 * COLUMNS).double().view(4, COLUMNS)
    return vmap(grad(lambda b, x: functional_call(layer, {"bias": b}, (x,)).sin().sum()), (None, 0))(layer.bias, x)


def biases(layer: nn.Module) -> Tensor:
    """A batch of biases, to one input and to as many."""
    x, bias = torch.ones(4, 2, COLUMNS).double(), torch.linspace(-1, 1, 4 * ROWS).double().view(4, ROWS)
    one = vmap(lambda b: functional_call(layer, {"bias": b}, (x[0],)))(bias)
    each = vmap(lambda x, b: functional_call(layer, {"bias": b}, (x,)), in_dims=(1, 1))(x.transpose(0, 1), bias.T)
    return torch.cat((one, each))


X = torch.linspace(-1, 1, COLUMNS).double()
CASES: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda layer: grad(squares(layer))(X),
    "grad of grad": lambda layer: grad(lambda x: grad(squares(layer))(x).sum())(X),
    "vjp": lambda layer: vjp(layer, X)[1](torch.ones(ROWS).double())[0],
    "jvp": lambda layer: jvp(squares(layer), (X,), (torch.ones_like(X),)),
    "jacrev": lambda layer: jacrev(layer)(X),
    "jacfwd": lambda layer: jacfwd(layer)(X),
    "jacobian of a batch": lambda layer: vmap(jacrev(layer))(torch.stack((X, 2 * X))),
    "hessian": lambda layer: hessian(squares(layer))(X),
    "reverse over reverse": lambda layer: jacrev(jacrev(squares(layer)))(X),
    "vmap": lambda layer: vmap(layer, in_dims=1, out_dims=1)(
        torch.randn(COLUMNS, 6, generator=torch.Generator().manual_seed(0)).double()
    ),
    "dual numbers": dual,
    "dual numbers without gradients": lambda layer: dual(layer.requires_grad_(False)),
}
WITH_BIAS: dict[str, Callable[[nn.Module], Any]] = {"bias alone": bias_only, "per sample": per_sample, "biases": biases}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_transforms_give_what_they_give_of_nn_linear(form: str, bias: bool, case: str) -> None:
    layer, linear = pair(form, bias=bias)
    layer(X[None])  # the code is kept from here on
    torch.testing.assert_close(CASES[case](layer), CASES[case](linear))


@pytest.mark.parametrize("case", WITH_BIAS)
@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_the_bias(form: str, case: str) -> None:
    layer, linear = pair(form)
    torch.testing.assert_close(WITH_BIAS[case](layer), WITH_BIAS[case](linear))


def batches_views_of_dtypes() -> bool:
    """Whether vmap has a rule for reading bits as another type, which the layers' buffers are: some torch has none."""
    try:
        vmap(lambda bits: bits.view(torch.float32))(torch.zeros(2, 3, dtype=torch.int32))
    except RuntimeError as error:
        if "view.dtype" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("form", FORMS)
def test_an_ensemble_of_layers(form: str) -> None:
    if not batches_views_of_dtypes():
        pytest.skip(f"torch {torch.__version__} has no vmap rule for aten::view.dtype, so no layer can be stacked")
    layers, linears = zip(*(pair(form) for _ in range(3)), strict=True)
    x = torch.randn(2, COLUMNS).double()
    state = [{**dict(layer.named_parameters()), **dict(layer.named_buffers())} for layer in layers]
    stacked = {name: torch.stack([each[name] for each in state]) for name in state[0]}
    got = vmap(lambda state: functional_call(layers[0], state, (x,)))(stacked)
    torch.testing.assert_close(got, torch.stack([linear(x) for linear in linears]))
    torch.testing.assert_close(layers[0](x), linears[0](x))  # what was put in for the call is gone


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_every_order_and_mode(form: str) -> None:
    layer, _ = pair(form)
    assert layer.bias is not None
    x = torch.randn(3, COLUMNS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.bias))
    assert torch.autograd.gradgradcheck(lambda x, _: layer(x), (x, layer.bias))

    def through(x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, {"bias": bias}, (x,))
        return out

    with fwd.dual_level():  # a level is all it takes for the form that knows tangents
        assert torch.autograd.gradcheck(through, (x, layer.bias))
    assert torch.autograd.gradcheck(through, (x, layer.bias), check_forward_ad=True, check_backward_ad=False)


def test_a_batch_of_gradients_keeps_its_dtype() -> None:
    layer, linear = pair("uint16", dtype=torch.bfloat16)
    x = torch.randn(4, COLUMNS).bfloat16()
    mine, theirs = (vmap(grad(lambda x, of=of: of(x).float().sum()))(x) for of in (layer, linear))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_a_forward_pass_on_the_meta_device(form: str) -> None:
    layer, linear = pair(form, dtype=torch.float32)
    x = torch.empty(2, 3, COLUMNS, device="meta")
    assert layer(torch.ones(1, COLUMNS)).device.type == "cpu"
    got, expected = layer.to("meta")(x), linear.to("meta")(x)
    assert (got.device, got.dtype, got.shape) == (expected.device, expected.dtype, expected.shape)
    assert layer.weight.shape == linear.weight.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype
    assert layer._kept is not None
    assert {part.device.type for part in layer._kept[1]} == {"meta"}  # what it was moved from is not held


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [True, False])
def test_flops_are_counted_as_those_of_nn_linear(form: str, gradients: bool) -> None:
    layer, linear = pair(form, dtype=torch.float32)
    x = torch.randn(2, 3, COLUMNS, requires_grad=gradients)
    counts = []
    for module in (layer, linear):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            y = module(x)
            if gradients:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 6 * COLUMNS * ROWS * (2 if gradients else 1)


@pytest.mark.parametrize("form", FORMS)
def test_onnx_is_refused_with_the_remedy(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = pair(form, dtype=torch.float32)
    layer(torch.ones(1, COLUMNS))
    monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
    with pytest.raises(KernelError, match=r"export the plain model instead.*load_state_dict"):
        torch.export.export(layer, (torch.ones(1, COLUMNS),))


def test_what_is_kept_follows_the_buffers() -> None:
    layer, other = pair("uint16", dtype=torch.float32)[0], pair("uint16", dtype=torch.float32)[0]
    x = torch.randn(2, COLUMNS)
    with torch.inference_mode():
        layer(x)
    kept = layer._kept
    layer.requires_grad_(False)(x)
    assert layer._kept is kept
    assert layer.bias is not None
    assert other.bias is not None
    for name, buffer in layer.named_buffers():
        buffer.data = getattr(other, name).clone()  # as FSDP does it: the same object, other memory
    layer.bias.data = other.bias.data
    assert torch.equal(layer(x), other(x))
    layer.requires_grad_(True)(x).sum().backward()
