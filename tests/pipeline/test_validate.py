from dataclasses import replace

import pytest
import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.metrics import compare
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor, encode_tensor
from birkhoff.pipeline.artifact import FLOOR_DB
from birkhoff.pipeline.errors import ValidationError
from birkhoff.pipeline.shard import encode_shard
from birkhoff.pipeline.validate import validate_shard

BALANCED = PROFILES["balanced"]
CPU = torch.device("cpu")


def test_the_target_is_checked_against_the_bulk_not_against_one_outlier() -> None:
    source = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    source[5, 5] = 1e4
    good = encode_tensor("w", source, BALANCED).tensor
    checks = validate_shard(serialise([good]), {"w": source}, BALANCED, CPU)
    assert 30.0 <= checks.sqnr_db[0] <= 30.3
    coarse = encode_tensor("w", source, replace(BALANCED, target_db=10.0)).tensor
    assert compare(source, decode_tensor(coarse)).sqnr_db > 50  # beside the outlier its error is nothing
    with pytest.raises(ValidationError, match=r"'w' came back at 10\.\d\d dB, its target is 30 dB"):
        validate_shard(serialise([coarse]), {"w": source}, BALANCED, CPU)


def test_what_the_published_codec_makes_of_zeros_passes_as_what_it_is() -> None:
    paper = PROFILES["paper"]
    source = torch.zeros(64)
    coded = encode_tensor("bias", source, paper).tensor
    assert coded.params["sqnr_db"] == "-inf"  # its nodes miss zero
    checks = validate_shard(serialise([coded]), {"bias": source}, paper, CPU)
    assert checks.sqnr_db == (FLOOR_DB,)
    forged = replace(coded, params={**coded.params, "sqnr_db": "30.0"})
    with pytest.raises(ValidationError, match=r"'bias' claims 30\.0 dB but came back at -inf dB"):
        validate_shard(serialise([forged]), {"bias": source}, paper, CPU)


def test_only_tensors_that_are_coded_go_to_the_device() -> None:
    tensors = {"norm": torch.randn(300), "small": torch.randn(8, 8), "steps": torch.arange(5000).view(50, 100)}
    # What went to this device could not come back: it holds no data.
    assert encode_shard(tensors, BALANCED, torch.device("meta")) == encode_shard(tensors, BALANCED, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_finds_what_the_cpu_finds(dtype: torch.dtype) -> None:
    source = torch.randn(200, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    source[3, 3] = 50.0  # an escape
    sources = {"w": source, "norm": torch.randn(300)}
    blob = encode_shard(sources, BALANCED, CPU)
    here, there = (validate_shard(blob, sources, BALANCED, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert there.sqnr_db == pytest.approx(here.sqnr_db, abs=0.011)
    assert there.probe_db == pytest.approx(here.probe_db, abs=0.05)
    coarse = encode_shard(sources, replace(BALANCED, target_db=20.0), CPU)
    with pytest.raises(ValidationError, match="its target is 30 dB"):
        validate_shard(coarse, sources, BALANCED, torch.device("cuda"))
