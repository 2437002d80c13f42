"""A reader written from FORMAT.md alone: numpy and zstandard, nothing of ours. It checks nothing; ours does that."""

import json
import struct

import numpy as np
import zstandard

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1", "BOOL": "?"}


def frame(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data) if data else b""


def unplane(data: bytes, width: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes()


def groups_of(rows: np.ndarray, columns: np.ndarray) -> dict[int, int]:
    counts = [0] * 127
    for a in rows:
        for b in columns:
            counts[int(a) + int(b)] += 1
    group, held, left, result = 0, 0, sum(counts), {}
    for total, count in enumerate(counts):
        result[total] = group
        held += count
        left -= count
        if held >= 16384 and left >= 16384 and group < 31:
            group, held = group + 1, 0
    return result


def read_plane(streams: list[bytes], rows: np.ndarray, columns: np.ndarray, path: bool) -> np.ndarray:
    """Takes its groups from the front of `streams`."""
    group = groups_of(rows, columns)
    used = max(group[int(a) + int(b)] for a in set(rows) for b in set(columns)) + 1
    symbols = [list(np.frombuffer(frame(streams.pop(0)), np.int8)) for _ in range(used)]
    plane = np.zeros((len(rows), len(columns)), np.int64)
    taken = [0] * used
    for a in sorted(set(rows)):
        for b in sorted(set(columns)):
            g = group[int(a) + int(b)]
            for r in np.flatnonzero(rows == a):
                for p in np.flatnonzero(columns == b):
                    plane[r, p] = symbols[g][taken[g]]
                    taken[g] += 1
    assert taken == [len(held) for held in symbols]
    if not path:
        return plane
    flat = plane.reshape(-1)
    steps = max(64, min(256, len(flat) // 2048))
    lanes = -(-len(flat) // steps)
    o = np.zeros((steps + 3, lanes), np.int64)
    number = np.zeros_like(flat)
    for t in range(steps):
        here = slice(t * lanes, min((t + 1) * lanes, len(flat)))
        k = np.zeros(lanes, np.int64)
        k[: len(flat[here])] = flat[here]
        o[t + 3] = (k % 2) ^ o[t + 1] ^ o[t]
        number[here] = (2 * k + o[t + 2])[: len(flat[here])]
    return number.reshape(plane.shape)


def read_lattice(entry: dict[str, str], streams: list[bytes], shape: list[int]) -> np.ndarray:
    columns = int(entry["columns"])
    rows, pairs = int(np.prod(shape)) // columns, (columns + 1) // 2
    levels = []
    for count in (rows, pairs, pairs):
        stream = frame(streams.pop(0))
        levels.append(np.frombuffer(stream, np.uint8) if stream else np.zeros(count, np.uint8))
    path = entry["path"] == "1"
    i = read_plane(streams, levels[0], levels[1], path)
    j = read_plane(streams, levels[0], levels[2], path)
    escapes = np.frombuffer(unplane(frame(streams.pop(0)), 4), "<i4").reshape(3, int(entry["escapes"]))
    assert not streams
    index = np.cumsum(escapes[0])
    i.reshape(-1)[index], j.reshape(-1)[index] = escapes[1], escapes[2]
    (step,) = struct.unpack(">f", bytes.fromhex(entry["step"]))
    x = ((i.astype(np.float32) + j.astype(np.float32) / np.float32(256)) * np.float32(step)).astype(np.float32)
    y = (j.astype(np.float32) * np.float32(step)).astype(np.float32)
    weight = np.zeros((rows, columns), np.float32)
    for first in range(0, columns, 64):
        width = min(64, columns - first)
        half = -(-width // 2)
        at = slice(first // 2, first // 2 + half)
        weight[:, first : first + half] = x[:, at]
        weight[:, first + half : first + width] = y[:, at][:, : width - half]
    return weight.astype(DTYPES[entry["dtype"]]).reshape(shape)


def read_paper(entry: dict[str, str], data: bytes, shape: list[int]) -> np.ndarray:
    bits, u, rings = int(entry["bits"]), int(entry["U"]), int(entry["K"])
    rows = shape[0] if entry["per_row"] == "1" else 1
    columns = int(np.prod(shape)) // rows
    pairs = rows * -(-columns // 2)
    text = "".join(f"{byte:08b}" for byte in data)
    text = text[len(text) - bits * pairs :]
    code = np.array([int(text[at : at + bits], 2) for at in range(0, len(text), bits)])
    theta, k = code % u, code // u
    centre, far = (np.array(struct.unpack(">2f", bytes.fromhex(entry[key]))) for key in ("centre", "far"))
    n = round(u**0.5)
    offset = np.stack((0.1 * theta / u, 0.1 * (theta % n) / n), 1) - 0.05
    radius = 0.05 + k * (np.linalg.norm(far - centre) - 0.05) / max(1, rings)
    pair = centre + offset * np.where(k > 0, radius / 0.05, 1.0)[:, None]
    return pair.reshape(rows, -1)[:, :columns].reshape(shape).astype(DTYPES[entry["dtype"]])


def read(blob: bytes) -> dict[str, np.ndarray]:
    """The tensors of a container; takes correct containers only."""
    (length,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata.pop("__birkhoff__") == "1"
    tensors = {}
    for name, text in metadata.items():
        entry = dict(token.split("=", 1) for token in text.split(" "))
        shape = [int(size) for size in entry["shape"].split(",") if size]
        begin, end = header[name]["data_offsets"]
        streams = []
        for size in map(int, entry["parts"].split(",")):
            streams.append(data[begin : begin + size])
            begin += size
        assert begin == end
        dtype = np.dtype(DTYPES[entry["dtype"]])
        if entry["codec"] == "raw":
            tensors[name] = np.frombuffer(streams[0], dtype).reshape(shape)
        elif entry["codec"] == "planes":
            tensors[name] = np.frombuffer(unplane(frame(streams[0]), dtype.itemsize), dtype).reshape(shape)
        elif entry["codec"] == "lattice":
            tensors[name] = read_lattice(entry, streams, shape)
        else:
            assert entry["codec"] == "paper"
            tensors[name] = read_paper(entry, streams[0], shape)
    return tensors
