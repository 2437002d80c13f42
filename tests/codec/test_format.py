"""Stored fixtures of each version, read by ours and by a reader written from FORMAT.md alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from birkhoff.codec import contexts, rest, trellis
from birkhoff.codec.container import FORMAT_VERSION, LatticeParams, parse, serialise
from birkhoff.codec.entropy import tables
from birkhoff.codec.tensor import decode_tensor, lattice_of, recode
from tests.codec import page_reader
from tests.codec.page_reader import read

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = range(1, FORMAT_VERSION + 1)
VECTORS = json.loads((FIXTURES / f"v{FORMAT_VERSION}_vectors.json").read_text())
PAGE = (Path(__file__).parents[2] / "codec" / "FORMAT.md").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_reader_written_from_the_page_alone_reads_the_fixture(version: int) -> None:
    wanted = np.load(FIXTURES / f"v{version}.npz")
    found = read((FIXTURES / f"v{version}.safetensors").read_bytes())
    assert sorted(found) == sorted(wanted.files)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        if name.startswith("paper"):
            # the published code reaches its step an ulp off the formula
            np.testing.assert_allclose(tensor, wanted[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(tensor, wanted[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_our_reader_reads_every_version(version: int) -> None:
    wanted = np.load(FIXTURES / f"v{version}.npz")
    coded = parse((FIXTURES / f"v{version}.safetensors").read_bytes())
    assert {tensor.name for tensor in coded} == set(wanted.files)
    codes = [tensor.params for tensor in coded if isinstance(tensor.params, LatticeParams)]
    assert {tensor.codec for tensor in coded} == {"raw", "planes", "lattice", "paper"}
    assert {code.path for code in codes} == ({0, 1} if version == 1 else {0, 1, 2})
    assert max(len(tensor.parts) for tensor in coded) > 6  # planes of several groups
    assert any(code.escapes for code in codes)
    for tensor in coded:
        np.testing.assert_array_equal(decode_tensor(tensor).numpy(), wanted[tensor.name])


def test_version_1_is_recoded_without_loss_and_into_fewer_bytes() -> None:
    old = (FIXTURES / "v1.safetensors").read_bytes()
    recoded = [recode(coded) for coded in parse(old)]
    blob = serialise(recoded)
    assert len(blob) < 0.95 * len(old)
    for before, after in zip(parse(old), parse(blob), strict=True):
        assert (before.version, after.version) == (1, 2)
        assert (before.name, before.dtype, before.shape, before.claims) == (
            after.name,
            after.dtype,
            after.shape,
            after.claims,
        )
        a, b = (decode_tensor(coded).reshape(-1).view(torch.uint8) for coded in (before, after))
        assert torch.equal(a, b)
        if before.codec == "lattice":
            assert lattice_of(after).equals(lattice_of(before))
    assert [recode(coded) for coded in parse(blob)] == parse(blob)
    assert read(blob).keys() == {coded.name for coded in recoded}


def test_a_version_1_path_that_does_not_go_on_at_its_escapes_is_recoded_as_single_nodes() -> None:
    """The page let a writer of version 1 put any symbol where an escape stands."""
    coded = next(c for c in parse((FIXTURES / "v1.safetensors").read_bytes()) if c.name == "tailed.path")
    code = lattice_of(coded)
    pairs = code.i.shape[1]
    plane = bytearray(rest.decompress(coded.parts[3], code.i.numel()))
    for pair in code.escapes.pair.tolist():
        plane[pair] ^= 1  # the lane's later coordinates change
    odd = _with_part(coded, 3, rest.zstandard.ZstdCompressor().compress(bytes(plane)))
    again = recode(odd)
    assert isinstance(again.params, LatticeParams)
    assert again.params.path == 0
    assert lattice_of(again).equals(lattice_of(odd))
    assert pairs == code.i.shape[1]


def _with_part(coded, number: int, part: bytes):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(coded, parts=(*coded.parts[:number], part, *coded.parts[number + 1 :]))


def test_streams_of_an_old_version_are_not_written_as_the_new_one() -> None:
    with pytest.raises(Exception, match=r"'grouped\.fast' is of format version 1: recode it first"):
        serialise(parse((FIXTURES / "v1.safetensors").read_bytes()))


@pytest.mark.parametrize("vector", VECTORS["tables"])
def test_vectors_of_code_tables(vector: dict) -> None:  # type: ignore[type-arg]
    data = bytes.fromhex(vector["table"])
    frequency, used = tables.parse(data + b"\xff")
    assert used == len(data)
    assert {str(value): int(f) for value, f in enumerate(frequency) if f} == vector["frequency"]
    found, used = page_reader.read_table(data)
    assert used == len(data)
    assert {str(value): f for value, f in found.items() if f} == vector["frequency"]
    fitted = tables.fit(np.array([[vector["counts"].get(str(value), 0) for value in range(256)]]))
    assert fitted.data[0, : fitted.length[0]].tobytes() == data


@pytest.mark.parametrize("vector", VECTORS["streams"])
def test_vectors_of_streams(vector: dict) -> None:  # type: ignore[type-arg]
    stream, holds = bytes.fromhex(vector["stream"]), bytes.fromhex(vector["holds"])
    assert rest.unpack(stream, len(holds)).tobytes() == page_reader.stream(stream, len(holds)) == holds


@pytest.mark.parametrize("vector", VECTORS["groups"])
def test_vectors_of_groups(vector: dict) -> None:  # type: ignore[type-arg]
    rows, columns = (np.array(vector[key], dtype=np.uint8) for key in ("rows", "columns"))
    assert contexts.group_sizes(rows, columns, contexts.rule_2(vector["g"])) == vector["sizes"]
    group = page_reader.groups_of(rows, columns, 2 ** vector["g"], 63)
    found = np.bincount([group[int(a) + int(b)] for a in rows for b in columns])
    assert found.tolist() == vector["sizes"]


@pytest.mark.parametrize("vector", VECTORS["paths"])
def test_vectors_of_paths(vector: dict) -> None:  # type: ignore[type-arg]
    rows, pairs = vector["shape"]
    k = torch.tensor(vector["symbols"])
    assert trellis.numbers(k, trellis.lanes_of(rows, pairs, vector["path"])).tolist() == vector["coordinates"]
    found = page_reader.read_path(k.view(rows, pairs).numpy(), vector["path"])
    assert found.reshape(-1).tolist() == vector["coordinates"]


@pytest.mark.parametrize("vector", VECTORS["containers"])
def test_vectors_of_containers(vector: dict) -> None:  # type: ignore[type-arg]
    blob = bytes.fromhex(vector["bytes"])
    assert {coded.name: decode_tensor(coded).tolist() for coded in parse(blob)} == vector["tensors"]
    assert {name: tensor.tolist() for name, tensor in read(blob).items()} == vector["tensors"]


def test_the_page_shows_the_smallest_container() -> None:
    lines = re.findall(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} +)+)\|", PAGE, re.MULTILINE)
    assert bytes.fromhex("".join(lines)) == serialise([]) == bytes.fromhex(VECTORS["containers"][0]["bytes"])


def test_examples_of_the_page() -> None:
    assert tables.parse(bytes.fromhex("05 01 10 69"))[0][[5, 6]].tolist() == [3277, 819]
    assert rest.unpack(bytes.fromhex("00 01 02 03 04"), 4).tolist() == [1, 2, 3, 4]
    assert "`05 01 10 69`" in PAGE
