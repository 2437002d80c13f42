"""Synthetic checkpoints of the SAM family: published file names, nesting, tensors and sizes, drawn weights.

    python -m tests.harness.benchmarks.synthetic OUT [--only NAME] [--scale S]

For tests of time, memory and sharing at full size (10.7 GB of files, 19 models). Ratios and errors on drawn weights are
no result. What the files hold is in `family`.

Every tensor is drawn from a generator keyed by file and tensor name, so files are the same wherever and in whatever
order they are written. Where a published model freezes another one's weights (SAM-HQ that of SAM, MobileSAMv2 the image
encoder of SAM-H), both draw the same.
"""

import argparse
import hashlib
import io
import math
import multiprocessing
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tests.harness.benchmarks.family import FileSpec, TensorSpec, tensors_of, wanted_files

# torch is imported where it is used: the processes that draw need only numpy and start at once.

CHUNK_BYTES = 32 << 20
"""What a process draws at a time; one tensor more bounds its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor to draw and the places in a file, in bytes from its start, of its data and its directory entry."""

    path: str
    offset: int
    entry: int
    owner: str
    spec: TensorSpec


def write_files(
    out: Path, specs: Iterable[FileSpec], *, scale: float = 1.0, processes: int | None = None
) -> list[Path]:
    """Write checkpoints into a folder, over what is there.

    Headers are written first, with the room for the weights left open; `processes` (one per CPU where left out) then
    fill that in. Memory: a tensor for each of them.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    specs = list(specs)
    pieces = [piece for spec in specs for piece in _write_header(out, spec, scale)]
    chunks = list(_chunks(pieces))
    count = min(processes or os.cpu_count() or 1, len(chunks))
    if count <= 1:
        for chunk in chunks:
            fill(chunk)
    else:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            for _ in pool.imap_unordered(fill, chunks):
                pass
    for spec in specs:
        if spec.packed:
            _pack(_unpacked(out, spec), out / spec.file)
    return [out / spec.file for spec in specs]


def fill(pieces: Sequence[Piece]) -> None:
    """Draw tensors and write them to their places."""
    for piece in pieces:
        data = draw(piece.owner, piece.spec)
        with io.FileIO(piece.path, "r+") as file:
            view = data.reshape(-1).view(np.uint8).data
            _write_at(file, piece.offset, view)
            # APPNOTE.TXT 4.3.9 and 4.3.12: the checksum stands behind the data and in the archive's directory.
            checksum = zlib.crc32(view).to_bytes(4, "little")
            _write_at(file, piece.offset + len(view) + 4, checksum)
            _write_at(file, piece.entry + 16, checksum)


def _write_at(file: io.FileIO, offset: int, data: bytes | memoryview) -> None:
    """Write all of it; one call takes at most 2 GiB."""
    file.seek(offset)
    done, view = 0, memoryview(data)
    while done < len(view):
        done += file.write(view[done:])


def draw(owner: str, spec: TensorSpec) -> NDArray[Any]:
    """The values of a tensor: a function of owner, name and shape alone."""
    key = hashlib.blake2b(f"{owner}\0{spec.name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    if spec.kind == "counter":
        return np.full(spec.shape, generator.integers(10_000, 500_000), dtype=np.int64)
    if len(spec.shape) < 2:
        return _vector(generator, spec)
    return _matrix(generator, spec)


def _vector(generator: np.random.Generator, spec: TensorSpec) -> NDArray[np.float32]:
    """Norms near 1, variances positive, biases, means and layer scales small."""
    values = generator.standard_normal(spec.shape, dtype=np.float32)
    name = spec.name.rpartition(".")[2]
    if name == "running_var":
        values *= np.float32(0.5)
        np.exp(values, out=values)
        return values
    if name == "weight":
        values *= np.float32(0.15)
        values += np.float32(1)
        return values
    values *= np.float32(0.1 if name in ("running_mean", "gamma") else 0.03)
    return values


def _matrix(generator: np.random.Generator, spec: TensorSpec) -> NDArray[np.float32]:
    """Normal weights under row and column scales; a few tensors far larger than the rest, a few with heavy rows."""
    fan_in = math.prod(spec.shape[1:])
    is_weight = spec.name.endswith("weight") and spec.shape[0] > 1
    usual = 0.7 / math.sqrt(fan_in) if is_weight else 0.08
    sigma = 1.0 if spec.kind == "buffer" else usual * math.exp(0.4 * generator.standard_normal())
    outlier, heavy = generator.random() < 0.03, generator.random() < 0.05
    values = generator.standard_normal(math.prod(spec.shape), dtype=np.float32).reshape(-1, fan_in)
    if spec.kind == "buffer":
        return values.reshape(spec.shape)
    rows = np.exp((0.8 if heavy else 0.25) * generator.standard_normal((len(values), 1)))
    columns = np.exp(0.15 * generator.standard_normal((1, fan_in)))
    values *= (rows * sigma * (8 if outlier else 1)).astype(np.float32)
    values *= columns.astype(np.float32)
    far = generator.integers(0, values.size, values.size // 20_000)
    values.reshape(-1)[far] *= np.float32(8)
    return values.reshape(spec.shape)


def _unpacked(out: Path, spec: FileSpec) -> Path:
    return out / spec.file.removesuffix(".zip")


def _write_header(out: Path, spec: FileSpec, scale: float) -> list[Piece]:
    """Write the file without its weights; returns where each belongs."""
    import torch

    path, owned = _unpacked(out, spec), tensors_of(spec, scale)
    kinds = {"counter": torch.int64}
    # Never touched, so no memory stands behind them.
    empty = {tensor.name: torch.empty(tensor.shape, dtype=kinds.get(tensor.kind)) for _, tensor in owned}
    saved: dict[str, Any] = empty
    if spec.nesting:
        saved = {key: _below(empty, prefix) for key, prefix in spec.nesting.items()}
    with torch.serialization.skip_data():
        torch.save(saved, path)
    return [
        Piece(path=str(path), offset=offset, entry=entry, owner=owner, spec=tensor)
        for (offset, entry), (owner, tensor) in zip(_places(path), owned, strict=True)
    ]


def _places(path: Path) -> list[tuple[int, int]]:
    """Offsets of data and directory entry of every tensor, in the order of saving: records are numbered in it."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.start_dir
        for info in archive.infolist():
            folder, _, number = info.filename.partition("/")[2].partition("/")
            if folder == "data" and number.isdigit():
                lengths = _shorts(file, info.header_offset + 26, 2)
                places[int(number)] = info.header_offset + 30 + sum(lengths), entry
            entry += 46 + sum(_shorts(file, entry + 28, 3))
    return [places[index] for index in range(len(places))]


def _shorts(file: BinaryIO, offset: int, count: int) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack(f"<{count}H", file.read(2 * count))


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += piece.spec.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pack(inner: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(inner, inner.name)
    inner.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.harness.benchmarks.synthetic`."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.harness.benchmarks.synthetic", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this model only; repeatable")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every dimension of 16 and more")
    parser.add_argument("--processes", type=int, help="default: one per CPU")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        specs = wanted_files(options.only)
    except ValueError as error:
        parser.error(str(error))
    written = write_files(options.out, specs, scale=options.scale, processes=options.processes)
    total = sum(path.stat().st_size for path in written)
    seconds = time.perf_counter() - start
    print(f"{len(written)} files, {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e6 / seconds:.0f} MB/s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
