from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from birkhoff.codec.errors import CodecError
from birkhoff.codec.output import statistics
from birkhoff.codec.output.hessian import MOST_ROWS, Hessian
from birkhoff.codec.output.statistics import LEAST_SAMPLES, SAMPLES, Outputs, _sampled, gather, layer_inputs


class Net(nn.Module):
    """A convolution, a linear layer, one that nothing uses, and one whose output weighs little."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6, 5)
        self.idle = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(self.conv(x).flatten(2).transpose(1, 2)))
        return out


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(count: int = 3) -> Tensor:
    return torch.randn(count, 8, 9, 9, generator=torch.Generator().manual_seed(1))


def outputs_of(model: nn.Module, weight: float = 1.0) -> Callable[[int], Outputs]:
    x = inputs()
    return lambda batch: {"out": (weight, model(x[batch : batch + 1]))}


def take(model: nn.Module, **options: int) -> tuple[dict[str, float], dict[str, Hessian]]:
    found: dict[str, Hessian] = {}
    arguments = {"batches": 3, "probes": 2, "seed": 0} | options
    return gather(model, outputs_of(model), keep=found.__setitem__, **arguments), found


def test_inputs_of_layers_that_run_again_for_a_gradient_count_once(net: Net) -> None:
    def runs_again(batch: int) -> Outputs:
        x = inputs()[batch : batch + 1]
        return {"out": (1.0, checkpoint(net, x, use_reentrant=False))}

    calls: list[int] = []
    handle = net.conv.register_forward_hook(lambda *_: calls.append(1))
    sums: list[int] = []
    with mock.patch.object(statistics, "_added", wraps=statistics._added) as added:
        gather(net, runs_again, batches=2, probes=3, seed=0, keep=lambda *_: None, wanted=("conv.weight",))
        sums.append(added.call_count)
    handle.remove()
    assert len(calls) > 2
    assert sums == [2 + 2 * 2 * 3]  # inputs of each batch, gradients of the output and of the matrix of each probe


def same(one: Hessian, other: Hessian) -> bool:
    """Whether both factors are the same numbers."""
    assert one.rows is not None
    assert other.rows is not None
    return torch.equal(one.columns, other.columns) and torch.equal(one.rows, other.rows)


def mean_one(hessian: Tensor) -> Tensor:
    return hessian / hessian.diagonal().mean()


def test_hessian_of_a_linear_layer_is_that_of_its_inputs_and_gradients() -> None:
    layer = nn.Linear(6, 4)
    x, found = torch.randn(1, 50, 6), {}
    gather(layer, lambda _: {"y": (1.0, layer(x))}, batches=1, probes=1, seed=5, keep=found.__setitem__)
    v = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(5))[0]
    gradient = v.T @ x[0]
    columns = mean_one(x[0].T @ x[0]) + mean_one(gradient.T @ gradient)
    torch.testing.assert_close(found["weight"].columns, columns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weight"].rows, mean_one(v.T @ v), rtol=1e-4, atol=1e-5)


def test_rows_of_a_convolution_are_its_channels() -> None:
    conv = nn.Conv2d(8, 5, 3, bias=False)
    x, found = torch.randn(1, 8, 9, 8), {}
    gather(conv, lambda _: {"y": (1.0, conv(x))}, batches=1, probes=1, seed=5, keep=found.__setitem__)
    v = torch.randn(1, 5, 7, 6, generator=torch.Generator().manual_seed(5))[0].flatten(1)
    torch.testing.assert_close(found["weight"].rows, mean_one(v @ v.T), rtol=1e-4, atol=1e-5)


def test_rows_of_other_parameters_come_from_their_gradients() -> None:
    table = nn.Module()
    table.weight = nn.Parameter(torch.randn(4, 6))
    x, found = torch.randn(1, 50, 6), {}
    gather(table, lambda _: {"y": (1.0, x @ table.weight.T)}, batches=1, probes=1, seed=5, keep=found.__setitem__)
    v = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(5))[0]
    gradient = v.T @ x[0]
    torch.testing.assert_close(found["weight"].columns, mean_one(gradient.T @ gradient), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weight"].rows, mean_one(gradient @ gradient.T), rtol=1e-4, atol=1e-5)


def test_matrices_of_very_many_rows_have_no_hessian_of_rows() -> None:
    layer = nn.Linear(2, MOST_ROWS + 1, bias=False)
    x, found = torch.randn(1, 3, 2), {}
    gather(layer, lambda _: {"y": (1.0, layer(x))}, batches=1, probes=1, seed=5, keep=found.__setitem__)
    assert found["weight"].rows is None
    assert found["weight"].columns.shape == (2, 2)


def test_outputs_that_are_changed_in_place_and_layers_that_run_again_count_once() -> None:
    """A gradient is that of the layer's own output, and recomputing a block in the backward pass adds nothing."""
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(inplace=True))
    x, plain, again = torch.randn(1, 50, 6), {}, {}
    how = {"batches": 1, "probes": 1, "seed": 5}
    gather(net, lambda _: {"y": (1.0, net(x))}, **how, keep=plain.__setitem__)
    v = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(5))[0] * (net(x)[0] > 0)
    expected = mean_one(v.T @ v)
    torch.testing.assert_close(plain["0.weight"].rows, expected, rtol=1e-4, atol=1e-5)
    gather(net, lambda _: {"y": (1.0, checkpoint(net, x, use_reentrant=False))}, **how, keep=again.__setitem__)
    torch.testing.assert_close(again["0.weight"].rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "options"), [(3, {"padding": 1, "stride": 2}), (3, {"padding": "same", "dilation": 2}), (1, {})]
)
def test_layer_inputs_of_a_convolution_are_what_its_matrix_multiplies(
    kernel: int, options: dict[str, int | str]
) -> None:
    conv, x = nn.Conv2d(4, 3, kernel, **options), torch.randn(2, 4, 7, 8)  # type: ignore[arg-type]
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 3)
    assert conv.bias is not None
    product = layer_inputs(conv, x).flatten(0, 1) @ conv.weight.reshape(3, -1).T + conv.bias
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_few_positions_all_count() -> None:
    x = torch.arange(LEAST_SAMPLES).view(2, -1, 1)
    torch.testing.assert_close(_sampled(x).flatten(), x.flatten())


@pytest.mark.parametrize("width", [2, 7, 14, 16, 49, 64, 100, 128])
@pytest.mark.parametrize("batch", [1, 4])
def test_of_many_positions_every_column_and_row_of_a_picture_counts_alike(width: int, batch: int) -> None:
    """So does every place of a window, whose tokens come one after another."""
    height = 16 * LEAST_SAMPLES // width
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    number = torch.arange(batch)[:, None].expand(batch, height * width)
    found = _sampled(torch.stack((number, y.expand_as(number), x.expand_as(number)), dim=-1))
    assert len(found) == LEAST_SAMPLES
    assert (found[:, 0].bincount() == LEAST_SAMPLES / batch).all()
    columns, parts = found[:, 2].bincount(minlength=width), (found[:, 1] * 8 // height).bincount(minlength=8)
    expected = LEAST_SAMPLES / width
    assert (columns - expected).abs().max() <= 4 * (expected * batch) ** 0.5  # as if drawn; every picture has the same
    a_row = LEAST_SAMPLES / height  # a part may have one more
    assert (parts - LEAST_SAMPLES / 8).abs().max() <= a_row + 2 * batch


def test_wide_layers_count_more_positions() -> None:
    assert _sampled(torch.zeros(1, 1 << 14, LEAST_SAMPLES)).shape == (SAMPLES * LEAST_SAMPLES, LEAST_SAMPLES)


def test_statistics_are_the_same_twice_and_in_several_passes(net: Net) -> None:
    first, hessians = take(net)
    again, others = take(net, limit_bytes=1)
    assert first == again
    assert hessians.keys() == others.keys() == {"conv.weight", "linear.weight"}
    assert all(same(hessians[name], others[name]) for name in hessians)
    assert take(net, seed=1)[0] != first
    assert hessians["conv.weight"].columns.shape == (72, 72)


def test_what_no_output_uses_is_felt_by_none(net: Net) -> None:
    sensitivity, hessians = take(net)
    assert sensitivity["idle.weight"] == 0
    assert "idle.weight" not in hessians
    assert sensitivity["linear.weight"] > 0


def test_twice_the_gradient_is_four_times_the_sensitivity() -> None:
    a, b = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    model = nn.ParameterDict({"a": a, "b": b})
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def outputs(_: int) -> Outputs:
        return {"y": (1.0, x @ a.T + 2 * (x @ b.T))}

    found = gather(model, outputs, batches=1, probes=3, seed=0, keep=lambda *_: None)
    assert found["b"] == pytest.approx(4 * found["a"])


def test_sensitivity_is_the_diagonal_of_the_jacobian(net: Net) -> None:
    """By many probes of one batch; each output over its norm, however large it is, times its weight."""
    x = inputs(1)

    def outputs(_: int) -> Outputs:
        return {"y": (0.5, 1000 * net(x))}

    found = gather(net, outputs, batches=1, probes=400, seed=0, keep=lambda *_: None, wanted=())
    features = net.norm(net.conv(x).flatten(2).transpose(1, 2))[0].detach()
    # Each of 5 outputs of a position depends on the 6 weights of its own row alone.
    expected = 0.25 * float(features.square().sum()) / 6 / float(net(x).detach().square().sum())
    assert found["linear.weight"] == pytest.approx(expected, rel=0.1)


def test_gradients_and_their_need_are_left_as_they_were(net: Net) -> None:
    net.linear.weight.requires_grad_(False)
    with torch.no_grad():
        take(net)
    assert not net.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    net.linear.weight.requires_grad_(True)


def test_outputs_that_are_no_numbers_are_refused(net: Net) -> None:
    with pytest.raises(CodecError, match="output 'y' holds NaN"):
        gather(net, lambda _: {"y": (1.0, net(inputs() * torch.nan))}, batches=1, probes=1, seed=0, keep=print)
