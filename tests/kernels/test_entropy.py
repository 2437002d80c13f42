"""Stored streams to coordinates by the kernels: what the codec's reference reads, and nothing that it refuses."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from birkhoff.codec import contexts, planes, rest
from birkhoff.codec.container import CodedTensor, LatticeParams, parse, serialise
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor, quantise, quantise_path
from birkhoff.codec.tensor import decode_tensor, lattice_of
from birkhoff.codec.trajectory import Escapes
from birkhoff.kernels.entropy import op

triton = pytest.importorskip("triton")


def stored(name: str, code: LatticeTensor, path: int = 0) -> CodedTensor:
    """A coded matrix as it is stored."""
    streams, escapes = planes.pack(code, path=path)
    params = LatticeParams(path=path, columns=code.columns, step=code.step, escapes=escapes)
    shape = code.i.shape[0], code.columns
    return CodedTensor(name=name, codec="lattice", dtype="F32", shape=shape, params=params, parts=streams)


def grouped(name: str, code: LatticeTensor, path: int) -> CodedTensor:
    """The same in groups as small as the format allows, by levels that are drawn."""
    whole = stored(name, code, path)
    rows, pairs = code.i.shape
    symbols = rest.unpack(whole.parts[1], 2 * rows * pairs).reshape(rows, 2 * pairs)
    draw = np.random.default_rng(path)
    row, column = (draw.integers(0, 4, count).astype(np.uint8) for count in symbols.shape)
    groups = contexts.split(symbols, row, column, contexts.rule_2(8))
    levels = rest.pack(np.concatenate(([8], row, column)).astype(np.uint8))
    return replace(whole, parts=(levels, *map(in_many_lanes, groups), whole.parts[-1]))


def in_many_lanes(symbols: np.ndarray) -> bytes:
    """A stream by a table in 32 lanes, however short: few steps for the interpreter."""
    table = tables.reference_fit(np.bincount(symbols, minlength=256))
    assert table is not None
    return bytes([rest.ANS, 5]) + table.data + encode(symbols, table.frequency, 32)


def encode(symbols: np.ndarray, frequency: np.ndarray, lanes: int) -> bytes:
    """The blocks of one stream."""
    (coded,) = rans.encode(symbols, np.array([symbols.size]), frequency[None], np.array([lanes]))
    return coded


def scaled(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose rows and columns differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rows, 1), (1, columns)))
    return weight * (0.7 * a).exp() * (0.7 * b).exp()


def in_container(tensors: Sequence[CodedTensor]) -> list[CodedTensor]:
    """The tensors as a reader finds them: streams that follow each other in one piece of memory."""
    return parse(serialise(list(tensors)))


def check(coded: Sequence[CodedTensor], device: str) -> None:
    for one, found in zip(coded, op.lattices_of(coded, device), strict=True):
        assert found.i.device.type == device
        assert found.to("cpu").equals(lattice_of(one))


@pytest.mark.parametrize("step", [2.0, 0.02], ids=["coarse", "many outside int8"])
def test_matrices_of_every_path_in_one_batch(device: str, step: float) -> None:
    weight = scaled(13, 61)
    codes = [quantise(weight, step), *(quantise_path(weight, step, path) for path in (1, 2))]
    coded = [grouped(str(path), code, path) for path, code in enumerate(codes)]
    assert all(len(one.parts) == 4 for one in coded)
    if step < 1:
        assert all(len(code.escapes) > one.params.escapes > 0 for code, one in zip(codes[1:], coded[1:], strict=True))  # type: ignore[union-attr]
    check(in_container(coded), device)
    check(coded, device)  # each stream in memory of its own


def test_rows_of_one_level_have_no_entries(device: str) -> None:
    """As in fixed point, where each weight is a row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 1, generator=generator)
    tall = stored("tall", quantise(weight, 1e-3))
    uneven = stored("uneven", quantise(scaled(60, 61), 0.1))
    made = op.plan([uneven, tall, uneven], 128)
    assert len(tall.parts[0])  # it has groups
    assert made.entries.stop - made.entries.start == 2 * (60 + 2 * 31) + 2
    check(in_container([uneven, tall, replace(uneven, name="again")]), device)


def test_more_outside_int8_than_there_was_room_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_ROOM", 3)
    check([stored("w", quantise_path(scaled(3, 50), 0.03, 1), 1)], device)


def test_more_outside_int8_than_can_be_counted_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op._Report, "brought", lambda _: (-(1 << 31), [0]))
    with pytest.raises(FormatError, match=f"{1 << 31} coordinates are outside int8"):
        op.lattices_of([stored("w", quantise(scaled(3, 50), 0.3))], device)


def test_raw_and_repeating_streams(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    i, j = (torch.randint(-128, 128, (4, 24), dtype=torch.int8, generator=generator) for _ in range(2))
    raw = stored("raw", LatticeTensor(i=i, j=j, escapes=Escapes.none(), step=1.0, columns=48))
    assert raw.parts[1][0] == rest.RAW
    same = LatticeTensor(i=i[:1].repeat(9, 1), j=j[:1].repeat(9, 1), escapes=Escapes.none(), step=1.0, columns=48)
    repeating = stored("zstd", same)
    assert repeating.parts[1][0] == rest.ZSTD
    check(in_container([repeating, raw]), device)


def test_nothing_and_one_weight(device: str) -> None:
    assert op.lattices_of([], device) == []
    check([stored("w", quantise(torch.tensor([[0.7]]), 0.1))], device)


def test_dense_tensors_of_every_codec(device: str) -> None:
    weight = scaled(3, 40)
    planes_of = CodedTensor(name="p", codec="raw", dtype="F32", shape=(2,), parts=(b"\0\0\x80\x3f\0\0\0\x40",))
    half = replace(stored("h", quantise(weight, 0.3)), dtype="F16")
    coded = [planes_of, stored("w", quantise(weight, 0.1)), half]
    for one, found in zip(coded, op.decode_tensors(coded, device), strict=True):
        assert found.device.type == device
        assert torch.equal(found.cpu(), decode_tensor(one))


def blocks(
    symbols: np.ndarray, frequency: np.ndarray, lanes: int, device: str, data: bytes | None = None
) -> tuple[np.ndarray, bool]:
    """Symbols as the kernel reads them in one block, between bytes that are not its own; and whether it is damaged."""
    from birkhoff.kernels.entropy import triton as entropy_triton

    data = encode(symbols, frequency, lanes) if data is None else data
    words = (len(data) - 4 * lanes) // 2
    rows = torch.tensor([[3, words, 5, len(symbols), 1, lanes, 0]], dtype=torch.int64, device=device)
    held = torch.frombuffer(bytearray(b"\xff\xff\xff" + data + b"\xff" * 64), dtype=torch.uint8).to(device)
    both = torch.from_numpy(np.stack((np.zeros_like(frequency), frequency)).view(np.int16)).to(device)
    out = torch.full((10 + len(symbols),), 77, dtype=torch.uint8, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    entropy_triton.decode_blocks(held, both, rows, out, bad)
    found = out.cpu().numpy()
    assert (found[[*range(5), *range(-5, 0)]] == 77).all()
    return found[5:-5], bool(bad)


def stream(size: int, sigma: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symbols + 128, and the frequencies of their table."""
    data = np.random.default_rng(seed).standard_normal(size) * sigma
    symbols = np.clip(np.rint(data), -128, 127).astype(np.int8).view(np.uint8) ^ np.uint8(128)
    symbols[:2] = 1, 2
    table = tables.reference_fit(np.bincount(symbols, minlength=256))
    assert table is not None
    return symbols, table.frequency


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("sigma", [0.4, 40.0])
def test_blocks_of_every_number_of_lanes(device: str, lanes: int, sigma: float) -> None:
    for size in (2, 3 * lanes + 1):
        symbols, frequency = stream(max(2, size), sigma)
        found, bad = blocks(symbols, frequency, lanes, device)
        assert not bad
        assert np.array_equal(found, symbols)


@pytest.mark.parametrize("wrong", ["state", "last state", "few words", "many words"])
def test_a_block_that_does_not_end_as_it_should_is_damaged(device: str, wrong: str) -> None:
    symbols, frequency = stream(60)
    data = bytearray(encode(symbols, frequency, 4))
    if wrong == "state":
        data[2:4] = b"\0\0"
    elif wrong == "last state":
        data[4] ^= 1
    elif wrong == "few words":
        del data[-2:]
    else:
        data += b"\0\0"
    assert blocks(symbols, frequency, 4, device, bytes(data))[1]
    with pytest.raises(tables.DamagedError):
        rans.decode(bytes(data), 60, frequency, 4)


def outcome(coded: CodedTensor, device: str | None) -> LatticeTensor | None:
    try:
        return lattice_of(coded) if device is None else op.lattices_of([coded], device)[0].to("cpu")
    except FormatError:
        return None


@given(st.data())
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_the_same_to_the_kernels(device: str, data: st.DataObject) -> None:
    whole = stored("w", quantise_path(scaled(2, 90, data.draw(st.integers(0, 99))), 0.5, 1), 1)
    parts = [bytearray(part) for part in whole.parts]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([part for part in parts if part]))
        part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = replace(whole, parts=tuple(map(bytes, parts)))
    expected, found = outcome(damaged, None), outcome(damaged, device)
    assert (expected is None) == (found is None)
    assert expected is None or found is None or found.equals(expected)


def test_what_is_refused_is_named(device: str) -> None:
    good = stored("good", quantise(scaled(2, 40), 0.5))
    for parts, message in (
        (good.parts[:2], "tensor 'bad': 2 streams stored"),
        ((*good.parts, b""), "tensor 'bad': 4 streams stored, expected 3"),
        ((good.parts[0], b"", good.parts[2]), "tensor 'bad': stream is missing"),
        ((good.parts[0], b"\x00abc", good.parts[2]), "tensor 'bad': 3 bytes stored raw, expected 80"),
        ((good.parts[0], b"\x01abc", good.parts[2]), "tensor 'bad': compressed stream is corrupt"),
        ((good.parts[0], b"\x02\x06", good.parts[2]), "tensor 'bad': coded stream has 6 as log2 of its lanes"),
        ((good.parts[0], good.parts[1][:-2], good.parts[2]), "tensor 'bad': coded stream is corrupt"),
        ((*good.parts[:2], b"x"), "tensor 'bad': 1 bytes stored, expected an empty stream"),
    ):
        bad = replace(good, name="bad", parts=parts)
        with pytest.raises(FormatError, match=message):
            op.lattices_of([good, bad], device)
        with pytest.raises(FormatError, match=message.removeprefix("tensor 'bad': ")):
            lattice_of(bad)
    with pytest.raises(FormatError, match="tensor 'bad': codec raw holds no coordinates"):
        op.lattices_of([CodedTensor(name="bad", codec="raw", dtype="F32", shape=(), parts=(b"",))], device)


def check_packed(items: Sequence[planes.Item], device: str) -> list[planes.Packed]:
    from birkhoff.kernels.entropy import pack

    found = pack.pack([(code.to(device), path) for code, path in items])
    expected = [planes.reference_pack(code, path=path) for code, path in items]
    assert [(list(map(bytes, streams)), escapes) for streams, escapes in found] == [
        (list(map(bytes, streams)), escapes) for streams, escapes in expected
    ]
    return found


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes are grouped as large ones are, in groups as small as the format allows."""
    monkeypatch.setattr(planes, "SMALL", 0)
    monkeypatch.setattr(contexts, "USUAL_BITS", 8)


def two_scales(rows: int, columns: int) -> torch.Tensor:
    scale = torch.where(torch.arange(rows) < rows // 2, 20.0, 0.5)[:, None]
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * scale


@pytest.mark.usefixtures("small_groups")
def test_packing_makes_the_references_bytes(device: str) -> None:
    weight = two_scales(20, 62)
    items = [
        (quantise_path(weight, 1.0, 2), 2),
        (quantise(scaled(5, 30), 0.005), 0),
        (quantise_path(weight, 0.05, 1), 1),
    ]
    found = check_packed(items, device)
    assert [len(streams) for streams, _ in found] == [5, 3, 3]
    assert found[1][1] > 0
    assert len(items[2][0].escapes) > found[2][1] > 0


@pytest.mark.usefixtures("small_groups")
def test_batches_side_by_side_make_the_same_bytes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from birkhoff.kernels.entropy import pack

    monkeypatch.setattr(pack, "TOGETHER", 1)
    monkeypatch.setattr(pack, "SIDE_BY_SIDE", 2)
    weight = two_scales(6, 62)
    check_packed([(quantise(weight * scale, 1.0), 0) for scale in (1.0, 0.01, 0.3)], device)


@pytest.mark.usefixtures("small_groups")
def test_packing_chooses_raw_and_repeating_streams_as_the_reference_does(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    i, j = (torch.randint(-128, 128, (4, 24), dtype=torch.int8, generator=generator) for _ in range(2))
    raw = LatticeTensor(i=i, j=j, escapes=Escapes.none(), step=1.0, columns=48)
    same = LatticeTensor(i=i[:1].repeat(9, 1), j=j[:1].repeat(9, 1), escapes=Escapes.none(), step=1.0, columns=48)
    still = LatticeTensor(i=0 * i, j=0 * j, escapes=Escapes.none(), step=1.0, columns=48)
    found = check_packed([(raw, 0), (same, 0), (still, 0)], device)
    assert [streams[1][0] for streams, _ in found] == [rest.RAW, rest.ZSTD, rest.ZSTD]
    check_packed([(still, 0)], device)  # nothing has a table


def test_small_matrices_are_packed_by_the_reference(device: str) -> None:
    item = quantise(two_scales(20, 62), 1.0).to(device), 0
    assert op.pack([item]) == [planes.reference_pack(*item[:1], path=0)]


def test_fixed_point_is_packed_by_the_reference_however_large(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(-1, 2, (planes.SMALL, 1), dtype=torch.int8, generator=generator)
    j = torch.randint(-128, 128, (planes.SMALL, 1), dtype=torch.int8, generator=generator)
    code = LatticeTensor(i=i, j=j, escapes=Escapes.none(), step=1.0, columns=1)
    ((streams, escapes),) = op.pack([(code.to(device), 0)])
    assert ([*map(bytes, streams)], escapes) == ([*map(bytes, planes.reference_pack(code, path=0)[0])], 0)
    assert 8 * sum(map(len, streams)) < 9.7 * planes.SMALL  # log2(3) + 8


@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
def test_blocks_are_encoded_with_every_number_of_lanes(device: str, lanes: int) -> None:
    from birkhoff.kernels.entropy import encoding

    symbols, frequency = stream(4 * lanes + 3, 20.0)
    sizes = 3 * lanes, lanes + 3  # two blocks of one stream, as if blocks were short
    rows = [[0, sizes[0], 0, lanes, 0], [sizes[0], sizes[1], 0, lanes, sizes[0] + 2 * lanes]]
    start = np.cumsum(frequency) - frequency
    code = (frequency.astype(np.uint32) | start.astype(np.uint32) << 16)[None]
    room = torch.zeros(sum(sizes) + 4 * lanes, dtype=torch.uint16, device=device)
    words = torch.zeros(2, dtype=torch.int32, device=device)
    held, row, coded = (torch.from_numpy(x).to(device) for x in (symbols, np.array(rows), code))
    encoding.encode_blocks(held, row, coded, room, words)
    bytes_of = room.cpu().view(torch.uint8).numpy().tobytes()
    for (begin, size, _, _, before), written in zip(rows, words.tolist(), strict=True):
        expected = encode(symbols[begin : begin + size], frequency, lanes)
        first = 2 * (before + size - written)
        assert bytes_of[first : first + len(expected)] == expected
        assert len(expected) == 4 * lanes + 2 * written


def test_what_warms_kernels_up_is_a_tensor_in_a_group(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(decode_tensor(op._SMALLEST[0]), torch.tensor([[0, 200, 0, 0.0]]))
    check(op._SMALLEST[:1], device)
    made = op.plan(op._SMALLEST[:1], 128)
    assert made.entries.stop - made.entries.start == 4  # its places come from tables
    op.warm_up(device)
    monkeypatch.setattr(op, "begin", None)
    op.warm_up(device)  # started once in a process


def test_an_operation_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: torch.device) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(op, "_start_operations", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        op._warm_up.__wrapped__(torch.device("cpu"))


def test_streams_in_an_upload_are_not_sent_again(device: str) -> None:
    weights = [scaled(13, 61, seed) for seed in range(4)]
    coded = [stored(str(k), quantise(weight, 0.3)) for k, weight in enumerate(weights)]
    blobs = [serialise(coded[:2]), serialise(coded[2:3])]
    upload = op.Upload(4096 + 128, torch.device(device))
    there = []
    for blob, to in zip(blobs, (1024, 0), strict=True):
        part = upload.host[to : to + len(blob)]
        part[:] = np.frombuffer(blob, np.uint8)
        there += parse(part.data)
    upload.send()
    assert not op.plan(there, 128, upload.runs, upload.data.numel()).runs
    # The last is elsewhere, and so is what zstd packed.
    same = LatticeTensor(
        i=torch.zeros(9, 24, dtype=torch.int8),
        j=torch.ones(9, 24, dtype=torch.int8),
        escapes=Escapes.none(),
        step=1.0,
        columns=48,
    )
    every = [*there, coded[3], stored("zstd", same)]
    made = op.plan(every, 128, upload.runs, upload.data.numel())
    assert made.runs
    assert min(run.to for run in made.runs) >= upload.data.numel()
    result = op.begin(every, {one.name for one in every}, device, upload)
    for one, found in zip(every, result(), strict=True):
        assert isinstance(found, LatticeTensor)
        assert found.to("cpu").equals(lattice_of(one))


def test_what_was_planned_is_decoded_without_triton_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is planned for before its trial has ended; a CPU is asked for first, and again."""
    answers = iter([True, False] if torch.device(device).type == "cpu" else [False])
    monkeypatch.setattr(op, "triton_serves", lambda _: next(answers))
    planned: list[int] = []
    monkeypatch.setattr(op, "_planned", lambda coded, _: planned.append(len(coded)))
    monkeypatch.setattr(op, "_start", None)
    coded = [stored(str(k), quantise(scaled(9, 40, k), 0.3)) for k in range(2)]
    codes = op.lattices_of(coded, device)
    assert all(code.to("cpu").equals(lattice_of(one)) for one, code in zip(coded, codes, strict=True))
    assert planned == [2]


def test_escapes_of_many_tensors_are_read_as_those_of_each(device: str) -> None:
    coded = [stored(str(k), quantise(scaled(9, 40, k), step)) for k, step in enumerate((0.02, 2.0, 0.01))]
    counts = [one.params.escapes for one in coded]  # type: ignore[union-attr]
    assert counts[0] > 0 == counts[1] < counts[2]
    pairs = [9 * 20] * 3
    found = rest.unpack_escapes_all([one.parts[-1] for one in coded], counts, pairs, [1, 1, 1])
    for number, one in enumerate(coded):
        own = rest.unpack_escapes(one.parts[-1], counts[number], pairs[number])
        for all_of, each in ((found.pair, own.pair), (found.i, own.i), (found.j, own.j)):
            assert np.array_equal(all_of[found.tensor == number], each.numpy())
    with pytest.raises(FormatError, match=f"escapes are not {counts[2]} increasing indices below 5"):
        rest.unpack_escapes_all([one.parts[-1] for one in coded], counts, [180, 180, 5], [1, 1, 1])
    with pytest.raises(FormatError, match=f"escapes are not {counts[0]} increasing"):
        rest.unpack_escapes_all([one.parts[-1] for one in coded], counts, pairs, [9, 1, 1])
