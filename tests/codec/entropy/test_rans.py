"""rANS: native with AVX2 and without, reference and the page's reader make and read the same bytes."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.native import library
from tests.codec import page_reader


@pytest.fixture(params=["vectors", "base", "reference"])
def coder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the coders that a machine may use."""
    native = library.native()
    if request.param == "reference":
        monkeypatch.setattr(rans, "native", lambda: None)
    elif native is None:
        pytest.skip(f"the native library is {library.describe()[1]}")
    else:
        native.birkhoff_native_vectors(int(request.param == "vectors"))
    yield request.param
    if native is not None:
        native.birkhoff_native_vectors(1)


def stream(size: int, sigma: float, seed: int = 0) -> tuple[np.ndarray, tables.Table]:
    data = np.random.default_rng(seed).standard_normal(size) * sigma
    symbols = np.clip(np.rint(data), -128, 127).astype(np.int8).view(np.uint8) ^ 128
    symbols[:2] = 1, 2
    table = tables.reference_fit(np.bincount(symbols, minlength=256))
    assert table is not None
    return symbols, table


def encode(symbols: np.ndarray, frequency: np.ndarray, lanes: int) -> bytes:
    """The blocks of one stream."""
    (coded,) = rans.encode(symbols, np.array([symbols.size]), frequency[None], np.array([lanes]))
    return coded


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("size", "sigma"), [(3, 1.0), (2000, 0.4), (2017, 6.0), (5000, 60.0)])
def test_every_coder_makes_and_reads_the_same_bytes(coder: str, lanes: int, size: int, sigma: float) -> None:
    symbols, table = stream(size, sigma)
    coded = encode(symbols, table.frequency, lanes)
    assert coded == rans.reference_encode(symbols, table.frequency, lanes)
    assert np.array_equal(rans.decode(coded, size, table.frequency, lanes), symbols)
    frequency = {value: int(f) for value, f in enumerate(table.frequency)}
    assert page_reader.read_blocks(coded, size, frequency, lanes) == symbols.tobytes()


def test_streams_of_several_blocks(coder: str) -> None:
    for size in (rans.BLOCK, rans.BLOCK + 1, 2 * rans.BLOCK + 77):
        symbols, table = stream(size, 3.0)
        coded = encode(symbols, table.frequency, 32)
        assert coded == rans.reference_encode(symbols, table.frequency, 32)
        assert np.array_equal(rans.decode(coded, size, table.frequency, 32), symbols)
        if size > 2 * rans.BLOCK:
            frequency = {value: int(f) for value, f in enumerate(table.frequency)}
            assert page_reader.read_blocks(coded, size, frequency, 32) == symbols.tobytes()


def test_groups_are_coded_as_each_by_itself(coder: str) -> None:
    sizes, sigmas = [40, 5000, 33_000, 70_000, 300_000, 7], [0.5, 3.0, 9.0, 1.0, 20.0, 2.0]
    streams = [stream(size, sigma, seed) for seed, (size, sigma) in enumerate(zip(sizes, sigmas, strict=True))]
    flat = np.concatenate([symbols for symbols, _ in streams])
    frequencies = np.array([table.frequency for _, table in streams])
    lanes = rans.lanes(np.array(sizes))
    lanes[1] = 0
    coded = rans.encode(flat, np.array(sizes), frequencies, lanes)
    assert coded[1] == b""
    for (symbols, table), n, blocks in zip(streams, lanes.tolist(), coded, strict=True):
        if n:
            assert blocks == rans.reference_encode(symbols, table.frequency, n)


@pytest.mark.parametrize("rare", [1, 2, 3, 1000, 2047, 2048, 2049, 4095])
def test_quotients_by_every_kind_of_frequency_are_exact(coder: str, rare: int) -> None:
    """States come near their limit where a symbol is frequent; the other's frequency is what is left of 4096."""
    symbols = np.random.default_rng(rare).integers(0, 4096, 60_000) < rare
    frequency = np.zeros(256, dtype=np.uint16)
    frequency[:2] = 4096 - rare, rare
    coded = encode(symbols.astype(np.uint8), frequency, 32)
    assert coded == rans.reference_encode(symbols.astype(np.uint8), frequency, 32)


@given(st.integers(0, 2**32), st.sampled_from([1, 4, 8, 32]), st.data())
@settings(max_examples=60, deadline=None)
def test_damage_is_the_same_to_every_coder(seed: int, lanes: int, data: st.DataObject) -> None:
    symbols, table = stream(700, 3.0, seed)
    coded = bytearray(encode(symbols, table.frequency, lanes))
    for _ in range(data.draw(st.integers(1, 3))):
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    size = data.draw(st.sampled_from([700, 699, 701, 33]))
    del coded[len(coded) - data.draw(st.integers(0, 3)) :]
    results = []
    native = library.native()
    for vectors, decode in ((1, rans.decode), (0, rans.decode), (1, rans.reference_decode)):
        if native is not None:
            native.birkhoff_native_vectors(vectors)
        try:
            results.append(decode(bytes(coded), size, table.frequency, lanes).tobytes())
        except tables.DamagedError:
            results.append(None)
    assert results[0] == results[1] == results[2]


def test_worked_example() -> None:
    frequency = np.zeros(256, dtype=np.uint16)
    frequency[[97, 98]] = 2048
    coded = encode(np.frombuffer(b"ab", np.uint8), frequency, 1)
    assert coded == (266240).to_bytes(4, "little")
    assert rans.decode(coded, 2, frequency, 1).tobytes() == b"ab"


def test_a_stream_takes_its_entropy_and_little_more() -> None:
    for size, most in ((5000, 0.03), (40_000, 0.02), (1 << 20, 0.01)):
        symbols, table = stream(size, 3.0)
        sizes = np.array([size])
        coded = encode(symbols, table.frequency, int(rans.lanes(sizes)[0]))
        assert 0 < 8 * len(coded) / size - (table.cost / 65536 - 8 * len(table.data)) / size < most
        assert rans.encoded_bytes(sizes)[0] <= len(coded)
