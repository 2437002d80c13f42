"""Code tables: the native ones are those of the reference, and a table's bytes say what it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.entropy import tables
from birkhoff.codec.native import library
from tests.codec.page_reader import read_table

COUNTS = st.dictionaries(st.integers(0, 255), st.integers(1, 1 << 36), min_size=2, max_size=256)


def full(counts: dict[int, int]) -> np.ndarray:
    return np.array([counts.get(value, 0) for value in range(256)], dtype=np.int64)


@given(COUNTS)
@settings(max_examples=150, deadline=None)
def test_the_native_table_is_the_references_and_the_pages(counts: dict[int, int]) -> None:
    fits, found = tables.fit(full(counts)[None]), tables.reference_fit(full(counts))
    assert found is not None
    assert fits.data[0, : fits.length[0]].tobytes() == found.data
    assert fits.cost[0] == found.cost
    assert np.array_equal(fits.frequency[0], found.frequency)
    assert set(np.flatnonzero(found.frequency)) == set(counts)
    assert int(found.frequency.sum()) == tables.SLOTS
    for parse in (tables.parse, tables.reference_parse):
        frequency, used = parse(found.data + b"\xff")
        assert np.array_equal(frequency, found.frequency)
        assert used == len(found.data)
    page, used = read_table(found.data)
    assert used == len(found.data)
    assert [page.get(value, 0) for value in range(256)] == found.frequency.tolist()


@given(st.binary(max_size=400))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_the_same_table_to_both_or_none_to_either(data: bytes) -> None:
    results = []
    for parse in (tables.parse, tables.reference_parse):
        try:
            frequency, used = parse(data)
            results.append((frequency.tolist(), used))
        except tables.DamagedError:
            results.append(None)
    assert results[0] == results[1]
    if results[0] is not None:
        assert sum(results[0][0]) == tables.SLOTS


@pytest.mark.parametrize("counts", [{}, {7: 100}])
def test_fewer_than_two_values_need_no_table(counts: dict[int, int]) -> None:
    assert tables.fit(full(counts)[None]).length[0] == 0
    assert tables.reference_fit(full(counts)) is None


def test_a_table_costs_little_above_the_entropy() -> None:
    random = np.random.default_rng(0)
    for size, sigma, most in ((5000, 2.0, 0.025), (20000, 9.0, 0.03), (1 << 20, 0.6, 0.001), (1 << 20, 8.0, 0.009)):
        data = np.rint(random.standard_normal(size) * sigma).astype(np.int8).view(np.uint8) ^ 128
        counts = tables.histograms(data, np.array([size]))
        used = counts[counts > 0] / size
        (cost,) = tables.fit(counts).cost / 65536
        assert 0 <= cost / size + float(used @ np.log2(used)) < most


def test_logarithms_are_whole_numbers_below_the_true_ones() -> None:
    for value in (1, 2, 3, 1000, 4095, 4096):
        assert 0 <= np.log2(value) * 65536 - tables.log2_fixed(value) < 1


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_histograms_count(streams: list[bytes]) -> None:
    found = tables.histograms(np.frombuffer(b"".join(streams), np.uint8), np.array(list(map(len, streams))))
    assert found.tolist() == [[stream.count(value) for value in range(256)] for stream in streams]


@pytest.mark.parametrize("native", [True, False])
def test_tables_of_many_streams_are_those_of_each(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(tables, "native", lambda: None)
    draw = np.random.default_rng(3)
    counts = draw.integers(0, 40, (150, 256)) * (draw.random((150, 256)) < 0.2)  # enough for several threads
    counts[3], counts[5, :] = 0, np.eye(256, dtype=np.int64)[9]
    found = tables.fit(counts)
    for number, own in enumerate(counts):
        wanted = tables.reference_fit(own)
        assert bool(found.length[number]) == (wanted is not None)
        if wanted is not None:
            assert found.data[number, : found.length[number]].tobytes() == wanted.data
            assert np.array_equal(found.frequency[number], wanted.frequency)
            assert found.cost[number] == wanted.cost


@pytest.mark.parametrize("vectors", [1, 0])
def test_tables_of_groups_are_those_of_each(vectors: int) -> None:
    random = np.random.default_rng(1)
    sizes = [1, 2, 700, 40_000, 3, 5000]
    flat = np.clip(np.rint(random.standard_normal(sum(sizes)) * 9 + 128), 0, 255).astype(np.uint8)
    flat[703 : 703 + 40_000] = random.integers(0, 256, 40_000)
    if (native := library.native()) is not None:
        native.birkhoff_native_vectors(vectors)
    counts = tables.histograms(flat, np.array(sizes))
    found = tables.fit(counts)
    for number, group in enumerate(np.split(flat, np.cumsum(sizes)[:-1])):
        assert np.array_equal(counts[number], np.bincount(group, minlength=256))
        wanted = tables.reference_fit(counts[number])
        assert bool(found.length[number]) == (wanted is not None)
        if wanted is not None:
            assert found.data[number, : found.length[number]].tobytes() == wanted.data
            assert found.cost[number] == wanted.cost
            assert np.array_equal(found.frequency[number], wanted.frequency)
    if native is not None:
        native.birkhoff_native_vectors(1)
