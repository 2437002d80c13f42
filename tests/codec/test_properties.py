"""What holds for every tensor: any shape, element type and distribution, through bytes and back."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.container import parse, serialise
from birkhoff.codec.dtypes import SAFETENSORS_TO_TORCH
from birkhoff.codec.errors import FormatError
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor, lattice_of
from birkhoff.codec.trajectory import coordinates_from_theta
from tests.codec.by_profile import encode_tensor

DISTRIBUTIONS = ("normal", "heavy", "sparse", "few values", "constant", "rows", "outlier", "zeros")
PROFILES_OF_OURS = [profile for profile in PROFILES.values() if profile.target_db]


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(SAFETENSORS_TO_TORCH.values())) -> torch.Tensor:
    """Up to 20 000 elements in up to four dimensions."""
    shape = draw(st.lists(st.integers(0, 70), max_size=4).filter(lambda sizes: math.prod(sizes) <= 20_000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(DISTRIBUTIONS))
    if kind == "heavy":
        weight = weight.sign() * weight.abs() ** 4
    elif kind == "sparse":
        weight = weight * (torch.rand(shape, generator=generator) < 0.05)
    elif kind == "few values":
        weight = weight.round()
    elif kind in ("constant", "zeros"):
        weight = torch.full(shape, 0.3 if kind == "constant" else 0.0)
    elif kind == "rows" and weight.dim() > 1:
        weight = weight * torch.randn(shape[0], generator=generator).mul(2).exp().view(-1, *[1] * (len(shape) - 1))
    elif kind == "outlier" and weight.numel():
        weight.view(-1)[0] = 300.0
    dtype = draw(st.sampled_from(dtypes))
    if dtype == torch.bool:
        return weight > 0
    scale = 0.05 if dtype.is_floating_point else 10.0
    return (weight * scale).abs().to(dtype) if not dtype.is_signed else (weight * scale).to(dtype)


@given(tensors(), st.sampled_from(PROFILES_OF_OURS))
@settings(max_examples=120, deadline=None)
def test_comes_back_in_its_type_and_shape_exactly_or_at_its_target(source: torch.Tensor, profile) -> None:  # type: ignore[no-untyped-def]
    encoded = encode_tensor("t", source, profile)
    (coded,) = parse(serialise([encoded.tensor]))
    decoded = decode_tensor(coded)
    assert (decoded.dtype, decoded.shape) == (source.dtype, source.shape)
    if encoded.fidelity is None:
        assert torch.equal(decoded.reshape(-1).view(torch.uint8), source.reshape(-1).view(torch.uint8))
        return
    assert fidelity(source, decoded).sqnr_db >= profile.target_db
    # Both forms are one code: the step numbers in memory are those that the stored streams hold.
    code = lattice_of(coded)
    i, j = coordinates_from_theta(code.theta())
    assert torch.equal(replace(code, i=i, j=j).decode(source.dtype).view(source.shape), decoded)


@given(tensors(), st.sampled_from([p.name for p in PROFILES.values()]), st.data())
@settings(max_examples=60, deadline=None)
def test_decoding_reads_its_own_bytes_only(source: torch.Tensor, name: str, data: st.DataObject) -> None:
    blob = serialise([encode_tensor("t", source, PROFILES[name]).tensor])
    results = []
    for around in (b"\x00", b"\xff"):
        buffer = memoryview(around * 64 + blob + around * 64)
        (coded,) = parse(buffer[64 : 64 + len(blob)])
        results.append(decode_tensor(coded).reshape(-1).view(torch.uint8))
    assert torch.equal(*results)
    # A stream that lacks a byte, or has one more, is refused: nothing beyond it is taken in its place.
    number = data.draw(st.integers(0, len(coded.parts) - 1))
    part = bytes(coded.parts[number])
    for wrong in (part[:-1], part + b"\x00"):
        if wrong == part:
            continue
        parts = (*coded.parts[:number], wrong, *coded.parts[number + 1 :])
        with pytest.raises(FormatError):
            decode_tensor(replace(coded, parts=parts))
