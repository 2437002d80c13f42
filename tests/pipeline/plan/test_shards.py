import itertools
from pathlib import Path

import pytest

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, StoredTensor, contiguous_stride
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.plan.shards import block_of, cut_shards, plan_model


def stored(name: str, shape: tuple[int, ...], dtype: str = "float32") -> StoredTensor:
    return StoredTensor(
        name=name, dtype=dtype, shape=shape, stride=contiguous_stride(shape), offset=0, nbytes=0, path="/none"
    )


def vit(blocks: int, decoder: str = "mask_decoder") -> list[StoredTensor]:
    names = [("pos_embed", (1, 64, 64, 64))]
    for block in range(blocks):
        names += [(f"blocks.{block}.qkv.weight", (192, 64)), (f"blocks.{block}.qkv.bias", (192,))]
    return [stored(f"encoder.{n}", s) for n, s in names] + [stored(f"{decoder}.out.weight", (64, 64))]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.blocks.3.attn.qkv.weight", "encoder.blocks.3"),
        ("decoder.layers.0.norms.1.weight", "decoder.layers.0"),
        ("encoder.pos_embed", "encoder"),
        ("token", ""),
        ("encoder.stack.0", "encoder.stack"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("limit", [1, 60_000, 200_000, 10**9])
def test_shards_hold_every_tensor_once_in_order_and_within_bounds(limit: int) -> None:
    tensors = vit(12)
    shards = cut_shards(tensors, limit)
    assert list(itertools.chain(*shards)) == tensors
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.dense_bytes for tensor in shard) <= limit
        assert len({tensor.name.split(".")[0] for tensor in shard}) == 1


def test_checkpoints_that_share_an_encoder_share_its_shards() -> None:
    first, second = cut_shards(vit(12), 150_000), cut_shards(vit(12, decoder="hq_decoder"), 150_000)
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]


def test_actions_come_with_reasons_and_integers_alone_are_refused(tmp_path: Path) -> None:
    tensors = (stored("a.weight", (64, 64)), stored("a.bias", (64,)), stored("n", (), "int64"))
    checkpoint = Checkpoint(path=tmp_path, files=(), nbytes=1, format="safetensors", tensors=tensors)
    plan = plan_model("m", checkpoint, PROFILES["balanced"], shard_bytes=1 << 20)
    assert [(p.decision.action, p.decision.reason) for p in plan.tensors] == [
        ("coded", ""),
        ("lossless", "one-dimensional"),
        ("lossless", "int64 is not a float type"),
    ]
    only_integers = Checkpoint(path=tmp_path, files=(), nbytes=1, format="safetensors", tensors=tensors[2:])
    with pytest.raises(
        SourceError, match="the 1 tensors of model 'm' are int64; coded are bfloat16, float16, float32, float64: point"
    ):
        plan_model("m", only_integers, PROFILES["balanced"], shard_bytes=1 << 20)


def test_a_checkpoint_of_float8_alone_says_what_could_be_coded(tmp_path: Path) -> None:
    tensors = (stored("a.weight", (64, 64), "float8_e4m3fn"),)
    checkpoint = Checkpoint(path=tmp_path, files=(), nbytes=1, format="safetensors", tensors=tensors)
    with pytest.raises(SourceError, match="of model 'm' are float8_e4m3fn; coded are bfloat16, float16, float32"):
        plan_model("m", checkpoint, PROFILES["balanced"], shard_bytes=1 << 20)
