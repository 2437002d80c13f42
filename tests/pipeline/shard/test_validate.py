import math
from dataclasses import replace

import pytest
import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.errors import TensorError
from birkhoff.codec.metrics import compare
from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.packing import pack
from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.codec.tensor import decode_tensor
from birkhoff.pipeline.errors import IntegrityError, ValidationError
from birkhoff.pipeline.registry.documents import FLOOR_DB, blob_key, sha256
from birkhoff.pipeline.shard.hessians import Hessians
from birkhoff.pipeline.shard.run import encode_shard
from birkhoff.pipeline.shard.validate import validate_shard
from birkhoff.pipeline.store.memory import MemoryStore
from tests.codec.by_profile import decisions, encode_tensor

BALANCED = PROFILES["balanced"]
CPU = torch.device("cpu")
W = decisions({"w": torch.empty(64, 64)}, BALANCED)


def test_the_target_is_checked_against_the_bulk_not_against_one_outlier() -> None:
    source = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    source[5, 5] = 1e4
    good = encode_tensor("w", source, BALANCED).tensor
    checks = validate_shard(serialise([good]), {"w": source}, W, CPU)
    assert 30.0 <= checks.sqnr_db[0] <= 30.3
    coarse = encode_tensor("w", source, replace(BALANCED, target_db=10.0)).tensor
    assert compare(source, decode_tensor(coarse)).sqnr_db > 50  # beside the outlier its error is nothing
    with pytest.raises(ValidationError, match=r"'w' came back at 10\.\d\d dB, its target is 30 dB"):
        validate_shard(serialise([coarse]), {"w": source}, W, CPU)


def test_what_the_published_codec_makes_of_zeros_passes_as_what_it_is() -> None:
    paper = PROFILES["paper"]
    source = torch.zeros(64)
    coded, decided = encode_tensor("bias", source, paper).tensor, decisions({"bias": source}, paper)
    assert coded.claims.sqnr_db == -math.inf  # its nodes miss zero
    checks = validate_shard(serialise([coded]), {"bias": source}, decided, CPU)
    assert checks.sqnr_db == (FLOOR_DB,)
    forged = replace(coded, claims=replace(coded.claims, sqnr_db=30.0))
    with pytest.raises(ValidationError, match=r"'bias' claims 30\.0 dB but came back at -inf dB"):
        validate_shard(serialise([forged]), {"bias": source}, decided, CPU)


@pytest.mark.parametrize("claim", [None, math.nan, math.inf])
def test_a_claim_that_is_no_number_is_refused(claim: float | None) -> None:
    source = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    coded = encode_tensor("w", source, BALANCED).tensor
    forged = replace(coded, claims=replace(coded.claims, sqnr_db=claim))
    with pytest.raises(ValidationError, match=f"'w' claims {claim} as sqnr_db, expected a number in dB"):
        validate_shard(serialise([forged]), {"w": source}, W, CPU)


def test_only_tensors_that_are_coded_go_to_the_device() -> None:
    tensors = {"norm": torch.randn(300), "small": torch.randn(8, 8), "steps": torch.arange(5000).view(50, 100)}
    # What went to this device could not come back: it holds no data.
    decided = decisions(tensors, BALANCED)
    assert encode_shard(tensors, decided, torch.device("meta")) == encode_shard(tensors, decided, CPU)


def layer() -> tuple[dict[str, torch.Tensor], Hessian]:
    """A matrix, and the Hessian of inputs and gradients of few directions."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=g) @ torch.randn(8, 96, generator=g) + 0.1 * torch.randn(400, 96, generator=g)
    y = torch.randn(400, 6, generator=g) @ torch.randn(6, 64, generator=g) + 0.1 * torch.randn(400, 64, generator=g)
    return {"w": torch.randn(64, 96, generator=g)}, Hessian(columns=x.T @ x, rows=y.T @ y)


NOMINAL = {"w": Decision(codec="lattice", target_db=14.0, nominal=True, hessian="a" * 64)}


def test_a_nominal_target_holds_the_step_and_the_outputs_error_not_the_weights() -> None:
    sources, hessian = layer()
    blob = encode_shard(sources, NOMINAL, CPU, lambda _: hessian)
    checks = validate_shard(blob, sources, NOMINAL, CPU, lambda _: hessian)
    assert checks.sqnr_db[0] < 13.5  # feedback pays with the weights
    other = {"w": replace(NOMINAL["w"], target_db=14.2)}
    with pytest.raises(ValidationError, match=r"'w' is stored with the step .*, 14\.2 dB mean "):
        validate_shard(blob, sources, other, CPU, lambda _: hessian)
    # Held against another model's Hessian the same bytes are worse than rounding.
    with pytest.raises(ValidationError, match="'w' came back with a greater output error than plain rounding"):
        validate_shard(blob, sources, NOMINAL, CPU, lambda _: Hessian(columns=torch.eye(96)))


def test_what_promises_nothing_still_holds_no_nan_and_is_no_other_codec() -> None:
    sources, _ = layer()
    sources["w"][3, 3] = math.nan
    with pytest.raises(TensorError, match="'w' holds NaN or Inf"):
        encode_shard(sources, NOMINAL, CPU)
    plain, _ = layer()
    raw = {"w": Decision(codec="planes")}
    with pytest.raises(ValidationError, match="'w' should be coded, it is stored as"):
        validate_shard(encode_shard(plain, raw, CPU), plain, NOMINAL, CPU)


def test_hessians_come_from_the_store_whole_or_are_named() -> None:
    store = MemoryStore()
    sources, hessian = layer()
    packed = pack(hessian)
    decided = {"w": replace(NOMINAL["w"], hessian=sha256(packed)), "v": replace(NOMINAL["w"], hessian=None)}
    sources["v"] = sources["w"]
    with pytest.raises(IntegrityError, match=r"the Hessian of 'w', was deleted .*; run again: the model's"):
        Hessians(store, sources, decided, CPU).of("w")
    store.create(blob_key(sha256(packed)), packed)
    hessians = Hessians(store, sources, decided, CPU)
    found = hessians.of("w")
    assert found is not None
    assert found.rows is not None
    assert hessian.rows is not None
    for back, given in ((found.columns, hessian.columns), (found.rows, hessian.rows)):
        torch.testing.assert_close(back, given / given.diagonal().mean(), rtol=1e-2, atol=1e-2)
    assert hessians.of("v") is None
    alone = pack(Hessian(columns=hessian.columns))
    store.create(blob_key(sha256(alone)), alone)
    without = Hessians(store, sources, {name: replace(NOMINAL["w"], hessian=sha256(alone)) for name in sources}, CPU)
    assert (read := without.of("w")) is not None
    assert read.rows is None
    store.put(blob_key(sha256(packed)), packed[:-1] + b"!")
    with pytest.raises(IntegrityError, match="the Hessian of 'w', is damaged; run again"):
        Hessians(store, sources, decided, CPU).of("w")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_finds_what_the_cpu_finds(dtype: torch.dtype) -> None:
    source = torch.randn(200, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    source[3, 3] = 50.0  # an escape
    sources = {"w": source, "norm": torch.randn(300)}
    decided = decisions(sources, BALANCED)
    blob = encode_shard(sources, decided, CPU)
    here, there = (validate_shard(blob, sources, decided, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert there.sqnr_db == pytest.approx(here.sqnr_db, abs=0.011)
    assert there.probe_db == pytest.approx(here.probe_db, abs=0.05)
    coarse = encode_shard(sources, decisions(sources, replace(BALANCED, target_db=20.0)), CPU)
    with pytest.raises(ValidationError, match="its target is 30 dB"):
        validate_shard(coarse, sources, decided, torch.device("cuda"))
