"""Shards decoded in threads, and together: the same results and errors, in bounded pieces."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.errors import FormatError
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.load import decode

CPU = torch.device("cpu")
WAYS = [decode._decode_in_threads, decode._decode_together]


@dataclass(frozen=True)
class Shard:
    blob: str
    bytes: int = 4
    source_bytes: int = 10


class Artifact:
    """As much of an artifact as decoding asks for; its shards hold one raw tensor each."""

    label = "m@1"

    def __init__(self, count: int, damaged: int | None = None) -> None:
        self.shards = tuple(Shard(str(k)) for k in range(count))
        self.manifest = self
        self._damaged = damaged
        self.readers: set[str] = set()

    def arriving(self) -> Iterator[Shard]:
        yield from self.shards

    def coded_of(self, shard: Shard) -> list[CodedTensor]:
        self.readers.add(threading.current_thread().name)
        if int(shard.blob) == self._damaged:
            raise IntegrityError("blob is damaged")
        return [CodedTensor(name=shard.blob, codec="raw", dtype="U8", shape=(1,), parts=(b"x",))]


@pytest.mark.parametrize("way", WAYS)
def test_every_shard_comes_back_once(way: Callable[..., Iterator[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOGETHER_BYTES", 35)
    sizes: list[int] = []

    def take(shards: Sequence[list[CodedTensor]]) -> list[str]:
        sizes.append(len(shards))
        return [coded.name for (coded,) in shards]

    artifact = Artifact(40)
    assert {shard.blob: name for shard, name in way(artifact, take, CPU)} == {str(k): str(k) for k in range(40)}
    assert sum(sizes) == 40
    assert max(sizes) <= (1 if way is decode._decode_in_threads else 3)
    assert threading.current_thread().name not in artifact.readers


@pytest.mark.parametrize("way", WAYS)
def test_errors_of_reading_and_of_decoding_come_out(way: Callable[..., Iterator[Any]]) -> None:
    def take(shards: Sequence[list[CodedTensor]]) -> list[None]:
        for shard in shards:
            if shard[0].name == "3":
                raise FormatError("tensor '3': code does not end")
        return [None for _ in shards]

    with pytest.raises(IntegrityError, match="blob is damaged"):
        list(way(Artifact(3, damaged=2), take, CPU))
    with pytest.raises(IntegrityError, match=r"m@1: blob .*3.*: tensor '3': code does not end"):
        list(way(Artifact(9), take, CPU))


def test_the_device_decides() -> None:
    artifact: Any = Artifact(1)
    for device, way in zip((CPU, torch.device("cuda")), WAYS, strict=True):
        found: Any = decode.decode_shards(artifact, lambda shards: [None for _ in shards], device)
        assert found.gi_code is way.__code__
        found.close()
