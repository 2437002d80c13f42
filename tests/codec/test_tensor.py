import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from birkhoff.codec import paper, rate, rest
from birkhoff.codec import tensor as tensor_module
from birkhoff.codec.container import CodedTensor, LatticeParams, parse, serialise
from birkhoff.codec.errors import BirkhoffError, FormatError, TargetError, TensorError, VersionError
from birkhoff.codec.metrics import bulk, fidelity
from birkhoff.codec.native.survey import OUTLIER_RMS
from birkhoff.codec.profiles import FINEST_DB, PROFILES, Decision
from birkhoff.codec.tensor import decode_plain, decode_tensor, encode_tensors, is_matrix, lattice_of
from tests.codec.by_profile import encode_tensor

BALANCED = PROFILES["balanced"]


def normal(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_bytes(*coded: CodedTensor) -> list[CodedTensor]:
    return parse(serialise(list(coded)))


EXACT = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "vector": normal((300,)),
    "tiny": normal((4, 4)),
    "int64 scalar": torch.tensor(7),
    "int32": torch.arange(5000, dtype=torch.int32).view(50, 100),
    "bool": normal((64, 64)) > 0,
    "zeros": torch.zeros(128, 128),
    "constant": torch.full((64, 64), 0.25),
    "uint8": torch.randint(0, 255, (40, 40), dtype=torch.uint8),
    "huge": normal((64, 64)) * 1e30,
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_not_coded_comes_back_bit_for_bit(kind: str) -> None:
    source = EXACT[kind]
    encoded = encode_tensor(kind, source, BALANCED)
    assert encoded.reason
    assert encoded.fidelity is None
    (coded,) = through_bytes(encoded.tensor)
    decoded = decode_tensor(coded)
    assert (decoded.dtype, decoded.shape) == (source.dtype, source.shape)
    assert torch.equal(decoded, source)


@pytest.mark.parametrize("profile", [p for p in PROFILES.values() if p.target_db], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(64, 96), (1, 8, 8, 33), (64, 3, 7, 7), (40, 1, 9, 9), (2, 3, 777)])
def test_coded_tensors_meet_their_target(shape: tuple[int, ...], dtype: torch.dtype, profile) -> None:  # type: ignore[no-untyped-def]
    source = (normal(shape) * 0.03).to(dtype)
    encoded = encode_tensor("w", source, profile)
    (coded,) = through_bytes(encoded.tensor)
    decoded = decode_tensor(coded)
    assert (decoded.dtype, decoded.shape) == (source.dtype, source.shape)
    found = fidelity(source, decoded)
    assert profile.target_db <= found.sqnr_db <= profile.target_db + 0.3
    assert encoded.fidelity == found
    assert coded.claims.sqnr_db == pytest.approx(found.sqnr_db, abs=6e-4)


def test_paper_profile_round_trips_and_keeps_coarse_weights_raw() -> None:
    fine, coarse = normal((64, 96)) * 0.02, normal((64, 96)) * 5
    for source, codec in ((fine, "paper"), (coarse, "raw")):
        (coded,) = through_bytes(encode_tensor("w", source, PROFILES["paper"]).tensor)
        assert coded.codec == codec
        assert fidelity(source, decode_tensor(coded)).sqnr_db > 20


@pytest.mark.parametrize("shape", [(64, 96), (8, 4, 5, 7), (70, 33)])
def test_matching_the_published_codec_takes_its_error_as_the_target(shape: tuple[int, ...]) -> None:
    source = normal(shape) * 0.02
    published = paper.published_error(source, per_row=source.dim() == 2)
    (coded,) = through_bytes(encode_tensor("w", source, PROFILES["match-paper"]).tensor)
    assert published is not None
    assert coded.claims.target_db == pytest.approx(published, abs=1e-3)
    assert published <= fidelity(source, decode_tensor(coded)).sqnr_db <= published + 0.3


@pytest.mark.parametrize(("scale", "target"), [(5.0, rate.TARGET_DB_RANGE[1]), (1e-4, rate.TARGET_DB_RANGE[0])])
def test_matching_codes_finely_what_is_raw_and_never_leaves_the_range(scale: float, target: float) -> None:
    source = normal((64, 96)) * scale
    encoded = encode_tensor("w", source, PROFILES["match-paper"])
    assert encoded.tensor.codec == "lattice"
    found = fidelity(source, decode_tensor(*through_bytes(encoded.tensor))).sqnr_db
    assert target <= found <= target + 0.3


FALLEN = {
    "constant": (torch.full((64, 64), 0.25), "all its weights are equal"),
    "range": (normal((64, 64)) * 1e30, "leave float32's range"),
    "integers": (torch.randint(-3, 9, (64, 64)).float(), "all its weights are whole numbers"),
}


@pytest.mark.parametrize("profile", ["balanced", "fast", "match-paper"])
@pytest.mark.parametrize("reason", FALLEN)
def test_falling_back_to_lossless_is_recorded_with_the_tensor(reason: str, profile: str) -> None:
    source, why = FALLEN[reason]
    encoded = encode_tensor("w", source, PROFILES[profile])
    (coded,) = through_bytes(encoded.tensor)
    assert coded.claims.reason == reason
    assert why in encoded.reason
    assert torch.equal(decode_tensor(coded), source)


LIMITS = {
    "a causal mask": lambda most, w: torch.full(w.shape, -most, dtype=torch.float64).triu(1),
    "up to the greatest": lambda most, w: w / w.abs().max() * most,
    "the greatest of both signs": lambda most, w: torch.where(w > 0, most, -most),
    "a row of the greatest": lambda most, w: torch.cat((w[:-1], torch.full_like(w[-1:], float(most)))),
    "one of the greatest": lambda most, w: torch.cat((w.flatten()[:-1], most[None])).view_as(w),
    "half of the greatest": lambda most, w: w / w.abs().max() * most / 2,
}


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", LIMITS)
def test_weights_at_the_limit_of_their_type_are_stored_and_finite(case: str, dtype: torch.dtype, profile: str) -> None:
    most = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    source = LIMITS[case](most, normal((64, 64)).double()).to(dtype)
    encoded = encode_tensor("w", source, PROFILES[profile])
    decoded = decode_tensor(*through_bytes(encoded.tensor))
    assert decoded.isfinite().all()
    if encoded.tensor.lossless:
        assert torch.equal(decoded, source)
        assert encoded.tensor.claims.reason in ("range", "constant", "integers", "published")
    else:
        assert fidelity(source, decoded).error < math.inf
        assert profile == "paper" or fidelity(source, decoded).sqnr_db > 20


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("part", [1.0, 2.0**-3, 2.0**-9])
def test_weights_of_least_size_and_below_are_stored(part: float, dtype: torch.dtype, profile: str) -> None:
    normal_least = torch.finfo(dtype).smallest_normal
    source = (normal((64, 64)).double() * normal_least * part).to(dtype)
    decoded = decode_tensor(*through_bytes(encode_tensor("w", source, PROFILES[profile]).tensor))
    assert decoded.isfinite().all()
    assert profile == "paper" or fidelity(source.double(), decoded.double()).sqnr_db > 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tables_of_whole_numbers_come_back_exactly(dtype: torch.dtype) -> None:
    """Such as relative positions: an index that is off by one is another index."""
    for table in (
        torch.randint(0, 257, (49, 49)),
        torch.arange(64).repeat(64, 1),
        torch.randint(-2, 3, (64, 64, 3, 3)),
    ):
        source = table.to(dtype)
        assert torch.equal(decode_tensor(*through_bytes(encode_tensor("w", source, BALANCED).tensor)), source)


@pytest.mark.parametrize("factor", [1.0, 2.0**40])
def test_weights_are_no_table_for_being_great_or_nearly_whole(factor: float) -> None:
    source = normal((64, 64)).mul(100).round()
    source.view(-1)[-1] += 0.5 if factor == 1 else 0
    assert encode_tensor("w", source * factor, BALANCED).tensor.codec == "lattice"


def test_a_target_that_no_step_meets_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise TargetError("no step meets 30 dB")

    monkeypatch.setattr(rate, "encode", never)
    source = normal((64, 96))
    (coded,) = through_bytes(encode_tensor("w", source, BALANCED).tensor)
    assert (coded.codec, coded.claims.reason) == ("planes", "target")
    assert torch.equal(decode_tensor(coded), source)


@pytest.mark.parametrize("target_db", [5.9, 63.1, math.inf, math.nan])
def test_a_target_out_of_range_is_an_error_and_no_fallback(target_db: float) -> None:
    with pytest.raises(TargetError, match=r"outside 6\.\.48 dB"):
        encode_tensor("w", torch.full((64, 64), 0.25), replace(BALANCED, target_db=target_db))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("target_db", [48.01, 55.0, FINEST_DB])
def test_above_the_trajectory_weights_are_fixed_point_and_reach_their_target(
    target_db: float, dtype: torch.dtype
) -> None:
    source = (normal((64, 96)) * 0.02).to(dtype)
    source[3, 5] = 2.5  # far beyond 16 bits
    decision = Decision(codec="lattice", target_db=target_db, path=True, states_target=True)
    coded = through_bytes(encode_tensors([("w", source, decision)])[0].tensor)[0]
    assert isinstance(coded.params, LatticeParams)
    assert (coded.params.columns, is_matrix(coded)) == (1, False)
    assert target_db <= fidelity(source, decode_tensor(coded)).sqnr_db <= target_db + 0.3
    assert coded.claims.target_db == target_db
    assert 8 * coded.nbytes / source.numel() < target_db / 6.02 + 1.5


GRIDS = {
    "ternary": torch.randint(-1, 2, (128, 64), generator=torch.Generator().manual_seed(0)) * 0.37,
    "of four bits": torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(0)) * 0.013,
    "near one": 1 + 0.05 * normal((128, 64)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("target_db", [50.0, 55.0, FINEST_DB])
def test_fixed_point_that_restores_every_weight_is_lossless(kind: str, dtype: torch.dtype, target_db: float) -> None:
    source = GRIDS[kind].to(dtype)
    decision = Decision(codec="lattice", target_db=target_db, states_target=True)
    coded = encode_tensors([("w", source, decision)])[0].tensor
    lossless = encode_tensors([("w", source, Decision(codec="planes"))])[0].tensor
    if torch.equal(decode_tensor(coded), source):
        assert (coded.lossless, coded.claims.reason) == (True, "target")
    else:
        assert fidelity(source, decode_tensor(coded)).sqnr_db >= target_db
        assert coded.nbytes < lossless.nbytes
    assert coded.claims.sqnr_db is None or math.isfinite(coded.claims.sqnr_db)


def test_where_no_fixed_point_reaches_the_target_the_weights_stay_lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_TRIES", 0)
    coded = encode_tensors([("w", normal((64, 64)), Decision(codec="lattice", target_db=FINEST_DB))])[0].tensor
    assert (coded.codec, coded.claims.reason) == ("planes", "target")
    assert torch.equal(decode_tensor(coded), normal((64, 64)))


def test_what_is_said_of_a_single_tensor_goes_with_it() -> None:
    source = normal((64, 96))
    finer = encode_tensor("w", source, BALANCED, 36.0)
    assert finer.tensor.claims.target_db == 36.0
    assert 36.0 <= fidelity(source, decode_tensor(*through_bytes(finer.tensor))).sqnr_db <= 36.3
    exact = encode_tensor("w", source, BALANCED, "lossless")
    assert (exact.tensor.codec, exact.reason) == ("planes", "by override")


@given(
    st.integers(0, 2**31),
    st.sampled_from([(40, 40), (64, 64), (128, 65), (64, 3, 5, 5)]),
    st.integers(1, 4),
    st.floats(0.5, 12.0),
    st.sampled_from(["balanced", "fast", "fine"]),
)
@settings(max_examples=40, deadline=None)
def test_targets_hold_for_the_bulk_whatever_few_outliers_carry(
    seed: int, shape: tuple[int, ...], outliers: int, size: float, name: str
) -> None:
    source, target = normal(shape, seed) * 0.02, PROFILES[name].target_db
    assert target is not None
    places = torch.arange(outliers) * (source.numel() // 5)
    source.view(-1)[places] = 0.02 * 10.0 ** (size + torch.arange(outliers) / 4)
    (coded,) = through_bytes(encode_tensor("w", source, PROFILES[name]).tensor)
    decoded = decode_tensor(coded)
    if coded.codec != "lattice":
        assert coded.claims.reason == "target"  # beside weights so great, float32 itself is too coarse
        assert torch.equal(decoded, source)
        return
    assert fidelity(source, decoded).sqnr_db >= target
    # All but the weights above 16 times the root mean square of the bulk hold at least half of its energy.
    rms = math.sqrt(bulk(source, float(source.square().sum())).energy / source.numel())
    inner = source.abs() <= OUTLIER_RMS * rms
    assert int((~inner).sum()) <= outliers
    assert fidelity(source[inner], decoded[inner]).sqnr_db >= target - 3.02


def test_one_huge_weight_no_longer_zeroes_the_others() -> None:
    source = normal((64, 64))
    source[5, 5] = 1e4
    decoded = decode_tensor(*through_bytes(encode_tensor("w", source, BALANCED).tensor))
    others = source != 1e4
    assert fidelity(source[others], decoded[others]).sqnr_db >= 30.0
    assert abs(decoded[5, 5] - 1e4) < 0.1


def test_weights_too_many_steps_out_for_a_path_take_single_nodes() -> None:
    source = normal((64, 64))
    for size, path in ((1e4, True), (1e7, False)):
        source[5, 5] = size
        encoded = encode_tensor("w", source, BALANCED).tensor
        assert isinstance(encoded.params, LatticeParams)
        assert encoded.params.path == path
        assert fidelity(source, decode_tensor(*through_bytes(encoded))).sqnr_db >= 30.0


def test_paths_give_way_to_single_nodes_where_too_many_pairs_would_be_escapes_in_memory() -> None:
    source = normal((128, 256))
    for target_db, path in ((36.0, True), (39.0, True), (42.0, False)):
        encoded = encode_tensor("w", source, replace(BALANCED, target_db=target_db)).tensor
        assert isinstance(encoded.params, LatticeParams)
        assert encoded.params.path == path
        assert fidelity(source, decode_tensor(*through_bytes(encoded))).sqnr_db >= target_db
        # Symbols reach twice as far as coordinates in memory: escapes of a path take no bytes until then.
        assert len(lattice_of(encoded).escapes) > 100 * encoded.params.escapes or target_db == 42.0


def test_both_forms_are_one_code() -> None:
    source = normal((50, 130))
    source[3, 3] = 500.0
    (coded,) = through_bytes(encode_tensor("w", source, BALANCED).tensor)
    code = lattice_of(coded)
    assert code.theta().dtype == torch.uint16
    assert len(code.escapes) > 0
    assert torch.equal(code.decode(), decode_tensor(coded))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(64, 64), (5,)])
def test_nan_and_inf_are_refused_by_name(bad: float, shape: tuple[int, ...]) -> None:
    source = normal(shape)
    source.view(-1)[3] = bad
    with pytest.raises(TensorError, match=r"'block\.weight' holds NaN or Inf"):
        encode_tensor("block.weight", source, BALANCED)


def test_same_tensors_same_bytes_and_any_reader_opens_them() -> None:
    from safetensors.torch import load

    tensors = [encode_tensor(name, source, BALANCED).tensor for name, source in EXACT.items()]
    tensors.append(encode_tensor("coded", normal((80, 80)), BALANCED).tensor)
    blob = serialise(tensors)
    assert blob == serialise(tensors)
    assert [coded.name for coded in parse(blob)] == [*EXACT, "coded"]
    opened = load(blob)
    assert opened.keys() == {"index", "data"}
    assert opened["data"].numel() == sum(coded.nbytes for coded in tensors)


@pytest.fixture(scope="module")
def blob() -> bytes:
    source = normal((40, 50))
    source[1, 1] = 90.0
    tensors = {"a.weight": source, "a.bias": normal((40,)), "n": torch.tensor(3), "p": normal((40, 50)) * 0.02}
    encoded = [encode_tensor(name, t, PROFILES["paper" if name == "p" else "balanced"]) for name, t in tensors.items()]
    return serialise([item.tensor for item in encoded])


def decode_all(blob: bytes) -> list[torch.Tensor]:
    return [decode_tensor(coded) for coded in parse(blob)]


def test_truncation_anywhere_is_the_projects_own_error(blob: bytes) -> None:
    for end in [*range(0, len(blob) - 1, 37), len(blob) - 1]:
        with pytest.raises(FormatError):
            decode_all(blob[:end])


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutation_gives_an_error_or_tensors_never_a_crash(blob: bytes, data: st.DataObject) -> None:
    mutated = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = decode_all(bytes(mutated))
    except BirkhoffError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)


def test_newer_versions_are_refused_with_both_numbers(blob: bytes) -> None:
    newer = blob.replace(b'"__birkhoff__":"2"', b'"__birkhoff__":"7"')
    with pytest.raises(VersionError, match="version 7; this code reads 1 to 3"):
        parse(newer)


def with_index(blob: bytes, old: bytes, new: bytes) -> bytes:
    """A container whose index says something else, all else being right."""
    length = int.from_bytes(blob[:8], "little")
    begin, end = json.loads(blob[8 : 8 + length])["index"]["data_offsets"]
    head, data = 8 + length, blob[8 + length + end :]
    text = zstandard.ZstdDecompressor().decompress(blob[head + begin : head + end])
    assert old in text
    index = zstandard.ZstdCompressor().compress(text.replace(old, new))
    places = {"index": (0, len(index)), "data": (len(index), len(index) + len(data))}
    header = {
        "__metadata__": {"__birkhoff__": "2"},
        **{key: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for key, (a, b) in places.items()},
    }
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + index + data


FORGERIES = {
    "huge header": (lambda b: b"\xff" * 8 + b[8:], "header declares"),
    "no metadata": (lambda b: b.replace(b"__metadata__", b"__metadatb__"), "no metadata"),
    "other codec": (lambda b: with_index(b, b"codec=lattice", b"codec=lettuce"), "unknown codec 'lettuce'"),
    "huge shape": (lambda b: with_index(b, b"shape=40,50 parts", b"shape=99999999,99999999 parts"), "are allowed"),
    "name twice": (lambda b: with_index(b, b'"a.bias":', b'"a.weight":'), "appears twice"),
    "no entry": (lambda b: with_index(b, b'"a.bias":"', b'"a.bios":3,"a.bias":"'), "not an object of strings"),
    "no JSON": (lambda b: with_index(b, b'"a.bias":', b'"a.bias"'), "index is not JSON"),
    "another path": (lambda b: with_index(b, b"path=", b"path=3"), "parameter path is"),
    "too few bytes": (lambda b: with_index(b, b"parts=", b"parts=9,"), "bytes of data, its tensors take"),
    "hole": (lambda b: b + b"\0", "its header declares"),
    "index elsewhere": (lambda b: b.replace(b'"index":', b'"indes":'), r"container holds \['data', 'indes'\]"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_containers_are_refused(blob: bytes, kind: str) -> None:
    forge, message = FORGERIES[kind]
    with pytest.raises(FormatError, match=message):
        decode_all(forge(blob))


def plain_tensors() -> dict[str, torch.Tensor]:
    """Byte planes in one stream and in several, of every width, empty, raw, and one more than are unpacked together."""
    return {
        "float": normal((300,)) + 100,
        "half": (normal((40, 30), 1) + 9).half(),
        "ids": torch.arange(7000).view(70, 100),
        "mask": torch.arange(900).view(30, 30) % 7 == 0,
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "double": (normal((64,), 2) + 9).double(),
        "last": normal((500,), 3) + 100,
    }


def plain_coded() -> list[CodedTensor]:
    lossless = Decision(codec="planes")
    found = [encoded.tensor for encoded in encode_tensors([(k, t, lossless) for k, t in plain_tensors().items()])]
    assert {len(one.parts) for one in found if one.codec == "planes"} >= {1, 2, 4}
    assert "raw" in {one.codec for one in found}
    return through_bytes(*found)


@pytest.mark.parametrize("together", [1, 350, 1 << 22])
def test_plain_tensors_are_decoded_together_as_each_by_itself(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_module, "_TOGETHER", together)
    calls: list[int] = []
    unpack = rest.unpack_elements_all

    def counted(streams: Any, sizes: Any, widths: Any) -> Any:
        calls.append(len(streams))
        return unpack(streams, sizes, widths)

    monkeypatch.setattr(rest, "unpack_elements_all", counted)
    found = decode_plain(plain_coded())
    count = sum(one.codec == "planes" for one in plain_coded())
    assert sum(calls) == count
    assert {1: count < len(calls), 350: 2 <= len(calls) < count}.get(together, calls == [count])
    for one, expected in zip(found, plain_tensors().values(), strict=True):
        assert (one.dtype, one.shape) == (expected.dtype, expected.shape)
        assert torch.equal(one, expected)
        assert one.is_contiguous()
        assert one.untyped_storage().nbytes() == one.nbytes  # memory of its own
    assert decode_plain([]) == []


def test_a_damaged_plain_tensor_is_named() -> None:
    coded = plain_coded()
    one = next(one for one in coded if one.name == "last")
    damaged = replace(one, parts=(bytes(one.parts[0])[:-3], *one.parts[1:]))
    with pytest.raises(FormatError, match="tensor 'last': ") as caught:
        decode_plain([damaged if other is one else other for other in coded])
    with pytest.raises(FormatError) as alone:
        decode_tensor(damaged)
    assert str(caught.value) == str(alone.value)
    for wrong in (one.parts[:2], ()):
        with pytest.raises(FormatError, match="tensor 'last': "):
            decode_plain([*coded, replace(one, parts=wrong)])


@pytest.mark.parametrize("dtype", ["BOOL", "F16", "F32", "F64"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_planes_of_no_elements_are_an_empty_stream(dtype: str, shape: tuple[int, ...]) -> None:
    """We store such a tensor raw; FORMAT.md allows both."""
    coded = CodedTensor(name="none", codec="planes", dtype=dtype, shape=shape, parts=(b"",))
    for (found,) in (decode_plain([coded]), [decode_tensor(coded)]):
        assert (found.shape, found.numel()) == (shape, 0)
    wrong = replace(coded, parts=(b"\0",))
    for decode in (decode_tensor, lambda one: decode_plain([one])):
        with pytest.raises(FormatError, match="tensor 'none': 1 bytes stored, expected an empty stream"):
            decode(wrong)


def test_plain_tensors_of_version_1_are_decoded_beside_others() -> None:
    blob = (Path(__file__).parent / "fixtures" / "v1.safetensors").read_bytes()
    old = [one for one in parse(blob) if one.codec in ("planes", "raw")]
    assert {one.version for one in old if one.codec == "planes"} == {1}
    every = [*old, *plain_coded(), *old]
    for one, found in zip(every, decode_plain(every), strict=True):
        assert torch.equal(found, decode_tensor(one))
