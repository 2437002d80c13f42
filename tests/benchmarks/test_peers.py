"""The peers are what they are said to be: their bytes, and what comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import PROFILES
from tests.benchmarks import measure, nnc, peers
from tests.benchmarks.checkpoints import Checkpoint

SHAPE = (48, 640)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
@settings(max_examples=60, deadline=None)
def test_codes_pack_to_their_bits_and_come_back(bits: int, values: list[int]) -> None:
    codes = torch.tensor([value % (1 << bits) for value in values], dtype=torch.uint8)
    data = peers.pack(codes, bits)
    assert len(data) == -(-len(values) // 8) * bits
    assert torch.equal(peers.unpack(data, bits, len(values)), codes)


# bits a weight, by arithmetic; SQNR of a normal distribution, dB
EXPECTED = {
    "int8, channel": (8 + 32 / 640, 40, 44),
    "int6, 128": (6 + 24 / 128, 31.5, 33),
    "int5, 128": (5 + 24 / 128, 25.3, 27),
    "int4, 128": (4 + 24 / 128, 19, 21),
    "NF4": (4 + 32 / 64, 20.2, 21.2),
    "NF4, double": (4 + 8 / 64 + 2 * 2 * 32 / (48 * 640), 20.2, 21.2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_and_error_of_the_fixed_rate_peers(name: str) -> None:
    peer = next(peer for peer in peers.all_peers() if peer.name == name)
    weight = normal(*SHAPE)
    parts = peer.encode(weight)
    bits, least, most = EXPECTED[name]
    assert 8 * peers.size(parts) / weight.numel() == pytest.approx(bits)
    decoded = peer.decode(parts, SHAPE)
    assert (decoded.shape, decoded.dtype) == (weight.shape, torch.float32)
    assert least < fidelity(weight, decoded).sqnr_db < most


@pytest.mark.parametrize("peer", peers.all_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (1, 1000), (33, 130)])
def test_ragged_shapes_come_back_in_shape(peer: peers.Peer, shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    decoded = peer.decode(peer.encode(weight), shape)
    assert decoded.shape == weight.shape
    assert fidelity(weight, decoded).sqnr_db > 15


def test_a_group_of_int4_by_hand() -> None:
    peer = peers.per_group(4, group=4)
    # low -1, high 2: the step is 0.2, zero lies at 5
    data, scale, zero = peer.encode(torch.tensor([[-1.0, 0.0, 0.31, 2.0]]))
    assert isinstance(data, bytes)
    assert peers.unpack(data, 4, 4).tolist() == [0, 5, 7, 15]
    assert float(scale) == pytest.approx(0.2, rel=1e-3)
    assert int(zero) == 5


def test_nf4_levels_are_kept_exactly() -> None:
    peer = peers.nf4(double=False)
    weight = torch.tensor(peers.NF4).repeat(4)[None] * 0.125
    assert torch.equal(peer.decode(peer.encode(weight), (1, 64)), weight)


def test_zstd_on_float32_is_lossless() -> None:
    peer = peers.zstd(torch.float32)
    assert torch.equal(peer.decode(peer.encode(normal(*SHAPE)), SHAPE), normal(*SHAPE))


def test_rows_count_every_byte_and_refuse_what_comes_back_wrong() -> None:
    tensors = {"w": normal(64, 128), "b": normal(64), "n": torch.tensor(3)}
    model = Checkpoint(name="toy", tensors=tensors, file_bytes=4 * (64 * 128 + 64) + 8)
    assert model.lossy() == ["w"]
    row = measure.theirs(model, peers.per_group(4))
    assert row.bytes == 64 * 128 // 2 + 3 * 64 + 4 * 64 + 8
    assert row.at_equal_error is not None
    assert row.sqnr_db == pytest.approx(row.least_db)
    assert measure.ours(model, PROFILES["balanced"]).sqnr_db >= 30

    class Broken(measure.Theirs):
        def decode(self, coded: object) -> dict[str, torch.Tensor]:
            return {**super().decode(coded), "b": torch.zeros(64)}

    with pytest.raises(measure.WrongResultError, match="b: stored as it is"):
        measure.run(model, "broken", "", Broken(peer=peers.per_group(4), lossy=frozenset(["w"])))


def test_a_sweep_is_linear_between_its_points_and_refuses_to_go_beyond() -> None:
    points = [{"qp": qp, "sqnr_db": db, "bytes": size} for qp, db, size in ((-20, 20.0, 100.0), (-21, 22.0, 140.0))]
    sweep = nnc.Sweep(version="0", tensors={"w": points})
    assert sweep.at("w", 21.0, "bytes") == 120.0
    assert sweep.uniform(-21) == {"w": points[1]}
    assert sweep.uniform(-22) is None
    with pytest.raises(nnc.WorkerFailedError, match="outside the sweep"):
        sweep.at("w", 30.0, "bytes")
