"""What only a GPU shows: every plan at full size, tensors past 2^31 elements, graphs and compilation."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from birkhoff.codec import lattice, planes, reference
from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.packed import Bits, PackedTensor, rows_of
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import encode_tensor, lattice_of
from birkhoff.kernels.decode import op as decode
from birkhoff.kernels.encode import op as encode
from birkhoff.kernels.entropy import op as entropy
from birkhoff.kernels.entropy import staging
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.kernels.int8 import launch as int8_launch
from birkhoff.kernels.int8 import plan as int8_plan
from birkhoff.kernels.int8.triton import prepare_quantise
from birkhoff.kernels.linear import launch, plan
from birkhoff.kernels.linear.op import dense_weight
from birkhoff.kernels.linear.plan import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}

# rows, columns: SAM-H, SAM2-L with ragged blocks, the mask decoder, odd ones
SHAPES = [(3840, 1280), (1280, 5120), (432, 144), (1152, 288), (4, 256), (136, 64), (131, 199), (24, 1152)]


def random_layer(rows: int, columns: int, *, bias: bool = True) -> HyperLinear:
    layer = HyperLinear(columns, rows, bias, device="cuda")
    layer.theta = torch.randint(-(1 << 15), 1 << 15, layer.theta.shape, device="cuda", dtype=torch.int16).view(
        torch.uint16
    )
    layer.step = torch.tensor(0.0017, device="cuda")
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def random_packed(rows: int, columns: int, bits: Bits) -> PackedHyperLinear:
    layer = PackedHyperLinear(columns, rows, bits=bits, device="cuda")
    for plane in (layer.low, layer.high, layer.scale):
        plane.random_(0, 256)
    layer.step = torch.tensor(0.06 / rows_of(bits), device="cuda")
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def decoded(layer: PackedHyperLinear, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a layer without escapes, as the codec decodes them."""
    return PackedTensor(
        bits=layer.bits,
        low=layer.low[rows],
        high=layer.high[rows],
        scale=layer.scale[rows],
        step=float(layer.step),
        columns=layer.in_features,
        escape_index=layer.escape_index,
        escape_value=layer.escape_value,
    ).decode(dtype)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


def need_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:g} GB of GPU memory, {free:.0f} GB are free")


@pytest.mark.parametrize("layer", [HyperLinear, Int8HyperLinear])
def test_escapes_that_a_reader_left_on_the_cpu_reach_every_layer(
    layer: type[HyperLinear] | type[Int8HyperLinear],
) -> None:
    weight = torch.randn(136, 199, generator=torch.Generator().manual_seed(3))
    weight.view(-1)[::501] *= 40
    code = lattice.quantise(weight, 0.02)
    assert len(code.escapes)
    split = replace(code.to("cuda"), escapes=code.escapes)
    assert torch.equal(
        layer.from_lattice(split).dense_weight(torch.float32).cpu(),
        layer.from_lattice(code).dense_weight(torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 13, 64, 257, 4900])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_plan(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    layer = random_layer(rows, columns)
    assert layer.bias is not None
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
    weight = layer.dense_weight(torch.float32).double()
    expected = functional.linear(x.double(), weight, layer.bias.double())
    problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=dtype, aligned=launch.is_aligned(x))
    plans = plan.candidates(problem, launch.gpu_of(x.device).kernels)
    for chosen in plans:
        kernel = launch.launcher(chosen)
        if kernel is not None:
            y = kernel(x, layer.theta, layer.step, layer.bias)
            assert relative_error(y, expected) < TOLERANCES[dtype], chosen
    assert relative_error(layer(x), expected) < TOLERANCES[dtype]


def test_hopper_gpus_run_the_hopper_kernel() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert launch.gpu_of(torch.device("cuda", 0)).kernels == {"small_m", "hopper"}


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("escapes", [5, 500])
def test_escapes(tokens: int, escapes: int) -> None:
    weight = torch.randn(384, 640, device="cuda") * 0.02
    weight.view(-1)[torch.randperm(weight.numel(), device="cuda")[:escapes]] = 7.0
    code = lattice.quantise(weight, 0.0013)
    assert len(code.escapes)
    layer = HyperLinear.from_lattice(code, dtype=torch.bfloat16)
    x = torch.randn(tokens, 640, device="cuda", dtype=torch.bfloat16)
    assert relative_error(layer(x), functional.linear(x.double(), code.decode().double())) < 5e-3


def test_row_strides_that_are_not_aligned() -> None:
    layer = random_layer(256, 128)
    assert layer.bias is not None
    x = torch.randn(300, 131, device="cuda", dtype=torch.bfloat16)[:, 1:129]
    expected = functional.linear(x.double(), layer.dense_weight(torch.float32).double(), layer.bias.double())
    assert relative_error(layer(x), expected) < 5e-3


def test_encode_of_a_full_matrix_has_the_codecs_indices() -> None:
    weight = torch.randn(5120, 1280, device="cuda") * 0.03
    code, error = encode.encode(weight, 30.0)
    expected = lattice.quantise(weight.cpu(), code.step)
    assert torch.equal(code.i.cpu(), expected.i)
    assert torch.equal(code.j.cpu(), expected.j)
    assert error.error == pytest.approx(fidelity(weight.cpu(), expected.decode()).error, rel=1e-5)
    assert torch.equal(decode.decode_lattice(code).cpu(), expected.decode())


def test_past_two_to_the_31() -> None:
    need_memory(40)
    rows, columns = (1 << 19) + 3, 4096 + 64  # 2.18e9 weights
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    weight[-1, -1] = 300.0
    step = 0.05
    code, error = encode.quantise(weight, step)
    tail = lattice.quantise(weight[-5:], step)
    assert torch.equal(code.i[-5:], tail.i)
    assert torch.equal(code.j[-5:], tail.j)
    assert code.escapes.pair[-1] == rows * columns // 2 - 1
    assert error.sqnr_db > 30
    dense = decode.decode_lattice(code, torch.bfloat16)
    assert torch.equal(dense[-5:], tail.decode(torch.bfloat16))
    assert torch.equal(dense[:5], lattice.quantise(weight[:5], step).decode(torch.bfloat16))
    del weight, dense
    layer = HyperLinear.from_lattice(code, dtype=torch.bfloat16)
    for tokens in (2, 100):
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        expected = functional.linear(x.double(), tail.decode().double())
        assert relative_error(layer(x)[:, -5:], expected) < 5e-3


def test_outputs_past_two_to_the_31() -> None:
    need_memory(30)
    layer = random_layer(4104, 64)
    assert layer.bias is not None
    x = torch.randn((1 << 19) + 77, 64, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    assert y.numel() > 1 << 31
    expected = functional.linear(x[-300:].double(), layer.dense_weight(torch.float32).double(), layer.bias.double())
    assert relative_error(y[-300:], expected) < 5e-3


def assert_same_in_a_graph(layer: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.fill_(torch.nan)
        graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_cuda_graphs(tokens: int) -> None:
    layer = random_layer(1280, 1280)
    x = torch.randn(tokens, 1280, device="cuda", dtype=torch.bfloat16)
    assert_same_in_a_graph(layer, x)


def test_compiles_with_inductor() -> None:
    layer = random_layer(640, 320)
    model = torch.compile(
        torch.nn.Sequential(torch.nn.GELU(), layer, torch.nn.LayerNorm(640, device="cuda")), fullgraph=True
    )
    for tokens in (8, 300):
        x = torch.randn(tokens, 320, device="cuda", requires_grad=True)
        y = model(x)
        y.sum().backward()
        expected = functional.layer_norm(functional.linear(functional.gelu(x), layer.weight, layer.bias), (640,))
        torch.testing.assert_close(y, expected, atol=2e-4, rtol=2e-4)
        assert x.grad is not None


def test_autocast() -> None:
    layer = random_layer(640, 320)
    assert layer.bias is not None
    x = torch.randn(64, 320, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = functional.linear(x.double(), layer.dense_weight(torch.float32).double(), layer.bias.double())
    assert relative_error(y, expected) < 5e-3


def test_dense_weight_equals_the_reference() -> None:
    layer = random_layer(300, 1280)
    for dtype in TOLERANCES:
        got = dense_weight(layer.theta, layer.step, layer.escape_index, layer.escape_value, 1280, dtype)
        assert torch.equal(got, reference.decode(layer.theta, layer.step, 1280, dtype))


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (2304, 576), (40000, 2048)])
def test_packed_weights_have_the_codecs_bits(rows: int, columns: int, dtype: torch.dtype, bits: Bits) -> None:
    layer = random_packed(rows, columns, bits)
    for _ in range(2):  # the second launch takes the short way of `prepared`
        assert torch.equal(layer.dense_weight(dtype), decoded(layer, slice(None), dtype))
    x = torch.randn(5, 3, columns, device="cuda", dtype=dtype)
    assert layer.bias is not None
    expected = functional.linear(x.double(), layer.dense_weight(torch.float32).double(), layer.bias.double())
    assert relative_error(layer(x), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("columns", [4096 + 128, 4096 + 64])
@pytest.mark.parametrize("bits", [10, 12])
def test_packed_past_two_to_the_31(columns: int, bits: Bits) -> None:
    need_memory(15)
    layer = random_packed((1 << 19) + 3, columns, bits)
    dense = layer.dense_weight(torch.bfloat16)
    assert dense.numel() > 1 << 31
    for rows in (slice(-5, None), slice(5)):
        assert torch.equal(dense[rows], decoded(layer, rows, torch.bfloat16))


@pytest.mark.parametrize("bits", [10, 12])
def test_packed_layers_in_graphs_and_compiled(bits: Bits) -> None:
    layer = random_packed(640, 320, bits)
    x = torch.randn(300, 320, device="cuda")
    assert_same_in_a_graph(layer, x)
    model = torch.compile(torch.nn.Sequential(torch.nn.GELU(), layer), fullgraph=True)
    x.requires_grad_(True)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, functional.linear(functional.gelu(x), layer.weight, layer.bias), atol=2e-4, rtol=2e-4)
    assert x.grad is not None


def stored(rows: int, columns: int, target_db: float, *, path: bool, spread: float = 0.7) -> CodedTensor:
    """A matrix as it is stored, of weights whose rows and columns differ in scale."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rows, 1), (1, columns)))
    weight = (weight * (spread * a).exp() * (spread * b).exp()).cuda()
    return encode_tensor("w", weight, Decision(codec="lattice", target_db=target_db, path=path)).tensor


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("target_db", [12.0, 30.0, 48.0])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1, 70000), (9000, 2), (640, 3001)])
def test_stored_matrices_of_every_size(rows: int, columns: int, target_db: float, path: bool) -> None:
    coded = [stored(rows, columns, target_db, path=path, spread=spread) for spread in (0.7, 0.0)]
    coded = [one for one in coded if one.codec == "lattice"]
    assert coded
    for one, found in zip(coded, entropy.lattices_of(coded, "cuda"), strict=True):
        assert found.to("cpu").equals(lattice_of(one))


def test_damage_to_large_streams_is_found_as_on_a_cpu() -> None:
    whole = stored(1280, 5120, 30.0, path=True)
    draw = np.random.default_rng(0)
    damaged = 0
    for _ in range(60):
        parts = [bytearray(part) for part in whole.parts]
        part = parts[draw.integers(0, len(parts) - 1)]
        for _ in range(draw.integers(1, 3)):
            part[draw.integers(0, len(part)) if draw.integers(0, 2) else draw.integers(0, min(len(part), 90))] ^= (
                1 << draw.integers(0, 8)
            )
        if draw.integers(0, 4) == 0:
            del part[-draw.integers(1, 9) :]
        bad = replace(whole, parts=tuple(map(bytes, parts)))
        try:
            expected = lattice_of(bad)
        except FormatError:
            damaged += 1
            with pytest.raises(FormatError):
                entropy.lattices_of([whole, bad], "cuda")
        else:
            assert entropy.lattices_of([whole, bad], "cuda")[1].to("cpu").equals(expected)
    assert damaged > 30


def test_threads_decode_side_by_side() -> None:
    coded = [stored(300 + k, 640, 30.0, path=True) for k in range(8)]
    expected = list(map(lattice_of, coded))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, code in zip(
                pool.map(lambda one: entropy.lattices_of([one], "cuda"), coded), expected, strict=True
            ):
                assert found[0].to("cpu").equals(code)


@pytest.mark.parametrize("path", [0, 1, 2])
@pytest.mark.parametrize("spread", [0.0, 0.7])
@pytest.mark.parametrize(("rows", "columns"), [(3840, 1280), (640, 3001), (1, 200_000), (140_000, 2)])
def test_matrices_are_packed_to_the_references_bytes(rows: int, columns: int, spread: float, path: int) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rows, 1), (1, columns)))
    weight = (weight * (spread * a).exp() * (spread * b).exp()).cuda()
    codes = [lattice.quantise_path(weight, s, path) if path else lattice.quantise(weight, s) for s in (1.0, 0.1, 0.02)]
    found = planes.pack_all([(code, path) for code in codes])
    for code, (streams, escapes) in zip(codes, found, strict=True):
        expected, count = planes.reference_pack(code, path=path)
        assert [bytes(stream) == bytes(other) for stream, other in zip(streams, expected, strict=True)] == [True] * len(
            expected
        )
        assert escapes == count


@pytest.mark.parametrize(("few", "one_copy"), [(0, 0), (1 << 30, 0), (1 << 30, 1 << 30)])
def test_bytes_go_to_the_gpu_whatever_their_places(few: int, one_copy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PIECE", 1000)
    monkeypatch.setattr(staging, "_FEW_BYTES", few)
    monkeypatch.setattr(staging, "_ONE_COPY", one_copy)
    draw = np.random.default_rng(0)
    for pinned in (0.0, 0.5, 1.0):
        parts, place = [], 0
        for size in draw.integers(1, 3000, 40).tolist():
            place += int(draw.integers(0, 1500))
            part = torch.from_numpy(draw.integers(0, 256, size).astype(np.uint8))
            parts.append((place, part.pin_memory() if draw.random() < pinned else part))
            place += size
        stage = staging.Stage(torch.device("cuda", 0))
        monkeypatch.setattr(staging, "_stage", lambda _, stage=stage: stage)
        found = staging.send(parts, place, torch.device("cuda", 0)).cpu()
        assert all(torch.equal(found[at : at + len(part)], part) for at, part in parts)


def test_what_is_uploaded_is_pinned_until_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")

    def sent(size: int) -> staging.Upload:
        upload = staging.Upload(size, device)
        upload.host[:] = np.arange(size) % 251
        upload.send()
        with upload.decoding():
            assert torch.equal(upload.data.cpu(), torch.from_numpy(upload.host))
        return upload

    def is_pinned(upload: staging.Upload) -> bool:
        return torch.from_numpy(upload.host).is_pinned()

    upload = sent(2 * staging._PIECE + 5)
    assert is_pinned(upload)
    upload.end()
    upload.end()
    assert not is_pinned(upload)
    assert not is_pinned(sent(staging._PIECE - 1))
    # Without `end`, memory is pinned as long as a tensor uses it.
    upload = sent(staging._PIECE)
    finalizer, part = upload._pinned, upload.host[5:9].data
    assert finalizer is not None
    del upload
    assert finalizer.alive
    del part
    assert not finalizer.alive
    # A system that refuses: here, memory that is pinned already. The bytes go another way, and no kernel is told.
    monkeypatch.setattr(staging, "_pin", lambda memory, pin=staging._pin: pin(memory) and pin(memory))
    upload = sent(staging._PIECE)
    assert upload._pinned is None
    assert torch.equal(torch.ones(3, device=device).cpu(), torch.ones(3))
    torch.cuda.cudart().cudaHostUnregister(upload.host.ctypes.data)


def random_int8(rows: int, columns: int, *, bias: bool = True) -> Int8HyperLinear:
    layer = Int8HyperLinear(columns, rows, bias, device="cuda")
    layer.plane[:, :columns].random_(-128, 128)
    if columns % 64 == 0:  # some that repeat others, and a block that is not whole
        layer.extra = torch.randint(columns, (32,), dtype=torch.int32, device="cuda")
        layer.plane = torch.cat((layer.plane, layer.plane[:, :32]), dim=1)
    layer.step = torch.tensor(0.0017, device="cuda")
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def quantised(x: torch.Tensor, layer: Int8HyperLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel, and checked against the codec's bits."""
    q = torch.zeros(len(x), layer.plane.shape[1], dtype=torch.int8, device="cuda")
    scale = torch.zeros(len(x), device="cuda")
    prepare_quantise(launch.form_of(x, 1, None), len(layer.extra))(x, q, scale, layer.extra)
    expected = reference.quantise_tokens(x[-300:].cpu(), layer.extra.cpu())
    assert torch.equal(q[-300:].cpu(), expected[0])
    assert torch.equal(scale[-300:].cpu(), expected[1])
    return q, scale


def int8_expected(q: torch.Tensor, scale: torch.Tensor, layer: Int8HyperLinear) -> torch.Tensor:
    product = q.double() @ layer.plane.double().T
    y = product * scale.double()[:, None] * layer.step.double()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 13, 64, 257, 4900])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_int8_plan(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    layer = random_int8(rows, columns)
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
    q, scale = quantised(x, layer)
    expected = int8_expected(q, scale, layer)
    problem = Problem(tokens=tokens, rows=rows, columns=columns, dtype=dtype, aligned=True, int8=True)
    form = launch.form_of(x, rows, layer.bias)
    for chosen in int8_plan.candidates(problem, int8_launch.kernels_of(x.device)):
        run = int8_launch.prepare(chosen, form, layer.plane.shape[1], len(layer.extra))
        for _ in range(2):  # the second launch takes the short way of `prepared`
            y = torch.full((tokens, rows), torch.nan, dtype=dtype, device="cuda")
            run(x, layer.plane, y, layer.step, layer.bias, layer.extra)
            assert relative_error(y, expected) < TOLERANCES[dtype], chosen
    assert relative_error(layer(x), expected) < TOLERANCES[dtype]


def test_hopper_gpus_multiply_bytes_by_the_hopper_kernel() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert int8_launch.kernels_of(torch.device("cuda", 0)) == {"int8_hopper"}


def test_int8_past_two_to_the_31() -> None:
    need_memory(30)
    layer = random_int8((1 << 19) + 3, 4096 + 64, bias=False)  # weights
    for tokens in (2, 100):
        x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
        q, scale = quantised(x, layer)
        tail = q.double() @ layer.plane[-5:].double().T * scale.double()[:, None] * layer.step.double()
        assert relative_error(layer(x)[:, -5:], tail) < 5e-3
    del layer
    layer = random_int8(4104, 64)  # outputs
    x = torch.randn((1 << 19) + 77, 64, device="cuda", dtype=torch.bfloat16)
    q, scale = quantised(x, layer)
    y = layer(x)
    assert y.numel() > 1 << 31
    assert relative_error(y[-300:], int8_expected(q[-300:], scale[-300:], layer)) < 5e-3
    del layer, x, y
    layer = random_int8(8, 4096)  # inputs
    x = torch.randn((1 << 19) + 77, 4096, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    q, scale = quantised(x, layer)
    assert relative_error(layer(x)[-300:], int8_expected(q[-300:], scale[-300:], layer)) < 5e-3


@pytest.mark.parametrize("tokens", [1, 40, 300, 4000])
def test_int8_layers_in_graphs_and_compiled(tokens: int) -> None:
    layer = random_int8(1280, 1280)
    x = torch.randn(tokens, 1280, device="cuda", dtype=torch.bfloat16)
    assert_same_in_a_graph(layer, x)
    model = torch.compile(torch.nn.Sequential(torch.nn.ReLU(), layer), fullgraph=True)
    x.requires_grad_(True)
    y = model(x)
    y.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(y, layer(x.relu()))
    assert x.grad is not None


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("escapes", [5, 500])
def test_int8_escapes(tokens: int, escapes: int) -> None:
    weight = torch.randn(384, 640, device="cuda") * 0.02
    weight.view(-1)[torch.randperm(weight.numel(), device="cuda")[:escapes]] = 7.0
    code = lattice.quantise(weight, 0.0013)
    x = torch.randn(tokens, 640, device="cuda", dtype=torch.bfloat16)
    y = Int8HyperLinear.from_lattice(code, dtype=torch.bfloat16)(x)
    assert relative_error(y, functional.linear(x.double(), code.decode().double())) < 1.5e-2
