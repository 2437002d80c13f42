"""Escapes of many tensors: the native library finds what the references in numpy find, and refuses the same."""

from itertools import accumulate, chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from birkhoff.codec import lattice, rest
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.native.library import native
from birkhoff.codec.pairs import pairs_per_row
from birkhoff.codec.trajectory import Escapes
from birkhoff.kernels.entropy import op

pytestmark = pytest.mark.skipif(native() is None, reason="no native library here")

WIDE = st.integers(-(1 << 20), 1 << 20).map(lambda value: value + 128 if value >= 0 else value - 129)
"""Coordinates outside -128..127."""


@st.composite
def escapes(draw: st.DrawFn, pairs: int, reach: int) -> Escapes:
    places = sorted(draw(st.sets(st.integers(0, pairs - 1), max_size=20)))
    outside = st.tuples(WIDE, st.integers(-128, 127)).map(lambda both: (both[0] * reach, both[1]))
    both = [pair[:: draw(st.sampled_from([1, -1]))] for pair in (draw(outside) for _ in places)]
    i, j = (torch.tensor([pair[k] for pair in both], dtype=torch.int32) for k in range(2))
    return Escapes(pair=torch.tensor(places, dtype=torch.int64), i=i, j=j)


@given(st.data())
def test_unpacking_many_is_unpacking_each(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 500), st.sampled_from([1, 2])), max_size=5))
    held = [data.draw(escapes(pairs, reach)) for pairs, reach in shapes]
    streams, counts = [rest.pack_escapes(one) for one in held], list(map(len, held))
    found = rest.unpack_escapes_all(streams, counts, [pairs for pairs, _ in shapes], [reach for _, reach in shapes])
    assert found.tensor.tolist() == [number for number, count in enumerate(counts) for _ in range(count)]
    for part in ("pair", "i", "j"):
        assert getattr(found, part).tolist() == [value for one in held for value in getattr(one, part).tolist()]


@pytest.mark.parametrize(
    ("pair", "i"),
    [([5, 5], [300, 300]), ([7, 3], [300, 300]), ([-1, 3], [300, 300]), ([3, 10], [300, 300]), ([3, 7], [300, 127])],
)
def test_escapes_that_make_no_sense_are_refused_alike(
    pair: list[int], i: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Escapes(pair=torch.tensor(pair), i=torch.tensor(i, dtype=torch.int32), j=torch.zeros(2, dtype=torch.int32))
    good = Escapes(pair=torch.tensor([2]), i=torch.tensor([999]), j=torch.tensor([0]))
    said = []
    for _ in range(2):
        with pytest.raises(FormatError) as refused:
            rest.unpack_escapes_all([rest.pack_escapes(good), rest.pack_escapes(bad)], [1, 2], [10, 10], [1, 1])
        said.append(str(refused.value))
        monkeypatch.setattr(rest, "native", lambda: None)
    assert said[0] == said[1]
    assert "escapes are not 2 increasing indices below 10" in said[0]


@given(st.data(), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 200)), min_size=1, max_size=3))
def test_weights_of_escapes_are_in_order_and_those_of_decoded_matrices(
    data: st.DataObject, shapes: list[tuple[int, int]]
) -> None:
    codes = []
    for rows, columns in shapes:
        pairs = pairs_per_row(columns)
        i, j = torch.zeros(2, rows, pairs, dtype=torch.int8)
        held = data.draw(escapes(rows * pairs, 1))
        codes.append(LatticeTensor(i=i, j=j, escapes=held, step=0.37 * rows, columns=columns))
    together = lattice.escaped_weights_all(codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice, "native", lambda: None)
        in_numpy = lattice.escaped_weights_all(codes)
    assert all(map(torch.equal, chain(*together), chain(*in_numpy)))
    for code, (index, value) in zip(codes, together, strict=True):
        for wanted in (code.escaped_weights(), code._escaped_in_numpy()):
            assert torch.equal(index, wanted[0])
            assert torch.equal(value, wanted[1])
        assert index.tolist() == sorted(set(index.tolist()))
        assert torch.equal(code.decode().view(-1)[index], value)


@given(st.data())
def test_merging_what_is_stored_with_what_is_outside_is_as_in_numpy(data: st.DataObject) -> None:
    strides = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    begins = list(accumulate((2 * stride for stride in strides), initial=0))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    firsts = np.concatenate([np.arange(low, low + stride) for low, stride in zip(begins, strides, strict=False)])
    planes = generator.integers(-128, 128, (len(firsts), 2)).astype(np.int32)
    outside = generator.random(planes.shape) < data.draw(st.sampled_from([0.0, 0.001, 0.1, 1.0]))
    planes[outside] += 1 << 20
    told = np.flatnonzero(generator.random(len(firsts)) < data.draw(st.sampled_from([0.0, 0.01, 1.0])))
    own = generator.integers(1 << 21, 1 << 22, (2, len(told))).astype(np.int32)

    number, half = np.nonzero(outside)
    both = planes[number]
    both[np.arange(len(both)), 1 - half] = np.where(outside[number, 1 - half], 77, both[np.arange(len(both)), 1 - half])
    order = generator.permutation(len(number))
    listed = (2 * firsts[number] + half)[order], both[order]
    inputs = np.array(begins), (firsts[told], own[0], own[1]), listed
    wanted = planes.copy()
    wanted[told] = own.T
    which = np.flatnonzero(outside.any(axis=1) | np.isin(np.arange(len(firsts)), told))
    of = np.repeat(np.arange(len(strides)), strides)
    for merge in (op._native_merge, op._merge):
        pair, i, j, ends = merge(*inputs)
        assert np.array_equal(pair, firsts[which] - np.array(begins)[of[which]])
        assert np.array_equal(np.stack((i, j), axis=1), wanted[which])
        assert ends == np.searchsorted(of[which], np.arange(len(strides)), side="right").tolist()


def test_weights_that_are_known_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    code = lattice.quantise(torch.randn(7, 130, generator=torch.Generator().manual_seed(0)), 1 / 300)
    assert len(code.escapes)
    none = lattice.quantise(torch.zeros(2, 4), 1.0)
    assert op._with_weights([none], Escapes.none(), torch.device("cpu")) == [none]
    same, known = op._with_weights([none, code], code.escapes, torch.device("cpu"))
    assert same == none
    monkeypatch.setattr(lattice, "escaped_weights_all", lambda _: pytest.fail("computed"))
    assert torch.equal(known.decode(), code.decode())
    with pytest.raises(pytest.fail.Exception):
        known.to("cpu").escaped_weights()
    with pytest.raises(pytest.fail.Exception):
        known.rows(0, 7).escaped_weights()
