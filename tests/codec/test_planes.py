import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import contexts, planes, rate, trellis
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor, quantise, quantise_path


def scaled(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose rows and columns differ in scale, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rows, 1), (1, columns)))
    return weight * (0.7 * a).exp() * (0.7 * b).exp()


def round_trip(code: LatticeTensor, *, path: bool) -> list[bytes]:
    streams = planes.pack(code, path=path)
    i, j, escapes = planes.unpack(streams, tuple(code.i.shape), len(code.escapes), path=path)
    assert torch.equal(i, code.i)
    assert torch.equal(j, code.j)
    for mine, theirs in zip(
        (escapes.pair, escapes.i, escapes.j), (code.escapes.pair, code.escapes.i, code.escapes.j), strict=True
    ):
        assert torch.equal(mine, theirs)
    return list(streams)


@given(st.integers(1, 60), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([0.02, 0.3, 2.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_both_forms_are_one_code(rows: int, columns: int, seed: int, step: float, path: bool) -> None:
    # the finest step puts many coordinates outside the box, in memory and at rest
    code = (quantise_path if path else quantise)(scaled(rows, columns, seed), step)
    round_trip(code, path=path)


@pytest.mark.parametrize("path", [False, True])
def test_grouping_saves_bits_where_scales_differ_and_costs_none_where_not(path: bool) -> None:
    for weight, pays in ((scaled(600, 640), True), (torch.randn(300, 640), False)):
        code, _ = rate.encode(weight, 30.0, path=path)
        streams = round_trip(code, path=path)
        flat = len(planes.compress(code.i.numpy().tobytes())) + len(planes.compress(code.j.numpy().tobytes()))
        assert (len(streams) > 6) == pays
        if pays and not path:
            assert sum(map(len, streams)) < 0.98 * flat


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.integers(0, 9), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_groups_join_to_the_plane_and_have_the_announced_sizes(rows: list[int], columns: list[int]) -> None:
    r, c = np.array(rows, dtype=np.uint8), np.array(columns, dtype=np.uint8)
    plane = np.random.default_rng(0).integers(-128, 128, (len(r), len(c))).astype(np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "LEAST_GROUP", 5)
        groups = contexts.split(plane, r, c)
        if r.any() or c.any():
            assert [len(group) for group in groups] == contexts.group_sizes(r, c)
        assert np.array_equal(contexts.join(groups, r, c), plane)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 200), st.integers(0, 2**16), st.booleans())
def test_places_on_a_device_are_those_of_the_join(rows: int, columns: int, seed: int, flat: bool) -> None:
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "LEAST_GROUP", 500)
        row, column = (rng.integers(0, 1 if flat else 6, n).astype(np.uint8) for n in (rows, columns))
        plane = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        groups = contexts.split(plane, row, column)
        assert np.array_equal(planes._join_on(torch.device("cpu"), groups, row, column).numpy(), plane.reshape(-1))


def test_worked_example_of_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "LEAST_GROUP", 2)
    plane = np.array([[0, 1, 2], [10, 11, 12]], dtype=np.int8)
    groups = contexts.split(plane, np.array([1, 0], dtype=np.uint8), np.array([0, 2, 0], dtype=np.uint8))
    assert [group.tolist() for group in groups] == [[10, 12], [0, 2], [11, 1]]


def test_damaged_streams_are_refused() -> None:
    code, _ = rate.encode(scaled(600, 640), 30.0)
    streams = planes.pack(code, path=False)
    shape = tuple(code.i.shape)
    assert len(streams) > 6
    for bad in (streams[:-1], (*streams, b""), (b"", *streams[1:]), streams[:3], (*streams[:3], b"x", *streams[4:])):
        with pytest.raises(FormatError):
            planes.unpack(bad, shape, len(code.escapes), path=False)
    wild = planes.compress(np.full(shape, 127, dtype=np.int8).tobytes())
    with pytest.raises(FormatError, match="has no escape"):
        planes.unpack((b"", b"", b"", wild, wild, b""), shape, 0, path=True)


def test_path_and_single_nodes_meet_one_target_with_fewer_bits_for_the_path() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for path in (False, True):
        code, found = rate.encode(weight, 30.0, path=path)
        assert 30.0 <= found.sqnr_db <= 30.3
        sizes[path] = 8 * sum(map(len, planes.pack(code, path=path))) / weight.numel()
    assert 0.1 < sizes[False] - sizes[True] < 0.25
    assert trellis.steps(512 * 256) == 64
