from dataclasses import replace

import pytest
import torch

from birkhoff.codec.container import serialise
from birkhoff.codec.metrics import compare
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor, encode_tensor
from birkhoff.pipeline.artifact import FLOOR_DB
from birkhoff.pipeline.errors import ValidationError
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
