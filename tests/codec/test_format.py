"""Stored fixtures of each version, read by ours and by a reader written from FORMAT.md alone."""

from pathlib import Path

import numpy as np
import pytest

from tests.codec.page_reader import read

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("version", [1])
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


@pytest.mark.parametrize("version", [1])
def test_our_reader_reads_every_version(version: int) -> None:
    from birkhoff.codec.container import parse
    from birkhoff.codec.tensor import decode_tensor

    wanted = np.load(FIXTURES / f"v{version}.npz")
    coded = parse((FIXTURES / f"v{version}.safetensors").read_bytes())
    assert {tensor.name for tensor in coded} == set(wanted.files)
    assert {(tensor.codec, tensor.params.get("path")) for tensor in coded} >= {
        ("raw", None),
        ("planes", None),
        ("lattice", "0"),
        ("lattice", "1"),
        ("paper", None),
    }
    assert max(len(tensor.parts) for tensor in coded) > 6  # planes of several groups
    assert any(tensor.params.get("escapes", "0") != "0" for tensor in coded)
    for tensor in coded:
        np.testing.assert_array_equal(decode_tensor(tensor).numpy(), wanted[tensor.name])
