"""Plans of blocks: native and in numpy the same, and nothing planned that does not lie in its stream."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import rest
from birkhoff.codec.container import Consecutive
from birkhoff.codec.entropy import rans
from birkhoff.codec.errors import FormatError


def drawn(size: int, seed: int = 0, sigma: float = 3.0) -> np.ndarray:
    data = np.random.default_rng(seed).standard_normal(size) * sigma
    return np.clip(np.rint(data), -128, 127).astype(np.int8).view(np.uint8) ^ np.uint8(128)


@cache
def packed(size: int) -> bytes:
    return rest.pack(drawn(size))


def planned(streams: list[bytes], sizes: list[int], *, reference: bool) -> rest.Plan | str:
    places = np.cumsum([7, *map(len, streams[:-1])]).tolist(), np.cumsum([5, *sizes[:-1]]).tolist()
    try:
        return (rest.reference_plan if reference else rest.plan)(streams, sizes, *places)
    except FormatError as error:
        return str(error)


def test_a_plan_leads_to_every_block() -> None:
    sizes = [100, rans.BLOCK + 1, 40, 2 * rans.BLOCK]
    noise = np.random.default_rng(0).integers(0, 256, (2, 2 * rans.BLOCK)).astype(np.uint8)
    data = [drawn(sizes[0]), drawn(sizes[1], 1, 2.0), noise[0, : sizes[2]], noise[1]]
    streams = list(map(rest.pack, data))
    assert [stream[0] for stream in streams] == [rest.ANS, rest.ANS, rest.RAW, rest.RAW]
    found, expected = (planned(streams, sizes, reference=reference) for reference in (False, True))
    assert isinstance(found, rest.Plan)
    assert isinstance(expected, rest.Plan)
    assert np.array_equal(found.frequency, expected.frequency)
    assert np.array_equal(found.rows, expected.rows)
    assert found.rows[:, 4].tolist() == [0, 1, 1, 2, 3, 3]
    memory = b"\0" * 7 + b"".join(streams)
    symbols = np.concatenate([np.zeros(5, np.uint8), *data])
    for source, words, target, count, stream, lanes, _ in found.rows.tolist():
        if lanes:
            block = memory[source : source + 4 * lanes + 2 * words]
            decoded = rans.decode(block, count, found.frequency[stream], lanes)
        else:
            assert words == count
            decoded = np.frombuffer(memory[source : source + count], np.uint8)
        assert np.array_equal(decoded, symbols[target : target + count])
    assert found.rows[:, 3].sum() == sum(sizes)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_planned_alike_and_never_beyond_the_stream(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([50, 3000, rans.BLOCK + 9]))
    stream = bytearray(packed(size))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, min(len(stream) - 1, 200)))] ^= data.draw(st.integers(1, 255))
    del stream[len(stream) - data.draw(st.sampled_from([0, 0, 1, 2, 40])) :]
    told = size + data.draw(st.sampled_from([0, 0, 0, 1, -1, rans.BLOCK]))
    found, expected = (planned([bytes(stream)], [told], reference=reference) for reference in (False, True))
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
        with pytest.raises(FormatError):
            rest.unpack(bytes(stream), told)
        return
    assert np.array_equal(found.frequency, expected.frequency)
    assert np.array_equal(found.rows, expected.rows)
    source, words, lanes = found.rows[:, 0] - 7, found.rows[:, 1], found.rows[:, 5]
    assert (source >= 1).all()
    assert (source + np.where(lanes > 0, 4 * lanes + 2 * words, words) <= len(stream)).all()
    assert found.rows[:, 3].sum() == told


def test_a_plan_takes_no_frame_of_zstd() -> None:
    stream = rest.pack(np.tile(drawn(64), 100))
    assert stream[0] == rest.ZSTD
    for plan in (rest.plan, rest.reference_plan):
        with pytest.raises(FormatError, match="corrupt"):
            plan([stream], [6400], [0], [0])
    assert rest.inflated(stream, 6400) == bytes([rest.RAW]) + np.tile(drawn(64), 100).tobytes()
    assert rest.inflated(b"\x00a", 1) == b"\x00a"
    with pytest.raises(FormatError, match="declares 6400 bytes"):
        rest.inflated(stream, 6401)


def test_streams_that_follow_each_other_are_planned_as_others_are() -> None:
    sizes = [100, 3000, 40]
    streams = [rest.pack(drawn(size, k)) for k, size in enumerate(sizes)]
    together = Consecutive.cut(memoryview(b"".join(streams)), map(len, streams))
    assert list(map(bytes, together)) == streams
    found, expected = (rest.plan(given, sizes, [0, 1, 2], [0, 1, 2]) for given in (together, streams))
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.frequency, expected.frequency)


def read_together(streams: Sequence[bytes], sizes: list[int]) -> bytes | str:
    out = np.empty(sum(sizes), dtype=np.uint8)
    try:
        rest.unpack_all(streams, sizes, out)
    except FormatError as error:
        return str(error)
    return out.tobytes()


def test_streams_are_read_together_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [100, 3000, 40, 6400, rans.BLOCK + 5]
    data = [drawn(100), drawn(3000, 1), np.arange(40).astype(np.uint8), np.tile(drawn(64), 100), drawn(sizes[4], 2)]
    streams = list(map(rest.pack, data))
    assert {stream[0] for stream in streams} == {rest.RAW, rest.ZSTD, rest.ANS}
    wanted = np.concatenate(data).tobytes()
    assert read_together(streams, sizes) == wanted
    whole = memoryview(b"".join([b"12345", *streams, b"1"]))
    together = Consecutive.cut(whole, [5, *map(len, streams), 1])
    assert list(map(bytes, together.inner())) == streams
    assert read_together(together.inner(), sizes) == wanted
    monkeypatch.setattr(rest, "native", lambda: None)
    assert read_together(streams, sizes) == wanted


@given(st.integers(0, 3), st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_stream_among_others_is_refused_in_its_own_words(place: int, data: st.DataObject) -> None:
    sizes = [100, 3000, 40, 6400]
    whole = [drawn(100), drawn(3000, 1), np.arange(40).astype(np.uint8), np.tile(drawn(64), 100)]
    streams = list(map(rest.pack, whole))
    bad = bytearray(streams[place])
    bad[data.draw(st.integers(0, min(len(bad) - 1, 60)))] ^= data.draw(st.integers(1, 255))
    streams[place] = bytes(bad[: len(bad) - data.draw(st.sampled_from([0, 1, len(bad)]))])
    try:
        wanted: bytes | str = np.concatenate(list(map(rest.unpack, streams, sizes))).tobytes()
    except FormatError as error:
        wanted = str(error)
    assert read_together(streams, sizes) == wanted
