"""HyperLinear on int8 tensor cores: the arithmetic against its reference, and the layer as a module."""

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional

from birkhoff.codec import lattice, reference
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.pairs import join, split
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.int8 import op as int8
from birkhoff.kernels.int8.plan import by_rule, candidates, int8_fused, int8_hopper, int8_tiles
from birkhoff.kernels.linear import tuned
from birkhoff.kernels.linear.op import forget_plans
from birkhoff.kernels.linear.plan import Plan, Problem, tiles
from birkhoff.kernels.runtime.errors import KernelError

pytest.importorskip("triton")

from birkhoff.kernels import tune
from birkhoff.kernels.int8 import launch
from birkhoff.kernels.runtime.timing import Times
from birkhoff.kernels.tune import problem_of

# Relative error of the output against float64 with the same quantised tokens: rounding to the dtype, once.
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)]

# tokens, rows, columns: ragged blocks, odd and even, less than a block, tiles with a remainder, a row in several parts
SHAPES = [(1, 17, 97), (3, 5, 64), (20, 70, 200), (2, 3, 1), (2, 3, 2), (70, 130, 33), (5, 66, 256), (2, 3, 16500)]


NONE = torch.empty(0, dtype=torch.int32)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().cpu().double() - expected).norm() / expected.norm())


def by_the_book(x: Tensor, layer: Int8HyperLinear) -> Tensor:
    """The output in float64 from quantised tokens."""
    plane, extra, step, _, _ = (part.cpu() for part in layer.code())
    q, scale = reference.quantise_tokens(x, extra)
    y = (q.double() @ plane.double().T) * scale.double()[:, None] * step.double()
    return y if layer.bias is None else y + layer.bias.detach().cpu().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extras", [0, 3, 300])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_tokens_are_quantised_to_the_references_bits(
    tokens: int, rows: int, columns: int, extras: int, dtype: torch.dtype, device: str
) -> None:
    from birkhoff.kernels.int8.triton import prepare_quantise
    from birkhoff.kernels.linear.launch import form_of

    x = torch.randn(tokens, columns).to(dtype)
    extra = torch.randint(2 * ((columns + 1) // 2), (extras,), dtype=torch.int32)
    expected, scale = reference.quantise_tokens(x, extra)
    wide = torch.empty(tokens, columns + 7, dtype=dtype, device=device)[:, 3 : columns + 3].copy_(x)
    for there in (x.to(device), wide):
        q, found = expected.to(device).zero_(), torch.zeros(tokens, device=device)
        prepare_quantise(form_of(there, rows, None), extras)(there, q, found, extra.to(device))
        assert torch.equal(q.cpu(), expected)
        assert torch.equal(found.cpu(), scale)


@pytest.mark.parametrize("plan", [int8_tiles(16, 32, 128, 4, 2), int8_fused(16, 32, 64, 4)], ids=lambda plan: plan.path)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_against_the_reference(
    tokens: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    tolerance: float,
    plan: Plan,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "plan_for", lambda *_: plan)
    forget_plans()
    weight = torch.randn(rows, columns) * 0.02
    weight[0, columns // 2], weight[-1, -1] = 0.6, -0.4  # escapes
    code = lattice.quantise(weight, 0.001)
    layer = Int8HyperLinear.from_lattice(code, torch.randn(rows) if rows % 2 else None, device=device)
    assert len(layer.extra) >= 4
    x = torch.randn(tokens, columns).to(dtype)
    y = layer(x.to(device))
    forget_plans()
    assert y.dtype == dtype
    assert relative_error(y, by_the_book(x, layer)) < tolerance
    eager = layer.to("cpu")
    assert relative_error(y, eager(x).double()) < tolerance


def test_a_pair_written_out() -> None:
    """The worked example of `int8.triton`."""
    x = torch.tensor([[2.56, -1.28]])
    q, scale = reference.quantise_tokens(x, NONE)
    assert q[0, :2].tolist() == [127, -63]
    assert float(scale[0]) == pytest.approx(2.56 / 127)
    plane = torch.tensor([[3, 1, *[0] * 14]], dtype=torch.int8)
    y = reference.int8_linear(x, plane, NONE, torch.tensor(0.1), None)
    assert float(y[0, 0]) == pytest.approx(0.641, abs=1e-4)


@pytest.mark.parametrize("columns", [1280, 1283])
def test_the_shear_is_kept(columns: int, device: str) -> None:
    """J/256 lies 48 dB under the weights, below what rounding loses: were it dropped, that loss would follow it."""
    code = lattice.quantise(torch.randn(24, columns) * 0.02, 0.0022)
    x = torch.randn(200, columns)
    exact = functional.linear(x, code.decode())
    of_the_shear = exact - functional.linear(x, join(code.i.float(), code.j.float(), columns) * code.step)
    lost = exact - Int8HyperLinear.from_lattice(code, device=device)(x.to(device)).cpu()
    assert fidelity(exact, exact - lost).sqnr_db > 41
    assert abs(float((lost * of_the_shear).sum() / of_the_shear.square().sum())) < 0.2


@pytest.mark.parametrize(("heavy", "most"), [(False, 0.5), (True, 4.0)], ids=["normal", "heavy-tailed"])
def test_what_rounding_the_tokens_costs(heavy: bool, most: float) -> None:
    """Decibels of the output, against weights that are 30 dB from their source; tails are what one scale suffers by."""
    weight = torch.randn(96, 1280) * 0.02
    code = lattice.quantise(weight, 0.0022)
    x = torch.distributions.StudentT(4.0).sample((200, 1280)) if heavy else torch.randn(200, 1280)
    exact = functional.linear(x, weight)
    in_float = fidelity(exact, HyperLinear.from_lattice(code)(x)).sqnr_db
    assert in_float > 29
    assert in_float - fidelity(exact, Int8HyperLinear.from_lattice(code)(x)).sqnr_db < most


def escaped_layer(device: str, columns: int = 99) -> tuple[Int8HyperLinear, Tensor]:
    weight = torch.randn(70, columns) * 0.02
    weight[0, 0], weight[3, -1], weight[3, 40], weight[69, 63] = 2.0, -3.0, 1.0, 0.14
    code = lattice.quantise(weight, 0.001)
    assert len(code.escapes) == 4
    return Int8HyperLinear.from_lattice(code, device=device), code.decode()


@pytest.mark.parametrize("columns", [99, 128, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_escapes_and_strides(dtype: torch.dtype, columns: int, device: str) -> None:
    layer, weight = escaped_layer(device, columns)
    x = torch.randn(5, columns + 20)[:, 10 : columns + 10].to(dtype)
    for there in (x.to(device), x.T.contiguous().to(device).T, x.to(device)[:, None]):
        y = layer(there).reshape(5, 70)
        assert relative_error(y, functional.linear(x.double(), weight.double())) < 1.5e-2


def test_escapes_take_the_columns_that_they_need() -> None:
    """2000 steps are 127 and 15 bytes more, -3000 are -128 and 23, 140 one."""
    layer, weight = escaped_layer("cpu", 128)
    assert len(layer.extra) == 15 + 23 + 7 + 1
    assert layer.plane.shape == (70, 176)
    assert torch.equal(layer.dense_weight(torch.float32), weight)
    # The columns put together are the coordinates, exactly.
    whole = layer.plane[:, :128].double().index_add_(1, layer.extra, layer.plane[:, 128 : 128 + 46].double())
    i, j = split(whole)
    torch.testing.assert_close(join((i + j / 256) * 0.001, j * 0.001, 128), weight.double(), rtol=1e-6, atol=1e-9)
    for _ in range(20):
        many = torch.randn(9, 130) * 0.02
        many.view(-1)[torch.randint(many.numel(), (30,))] *= 40
        code = lattice.quantise(many, 0.001)
        assert len(reference.plane_of(code)[1]) == reference.extra_columns(code) > 30


def test_what_is_not_finite_stays_in_its_token(device: str) -> None:
    layer, _ = escaped_layer(device)
    x = torch.randn(4, 99)
    expected = layer(x.to(device))
    x[1, 5], x[2, 98], x[3] = torch.nan, -torch.inf, 0.0
    y = layer(x.to(device))
    assert torch.equal(y[0], expected[0])
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3], torch.zeros_like(y[3]))


def test_greatest_and_smallest_activations(device: str) -> None:
    code = lattice.quantise(torch.randn(16, 64) * 0.02, 0.001)
    layer = Int8HyperLinear.from_lattice(code, device=device)
    x = torch.randn(3, 64)
    for factor in (1e-20, 1e30):
        y = layer((x * factor).to(device)).cpu().double() / factor
        assert relative_error(y, functional.linear(x.double(), code.decode().double())) < 1.5e-2
    assert torch.equal(layer(torch.full((1, 64), 1e-40, device=device)).cpu(), torch.zeros(1, 16))


def test_sums_fit_at_the_most_columns() -> None:
    layer = Int8HyperLinear(int8.MOST_COLUMNS, 1, bias=False)
    assert layer.plane.shape[1] == int8.MOST_COLUMNS
    layer.plane.fill_(-128)
    y = layer(torch.full((1, int8.MOST_COLUMNS), 256.0))
    # Second halves of pairs are 257 tokens' worth of 256: a little more than the first.
    assert float(y) == pytest.approx(-128 * 256 * int8.MOST_COLUMNS * (1 + 1 / 512), rel=5e-3)
    with pytest.raises(KernelError, match="up to 131072 columns, got 131073; use HyperLinear"):
        Int8HyperLinear(int8.MOST_COLUMNS + 1, 1)


@pytest.mark.parametrize("columns", [16, 48, 1024, 2512])
def test_bytes_multiply_without_instructions_for_them(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, plane = (torch.randint(-128, 128, (rows, columns)).to(torch.int8) for rows in (5, 1))
    expected = reference.exact_product(q, plane)
    assert torch.equal(int8._byte_product(q, plane).double(), expected)
    monkeypatch.setattr(int8, "_int_mm_is_exact", lambda: False)
    assert torch.equal(int8._byte_product(q, plane).double(), expected)


def layer_and_weight(rows: int = 7, columns: int = 70, *, bias: bool = True) -> tuple[Int8HyperLinear, Tensor]:
    weight = torch.randn(rows, columns) * 0.02
    weight[1, 3], weight[-1, -1] = 3.0, -5.0  # escapes at this step
    code = lattice.quantise(weight, 0.002)
    return Int8HyperLinear.from_lattice(code, torch.randn(rows) if bias else None), code.decode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_weights_are_hyperlinears(dtype: torch.dtype) -> None:
    code = lattice.quantise(torch.randn(9, 131) * 0.02, 0.001)
    layer = Int8HyperLinear.from_lattice(code)
    assert torch.equal(layer.dense_weight(dtype), HyperLinear.from_lattice(code).dense_weight(dtype))
    assert torch.equal(layer.weight, code.decode())
    i, j = reference.coordinates_of(layer.plane, 131)
    assert torch.equal(i, code.i)
    assert torch.equal(j, code.j)


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70), (4, 1, 2, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_leading_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, weight = layer_and_weight()
    assert layer.bias is not None
    x = torch.randn(shape, dtype=dtype)
    y, expected = layer(x), functional.linear(x, weight.to(dtype), layer.bias.to(dtype))
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    if x.numel():
        assert relative_error(y, expected.detach().double()) < 1.5e-2


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_into_an_empty_layer(assign: bool) -> None:
    layer, _ = layer_and_weight()
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    with torch.device("meta" if assign else "cpu"):
        empty = Int8HyperLinear(70, 7)
    empty.load_state_dict(torch.load(stored, weights_only=True), assign=assign)
    x = torch.randn(2, 70)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(Int8HyperLinear(5, 3, bias=False)(torch.randn(2, 5)), torch.zeros(2, 3))


def test_gradients_are_those_of_the_decoded_weight() -> None:
    """Rounding counts as the identity."""
    layer, weight = layer_and_weight()
    assert layer.bias is not None
    x, upstream = torch.randn(3, 70, requires_grad=True), torch.randn(3, 7)
    (layer(x) * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_transforms() -> None:
    layer, weight = layer_and_weight()
    x, along = torch.randn(3, 70), torch.randn(3, 70)
    value, tangent = jvp(layer, (x,), (along,))
    assert torch.equal(value, layer(x))
    torch.testing.assert_close(tangent, along @ weight.T)
    torch.testing.assert_close(grad(lambda x: layer(x).sum())(x), torch.ones(3, 7) @ weight)
    torch.testing.assert_close(vmap(layer)(x), layer(x))
    assert layer.to("meta")(torch.empty(2, 70, device="meta")).shape == (2, 7)


def test_op_is_registered_soundly() -> None:
    layer, _ = layer_and_weight()
    x = torch.randn(3, 70, requires_grad=True)
    torch.library.opcheck(torch.ops.birkhoff.int8_linear.default, (x, *layer.code(), layer.bias))
    torch.library.opcheck(torch.ops.birkhoff.int8_weight.default, (*layer.code(), 70, torch.float32))


def test_compiles_and_exports() -> None:
    layer, _ = layer_and_weight()
    model = nn.Sequential(nn.GELU(), layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(model, (torch.randn(3, 70),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (3, 5):
        x = torch.randn(tokens, 70)
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(program.module()(x), model(x))


def test_wrong_shapes_are_named() -> None:
    layer, _ = layer_and_weight()
    with pytest.raises(KernelError, match=r"70 features got an input of shape \[2, 71\]"):
        layer(torch.randn(2, 71))
    with pytest.raises(
        KernelError, match=r"expects floats \[..., K\] of \d+ to \d+ columns, got torch.float32 \[2, 171\]"
    ):
        int8.int8_linear(torch.randn(2, 171), layer.code(), None)


@pytest.mark.parametrize("tokens", [1, 64, 256, 4096, 1 << 17])
@pytest.mark.parametrize("kernels", [frozenset[str](), frozenset({"int8_hopper"})])
def test_no_rule_quantises_tokens_again_for_each_of_many_tiles(tokens: int, kernels: frozenset[str]) -> None:
    for rows in (33, 256, 768, 1024, 2048):
        for columns in (64, 144, 256, 288, 2048):
            problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=torch.bfloat16, aligned=True, int8=True)
            assert by_rule(problem, kernels).path != "int8_fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 4096, 100_000])
@pytest.mark.parametrize("rows", [3840, 1281, 4])
@pytest.mark.parametrize("kernels", [frozenset({"int8_hopper"}), frozenset()], ids=["hopper", "none"])
def test_plans_keep_to_what_runs(tokens: int, rows: int, dtype: torch.dtype, kernels: frozenset[str]) -> None:
    problem = Problem(tokens=tokens, rows=rows, columns=1280, dtype=dtype, aligned=True, int8=True)
    found = candidates(problem, kernels)
    assert len(found) == len(set(found)) > 0
    for plan in (by_rule(problem, kernels), *found):
        assert plan.path in {"int8_tiles", "int8_fused", *kernels}
        if plan.path == "int8_hopper":
            assert rows % 8 == 0
            assert problem.half


def test_plans_whose_tiles_do_not_fit_are_not_tried() -> None:
    """By the compiler's count, two rounds of the ring and what changes layouts: 232 KB of float32, 168 of bfloat16."""
    for dtype, tried in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        problem = Problem(tokens=4900, rows=432, columns=144, dtype=dtype, aligned=True, int8=True)
        plans = [plan for plan in candidates(problem, frozenset()) if plan.path == "int8_fused"]
        assert (int8_fused(128, 256, 64, 8) in plans) == tried
        for plan in plans:
            ring = 2 * 2 * plan.block_k * (plan.block_m * dtype.itemsize + plan.block_n)
            assert ring + plan.block_m * (plan.block_n + plan.block_k) <= 227 * 1024, plan


def test_a_plan_that_a_gpu_has_no_room_for_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    wide, narrow, x = int8_tiles(128, 128, 128, 8, 4), int8_tiles(64, 64, 128, 4, 4), torch.ones(3, 3)

    def too_large() -> Tensor:
        raise OutOfResources(98304, 65536, "shared memory")

    monkeypatch.setattr(tune, "_int8_calls", lambda *_: ({wide: [too_large], narrow: [lambda: x]}, x))
    monkeypatch.setattr(tune, "compare", lambda calls, _: {plan: Times(median=1, low=1, high=1) for plan in calls})
    chosen, times = tune.tune(problem_of(64, 64, 64, int8=True), torch.device("cpu"))
    assert (chosen, list(times)) == (narrow, [narrow])


def test_shipped_plans_can_all_be_launched() -> None:
    for shapes in launch.SHIPPED.values():
        for (rows, columns), plans in shapes.items():
            for tokens, plan in plans.items():
                problem = problem_of(rows, columns, tokens, int8=True)
                assert plan in candidates(problem, frozenset({"int8_hopper"})), (rows, columns, tokens)


def test_own_plans_are_kept_beside_those_of_the_first_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path))
    tuned.user_table.cache_clear()
    asked, own = problem_of(999, 1280, 64, int8=True), int8_tiles(64, 64, 128, 4, 4)
    in_float = problem_of(999, 1280, 64, int8=False)
    assert tuned.measured(asked, "Some GPU", frozenset(), {}) is None
    tuned.save({tuned.key("Some GPU", asked): own, tuned.key("Some GPU", in_float): tiles(16, 64, 4, 4)})
    assert tuned.measured(asked, "Some GPU", frozenset(), {}) == own
    assert tuned.measured(in_float, "Some GPU", frozenset(), {}) == tiles(16, 64, 4, 4)
    table = {(999, 1280): {256: int8_hopper(64, 128)}}
    larger = problem_of(999, 1280, 100, int8=True)
    assert tuned.measured(larger, "Some GPU", frozenset({"int8_hopper"}), table) == int8_hopper(64, 128)
    assert tuned.measured(larger, "Some GPU", frozenset(), table) is None
    tuned.user_table.cache_clear()
