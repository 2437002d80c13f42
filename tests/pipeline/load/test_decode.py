"""Shards decoded in threads, and together: the same results and errors, in bounded pieces."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from birkhoff.codec.container import CodedTensor, Head
from birkhoff.codec.errors import FormatError
from birkhoff.kernels.entropy.plan import ALIGNED
from birkhoff.kernels.entropy.staging import Upload
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

    def blob(self, shard: Shard) -> bytes:
        self.readers.add(threading.current_thread().name)
        if int(shard.blob) == self._damaged:
            raise IntegrityError("blob is damaged")
        return shard.blob.rjust(shard.bytes).encode()

    def read_into(self, shard: Shard, out: memoryview) -> None:
        out[:] = self.blob(shard)

    def coded_of(self, shard: Shard) -> list[CodedTensor]:
        return self.coded_in(shard, self.blob(shard))

    def coded_in(self, shard: Shard, blob: bytes | memoryview, _: Head | None = None) -> list[CodedTensor]:
        assert int(bytes(blob)) == int(shard.blob)
        return [CodedTensor(name=shard.blob, codec="raw", dtype="U8", shape=(1,), parts=(b"x",))]


@pytest.mark.parametrize("way", WAYS)
def test_every_shard_comes_back_once(way: Callable[..., Iterator[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOGETHER_BYTES", 35)
    sizes: list[int] = []
    order: list[str] = []
    enders = set[str]()

    def take(shards: Sequence[list[CodedTensor]], upload: Upload | None) -> Callable[[], list[str]]:
        sizes.append(len(shards))
        order.append("begin")
        if upload is not None:
            (run,) = upload.runs
            places = range(run.to, run.to + run.size, ALIGNED)
            sent = [int(bytes(upload.data[place : place + 4].numpy())) for place in places]
            assert sent == [int(coded.name) for (coded,) in shards]

        def result() -> list[str]:
            order.append("end")
            enders.add(threading.current_thread().name)
            return [coded.name for (coded,) in shards]

        return result

    artifact = Artifact(40)
    assert {shard.blob: name for shard, name in way(artifact, take, CPU, {})} == {str(k): str(k) for k in range(40)}
    assert sum(sizes) == 40
    if way is decode._decode_together:
        assert order.count("begin") == order.count("end") == len(sizes)
        going = [order[: k + 1].count("begin") - order[: k + 1].count("end") for k in range(len(order))]
        assert max(going) <= 2  # one is decoded beside the next
        assert enders == {"finish_0"}
    assert max(sizes) <= (1 if way is decode._decode_in_threads else 3)
    assert threading.current_thread().name not in artifact.readers


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_errors_of_reading_and_of_decoding_come_out(way: Callable[..., Iterator[Any]], late: bool) -> None:
    def take(shards: Sequence[list[CodedTensor]], _: object) -> Callable[[], list[None]]:
        def result() -> list[None]:
            if late:
                check()
            return [None for _ in shards]

        def check() -> None:
            if any(shard[0].name == "3" for shard in shards):
                raise FormatError("tensor '3': code does not end")

        if not late:
            check()
        return result

    with pytest.raises(IntegrityError, match="blob is damaged"):
        list(way(Artifact(3, damaged=2), take, CPU, {}))
    with pytest.raises(IntegrityError, match=r"m@1: blob .*3.*: tensor '3': code does not end"):
        list(way(Artifact(9), take, CPU, {}))


def test_the_device_decides() -> None:
    artifact: Any = Artifact(1)
    for device, way in zip((CPU, torch.device("cuda")), WAYS, strict=True):
        found: Any = decode.decode_shards(artifact, lambda shards, _: lambda: [None for _ in shards], device)
        assert found.gi_code is way.__code__
        found.close()


class Counted(Upload):
    """Says what is done with it, in order."""

    told: list[str]

    def send(self) -> None:
        self.told.append(f"send {bytes(self.host[:4]).decode().strip()}")
        super().send()

    def end(self) -> None:
        self.told.append("end")
        super().end()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(Counted, "told", found, raising=False)
    monkeypatch.setattr(decode, "Upload", Counted)
    return found


def taken(shards: Sequence[list[CodedTensor]], _: Upload | None) -> Callable[[], list[list[str]]]:
    return lambda: [[coded.name for coded in shard] for shard in shards]


def test_each_batch_is_sent_and_released_once(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOGETHER_BYTES", 35)
    found: Any = list(decode._decode_together(Artifact(9), taken, CPU, {}))
    assert [names for _, names in found] == [[str(k)] for k in range(9)]
    assert sorted(told) == ["end"] * told.count("end") + ["send 0", "send 3", "send 6"]


def test_a_batch_is_released_while_others_are_read(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOGETHER_BYTES", 10)
    monkeypatch.setattr(decode, "_threads", lambda: 2)
    asked, released = threading.Event(), threading.Event()
    monkeypatch.setattr(decode, "warm_up", lambda _: asked.wait(30))  # all reads stand in line before one is used
    end = Counted.end

    def ended(upload: Counted) -> None:
        end(upload)
        released.set()

    monkeypatch.setattr(Counted, "end", ended)

    class Late(Artifact):
        def arriving(self) -> Iterator[Shard]:
            yield from super().arriving()
            asked.set()

        def read_into(self, shard: Shard, out: memoryview) -> None:
            assert int(shard.blob) < 2 or released.wait(30), "memory of what is done waits for what is not read"
            super().read_into(shard, out)

    assert len(list(decode._decode_together(Late(8), taken, CPU, {}))) == 8  # type: ignore[arg-type]


def test_what_is_queued_waits_until_kernels_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    monkeypatch.setattr(decode, "warm_up", lambda _: time.sleep(0.1) or started.set())

    def take(shards: Sequence[list[CodedTensor]], upload: Upload | None) -> Callable[[], list[list[str]]]:
        assert upload is not None
        with upload.decoding():
            assert started.is_set()
        return taken(shards, upload)

    assert len(list(decode._decode_together(Artifact(3), take, CPU, {}))) == 3  # type: ignore[arg-type]


def test_kernels_that_do_not_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: torch.device) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(decode, "warm_up", broken)
    with pytest.raises(RuntimeError, match="no device"):
        list(decode._decode_together(Artifact(3), taken, CPU, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_of_no_bytes_is_not_its_neighbour(way: Callable[..., Iterator[Any]]) -> None:
    class Empty(Artifact):
        def __init__(self) -> None:
            super().__init__(3)
            self.shards = (self.shards[0], Shard("1", bytes=0), self.shards[2])

        def blob(self, shard: Shard) -> bytes:
            if not shard.bytes:
                raise IntegrityError("blob 1 is damaged: 0 bytes")
            return super().blob(shard)

    with pytest.raises(IntegrityError, match="blob 1 is damaged: 0 bytes"):
        list(way(Empty(), taken, CPU, {}))


def test_more_than_there_is_memory_for_is_refused() -> None:
    artifact = Artifact(2)
    artifact.shards = (artifact.shards[0], Shard("1", bytes=1 << 50))
    with pytest.raises(IntegrityError, match="m@1: blob 0, 1: no memory for the 1125899906842752 bytes that their"):
        list(decode._decode_together(artifact, taken, CPU, {}))  # type: ignore[arg-type]
