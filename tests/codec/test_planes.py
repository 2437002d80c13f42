import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import contexts, planes, rate, rest, trellis
from birkhoff.codec.entropy import tables
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor, quantise, quantise_path
from birkhoff.codec.trajectory import Escapes


def scaled(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose rows and columns differ in scale, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rows, 1), (1, columns)))
    return weight * (0.7 * a).exp() * (0.7 * b).exp()


def round_trip(code: LatticeTensor, *, path: int) -> list[bytes]:
    streams, stored = planes.pack(code, path=path)
    i, j, escapes = planes.unpack(streams, tuple(code.i.shape), stored, path=path)
    assert LatticeTensor(i=i, j=j, escapes=escapes, step=code.step, columns=code.columns).equals(code)
    assert stored == (len(code.escapes) if not path else int(_far(code.escapes).sum()))
    return list(streams)


def _far(escapes: Escapes) -> torch.Tensor:
    return torch.stack([(n < -256) | (n > 255) for n in (escapes.i, escapes.j)]).any(dim=0)


@given(
    st.integers(1, 60), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([0.02, 0.3, 2.0]), st.integers(0, 2)
)
@settings(max_examples=60, deadline=None)
def test_both_forms_are_one_code(rows: int, columns: int, seed: int, step: float, path: int) -> None:
    # the finest step puts many coordinates outside the box, in memory and at rest
    weight = scaled(rows, columns, seed)
    round_trip(quantise_path(weight, step, path) if path else quantise(weight, step), path=path)


@pytest.mark.parametrize("path", [0, 1, 2])
def test_grouping_saves_bits_where_scales_differ_and_costs_none_where_not(path: int) -> None:
    alike = torch.randn(300, 640, generator=torch.Generator().manual_seed(0))
    for weight, pays in ((scaled(600, 640), True), (alike, False)):
        code, _ = rate.encode(weight, 30.0, path=path)
        streams = round_trip(code, path=path)
        both = np.concatenate([plane.numpy() >> (path > 0) for plane in (code.i, code.j)], axis=1)
        flat = len(rest.pack(both.reshape(-1).view(np.uint8) ^ 128))
        assert (len(streams) > 3) == bool(streams[0])
        assert sum(map(len, streams)) < (0.96 if pays else 1.0001) * flat


def test_two_planes_of_different_scale_are_told_apart_however_small() -> None:
    """As those of weights that are numbers of 16 bits are: see `output.encode`."""
    i, j = (torch.randint(-high, high, (1440, 1), dtype=torch.int8) for high in (4, 127))
    streams = round_trip(LatticeTensor(i=i, j=j, escapes=Escapes.none(), step=1.0, columns=2), path=0)
    assert len(streams) == 4
    assert sum(map(len, streams)) < 1440 * (3 + 8) / 8 + 100


PLANES = st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.integers(0, 9), min_size=1, max_size=40)


@given(*PLANES, st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_groups_join_to_the_plane_and_have_the_announced_sizes(rows: list[int], columns: list[int], least: int) -> None:
    r, c = np.array(rows, dtype=np.uint8), np.array(columns, dtype=np.uint8)
    rule = contexts.Rule(least=least, most=6)
    plane = np.random.default_rng(0).integers(0, 256, (len(r), len(c))).astype(np.uint8)
    groups = contexts.split(plane, r, c, rule)
    assert [len(group) for group in groups] == contexts.group_sizes(r, c, rule)
    flat = np.concatenate(groups)
    assert np.array_equal(contexts.join(flat, r, c, rule), plane)
    assert np.array_equal(contexts.reference_join(flat, r, c, rule), plane)
    assert np.array_equal(np.concatenate(contexts.reference_split(plane, r, c, rule)), flat)
    for found in (contexts.addresses(r, c, rule), contexts.reference_addresses(r, c, rule)):
        assert found.sizes.tolist() == contexts.group_sizes(r, c, rule)
        base, width = found.base[found.row[:, None] & 63, found.column & 63], found.width[found.column & 63]
        assert np.array_equal(flat[base + (found.row >> 6)[:, None] * width + (found.column >> 6)], plane)
    assert all(map(np.array_equal, found, contexts.addresses(r, c, rule)))


@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_mean_squares_are_exact_sums(rows: int, columns: int, seed: int) -> None:
    plane = np.random.default_rng(seed).integers(0, 256, (rows, columns)).astype(np.uint8)
    square = (plane.astype(np.int64) - 128) ** 2
    for found, axis in zip(contexts.mean_squares(plane), (1, 0), strict=True):
        assert np.array_equal(found, square.sum(axis=axis) / plane.shape[axis])


def test_worked_example_of_contexts() -> None:
    plane = np.array([[0, 1, 2], [10, 11, 12]], dtype=np.uint8)
    levels = np.array([1, 0], dtype=np.uint8), np.array([0, 2, 0], dtype=np.uint8)
    groups = contexts.split(plane, *levels, contexts.Rule(least=2, most=32))
    assert [group.tolist() for group in groups] == [[10, 12], [0, 2], [11, 1]]


def test_a_stream_is_the_smallest_of_its_kinds() -> None:
    random = np.random.default_rng(0)
    symbols = np.rint(random.standard_normal(1 << 16)).astype(np.int8).view(np.uint8) ^ 128
    words = random.integers(0, 256, (500, 24)).astype(np.uint8)[random.integers(0, 500, 4000)].reshape(-1)
    noise = random.integers(0, 256, 5000).astype(np.uint8)
    few = np.arange(20, dtype=np.uint8)
    for data, kind in (
        (symbols, rest.ANS),
        (words, rest.ZSTD),
        (noise, rest.RAW),
        (few, rest.RAW),
        (0 * noise, rest.ZSTD),
    ):
        stream = rest.pack(data)
        assert stream[0] == kind
        assert np.array_equal(rest.unpack(stream, data.size), data)
    # Of 2.105 bits of entropy.
    assert 8 * len(rest.pack(symbols)) / len(symbols) < 2.125
    assert rest.pack(np.empty(0, np.uint8)) == b""


def test_an_estimate_is_near_the_stream() -> None:
    random = np.random.default_rng(0)
    for size in (1000, 5000, 300_000):
        data = np.rint(random.standard_normal(size) * 9).astype(np.int8).view(np.uint8) ^ 128
        sizes = np.array([size])
        (found,) = rest.estimates(sizes, tables.fit(tables.histograms(data, sizes)))
        assert found == pytest.approx(len(rest.pack(data)), rel=0.01)


def test_damaged_streams_are_refused() -> None:
    code, _ = rate.encode(scaled(600, 640), 30.0)
    streams, stored = planes.pack(code, path=0)
    shape = tuple(code.i.shape)
    assert len(streams) > 6
    levels = np.zeros(1 + shape[0] + 2 * shape[1], dtype=np.uint8)
    levels[0] = 12
    wrong = [
        (streams[:-1], "streams stored"),
        ((*streams, b""), "streams stored"),
        ((b"", *streams[1:]), "streams stored"),
    ]
    wrong += [(streams[:2], "at least 3"), ((b"\x00x", *streams[1:]), "stored raw"), ((*streams[:-1], b"x"), None)]
    for place, value in ((0, 7), (0, 25), (5, 64)):
        bad = levels.copy()
        bad[place] = value
        wrong.append(((rest.pack(bad), *streams[1:]), "least group|above 63"))
    for bad, message in wrong:
        with pytest.raises(FormatError, match=message):
            planes.unpack(bad, shape, stored, path=0)


def test_an_escape_that_its_symbols_could_tell_is_refused() -> None:
    code = quantise_path(torch.tensor([[300.0, 1.0, 2.0, 3.0]]), 1.0)
    streams, stored = planes.pack(code, path=1)
    assert stored == 1
    for near in (128, 200):
        escape = Escapes(pair=torch.tensor([0]), i=torch.tensor([near], dtype=torch.int32), j=code.escapes.j)
        packed = rest.pack_escapes(escape)
        assert len(rest.unpack_escapes(packed, 1, 2, reach=1)) == 1
        with pytest.raises(FormatError, match="outlying"):
            planes.unpack((*streams[:-1], packed), (1, 2), 1, path=1)


def test_path_and_single_nodes_meet_one_target_with_fewer_bits_for_the_path() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for path in (0, 1, 2):
        code, found = rate.encode(weight, 30.0, path=path)
        assert 30.0 <= found.sqnr_db <= 30.3
        sizes[path] = 8 * sum(map(len, planes.pack(code, path=path)[0])) / weight.numel()
    assert all(0.1 < sizes[0] - sizes[path] < 0.25 for path in (1, 2))
    assert trellis.steps(512 * 256) == 64


@given(
    st.integers(1, 80), st.integers(1, 90), st.integers(0, 2**31), st.sampled_from([0.01, 0.05, 1.0]), st.integers(1, 2)
)
@settings(max_examples=60, deadline=None)
def test_native_paths_are_those_of_the_reference(rows: int, columns: int, seed: int, step: float, path: int) -> None:
    code = quantise_path(scaled(rows, columns, seed), step, path)
    streams, stored = planes.pack(code, path=path)
    shape = code.i.shape[0], code.i.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "native", lambda: None)
        without = planes.unpack(streams, shape, stored, path=path)
    for i, j, escapes in (without, planes.unpack(streams, shape, stored, path=path)):
        assert LatticeTensor(i=i, j=j, escapes=escapes, step=code.step, columns=code.columns).equals(code)


SHAPES = [(13, 40), (300, 128), (1, 2), (64, 65)]


@pytest.mark.parametrize("least", [8, 12])
def test_groupings_of_several_planes_are_those_of_each(least: int) -> None:
    draw = np.random.default_rng(least)
    absolute = np.concatenate([draw.integers(2, 70, sum(shape)) for shape in SHAPES]).astype(np.uint8)
    rules = [contexts.rule_2(least), contexts.RULE_1, contexts.rule_2(20 - least), contexts.rule_2(least)]
    both = contexts.groupings(SHAPES, absolute, rules), contexts.reference_groupings(SHAPES, absolute, rules)
    for found, wanted in zip(*both, strict=True):
        assert np.array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    assert all(len(part) == 0 for part in contexts.groupings([], absolute[:0], []))
    assert all(len(part) == 0 for part in contexts.reference_groupings([], absolute[:0], []))


def test_rows_of_one_level_can_be_left_out() -> None:
    draw = np.random.default_rng(3)
    parts = [draw.integers(2, 70, size).astype(np.uint8) for shape in SHAPES for size in shape]
    parts[0], parts[4] = np.full(13, 5, np.uint8), np.full(1, 69, np.uint8)
    rules = [contexts.rule_2(8)] * len(SHAPES)
    whole = contexts.groupings(SHAPES, np.concatenate(parts), rules)
    del parts[4], parts[0]
    even = [True, False, True, False]
    begins = np.cumsum([0, *(sum(shape) for shape in SHAPES)])
    rows = [number for part, (own, _) in enumerate(SHAPES) if even[part] for number in begins[part] + np.arange(own)]
    assert whole.entries[rows].tolist() == [64 * row for row in (*range(13), 0)]
    for grouped in (contexts.groupings, contexts.reference_groupings):
        found = grouped(SHAPES, np.concatenate(parts), rules, even)
        assert np.array_equal(found.entries, np.delete(whole.entries, rows))
        assert np.array_equal(found.levels, np.delete(whole.levels, rows))
        for mine, wanted in zip(found[2:], whole[2:], strict=True):
            assert np.array_equal(mine, wanted)


def test_places_do_not_depend_on_the_smallest_level() -> None:
    """What a container stores may have another than 0, which `groupings` subtracts and `addresses` does not."""
    draw, rule = np.random.default_rng(0), contexts.rule_2(8)
    rows, columns = (draw.integers(3, 20, size).astype(np.uint8) for size in (50, 70))
    found = contexts.groupings([(50, 70)], np.concatenate((rows, columns)), [rule])
    base, width = np.split(found.tables[0], [contexts.LEVELS**2])
    row, column = np.split(found.entries, [50])
    where = contexts.addresses(rows, columns, rule)
    wanted = where.base[where.row[:, None] & 63, where.column & 63]
    wanted = wanted + (where.row >> 6)[:, None] * where.width[where.column & 63] + (where.column >> 6)
    place = base.reshape(64, 64)[row[:, None] & 63, column & 63]
    assert np.array_equal(place + (row >> 6)[:, None] * width[column & 63] + (column >> 6), wanted)
    assert found.sizes[0, : found.groups[0]].tolist() == where.sizes.tolist()


def test_bounds_of_levels_tell_the_levels_of_mean_squares() -> None:
    draw = np.random.default_rng(0)
    mean_square = np.concatenate(([0.0, 16384.0], contexts.level_bounds(), 16384 * draw.random(4000) ** 9))
    found = np.searchsorted(contexts.level_bounds(), mean_square, side="right")
    assert np.array_equal(found - found.min(), contexts.levels(mean_square))
