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


def read_table(data: bytes) -> tuple[dict[int, int], int]:
    """(frequency by value, bytes of the table) of what begins with a table."""
    low, count, fine, rice = data[0], data[1] + 1, data[2] % 8, data[2] // 8
    at, field, weight = 24, 0, {}

    def bit() -> int:
        nonlocal at
        at += 1
        return data[(at - 1) // 8] >> (at - 1) % 8 & 1

    for value in range(low, low + count):
        ones = 0
        while bit():
            ones += 1
        z = 2**rice * ones + sum(bit() << k for k in range(rice))
        field += z // 2 if z % 2 == 0 else -(z + 1) // 2
        m = field - 1
        weight[value] = (2**fine + m % 2**fine) * 2 ** (m // 2**fine) if field else 0
    total = sum(weight.values())
    frequency = {value: max(1, 4096 * v // total) if v else 0 for value, v in weight.items()}
    greatest = max(frequency, key=lambda value: frequency[value])
    frequency[greatest] += 4096 - sum(frequency.values())
    return frequency, -(-at // 8)


def read_blocks(data: bytes, size: int, frequency: dict[int, int], lanes: int) -> bytes:
    blocks = -(-size // 131072)
    words = [int.from_bytes(data[4 * b : 4 * b + 4], "little") for b in range(blocks - 1)]
    data = data[4 * (blocks - 1) :]
    slots, below = [], 0
    for value, f in sorted(frequency.items()):
        slots += [(value, f, below)] * f
        below += f
    out = bytearray()
    for block in range(blocks):
        count = words[block] if block < blocks - 1 else (len(data) - 4 * lanes) // 2
        state = [int.from_bytes(data[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)]
        row = [int.from_bytes(data[4 * lanes + 2 * w : 4 * lanes + 2 * w + 2], "little") for w in range(count)]
        data = data[4 * lanes + 2 * count :]
        assert min(state) >= 65536
        for i in range(min(131072, size - len(out))):
            x = state[i % lanes]
            value, f, c = slots[x % 4096]
            x = f * (x // 4096) + x % 4096 - c
            state[i % lanes] = 65536 * x + row.pop(0) if x < 65536 else x
            out.append(value)
        assert not row
        assert set(state) == {65536}
    assert not data
    return bytes(out)


def stream(data: bytes, size: int) -> bytes:
    if not size:
        assert not data
        return b""
    kind, data = data[0], data[1:]
    if kind == 0:
        found = data
    elif kind == 1:
        found = frame(data)
    else:
        assert kind == 2
        frequency, used = read_table(data[1:])
        found = read_blocks(data[1 + used :], size, frequency, 2 ** data[0])
    assert len(found) == size
    return found


def groups_of(rows: np.ndarray, columns: np.ndarray, least: int, most: int) -> dict[int, int]:
    counts = [0] * 127
    for a in rows:
        for b in columns:
            counts[int(a) + int(b)] += 1
    group, held, left, result = 0, 0, sum(counts), {}
    for total, count in enumerate(counts):
        result[total] = group
        held += count
        left -= count
        if held >= least and left >= least and group < most:
            group, held = group + 1, 0
    return result


def read_groups(rows: np.ndarray, columns: np.ndarray, group: dict[int, int], symbols: list[np.ndarray]) -> np.ndarray:
    plane = np.zeros((len(rows), len(columns)), np.int64)
    taken = [0] * len(symbols)
    for a in sorted(set(rows)):
        for b in sorted(set(columns)):
            g = group[int(a) + int(b)]
            for r in np.flatnonzero(rows == a):
                for p in np.flatnonzero(columns == b):
                    plane[r, p] = symbols[g][taken[g]]
                    taken[g] += 1
    assert taken == [len(held) for held in symbols]
    return plane


def number_of_groups(rows: np.ndarray, columns: np.ndarray, group: dict[int, int]) -> int:
    return max(group[int(a) + int(b)] for a in set(rows) for b in set(columns)) + 1


def read_path(plane: np.ndarray, path: int) -> np.ndarray:
    rows, pairs = plane.shape
    flat = plane.reshape(-1)
    steps = max(64, min(256, len(flat) // 2048))
    lanes = -(-len(flat) // steps) if path == 1 else pairs * -(-rows // steps)
    steps = -(-len(flat) // lanes)
    o = np.zeros((steps + 3, lanes), np.int64)
    number = np.zeros_like(flat)
    for t in range(steps):
        here = slice(t * lanes, min((t + 1) * lanes, len(flat)))
        k = np.zeros(lanes, np.int64)
        k[: len(flat[here])] = flat[here]
        o[t + 3] = (k % 2) ^ o[t + 1] ^ o[t]
        number[here] = (2 * k + o[t + 2])[: len(flat[here])]
    return number.reshape(plane.shape)


def symbols_1(streams: list[bytes], rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Both planes of symbols, from the front of version 1's streams."""
    levels, planes = [], []
    for count in (rows, pairs, pairs):
        held = frame(streams.pop(0))
        levels.append(np.frombuffer(held, np.uint8) if held else np.zeros(count, np.uint8))
    for columns in levels[1:]:
        group = groups_of(levels[0], columns, 16384, 31)
        used = number_of_groups(levels[0], columns, group)
        symbols = [np.frombuffer(frame(streams.pop(0)), np.int8) for _ in range(used)]
        planes.append(read_groups(levels[0], columns, group, symbols))
    return planes[0], planes[1]


def symbols_2(streams: list[bytes], rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    held = streams.pop(0)
    count = 1 + rows + 2 * pairs
    levels = np.frombuffer(stream(held, count), np.uint8) if held else np.array([12] + [0] * (count - 1), np.uint8)
    row, column = levels[1 : 1 + rows], levels[1 + rows :]
    group = groups_of(row, column, 2 ** int(levels[0]), 63)
    symbols = []
    for g in range(number_of_groups(row, column, group)):
        size = sum(group[int(a) + int(b)] == g for a in row for b in column)
        symbols.append(np.frombuffer(stream(streams.pop(0), size), np.uint8).astype(np.int64) - 128)
    both = read_groups(row, column, group, symbols)
    return both[:, :pairs], both[:, pairs:]


Coordinates = tuple[np.ndarray, np.ndarray]


def coordinates(entry: dict[str, str], streams: list[bytes], shape: list[int], version: int) -> Coordinates:
    columns = int(entry["columns"])
    rows, pairs = int(np.prod(shape)) // columns, (columns + 1) // 2
    i, j = (symbols_1 if version == 1 else symbols_2)(streams, rows, pairs)
    path = int(entry["path"])
    i, j = (read_path(plane, path) if path else plane.copy() for plane in (i, j))
    size, held = 12 * int(entry["escapes"]), streams.pop(0)
    held = frame(held) if version == 1 else stream(held, size)
    escapes = np.frombuffer(unplane(held, 4), "<i4").reshape(3, -1)
    assert len(held) == size
    assert not streams
    index = np.cumsum(escapes[0])
    i.reshape(-1)[index], j.reshape(-1)[index] = escapes[1], escapes[2]
    return i, j


def add(entry: dict[str, str], own: Coordinates, base: Coordinates) -> Coordinates:
    times, stride = int(entry["times"]), int(entry["stride"])
    i, j = (times * b.astype(np.int64) + stride * d.astype(np.int64) for b, d in zip(base, own, strict=True))
    return i, j


def weights(entry: dict[str, str], found: Coordinates, shape: list[int]) -> np.ndarray:
    i, j = found
    rows, columns = len(i), int(entry["columns"])
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


def read_planes(streams: list[bytes], size: int, width: int, version: int) -> bytes:
    share = size // len(streams)
    return unplane(frame(streams[0]) if version == 1 else b"".join(stream(data, share) for data in streams), width)


def entries_of(blob: bytes) -> tuple[int, list[tuple[str, dict[str, str], list[int], list[bytes]]]]:
    """Version, and name, entry, shape and streams of each tensor."""
    (length,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    metadata = header.pop("__metadata__")
    version = int(metadata.pop("__birkhoff__"))
    if version >= 2:
        texts = json.loads(frame(data[: header["index"]["data_offsets"][1]]))
        at = header["data"]["data_offsets"][0]
    else:
        texts = metadata
    found = []
    for name, text in texts.items():
        entry = dict(token.split("=", 1) for token in text.split(" "))
        shape = [int(size) for size in entry["shape"].split(",") if size]
        begin = at if version >= 2 else header[name]["data_offsets"][0]
        streams = []
        for size in map(int, entry["parts"].split(",")):
            streams.append(data[begin : begin + size])
            begin += size
        at = begin
        found.append((name, entry, shape, streams))
    assert at == len(data) or version == 1
    return version, found


def base_of(name: str, entry: dict[str, str], shape: list[int], bases: dict[str, bytes]) -> Coordinates:
    blob = bases[entry["base"]]
    version, held = entries_of(blob)
    ((other, other_shape, streams),) = [item[1:] for item in held if item[0] == name]
    assert (other["codec"], other["columns"], other_shape) == ("lattice", entry["columns"], shape)
    return coordinates(other, streams, shape, version)


def read(blob: bytes, bases: dict[str, bytes] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a container; takes correct containers only. `bases` are others by the SHA-256 of their bytes."""
    version, held = entries_of(blob)
    tensors = {}
    for name, entry, shape, streams in held:
        dtype = np.dtype(DTYPES[entry["dtype"]])
        if entry["codec"] == "raw":
            tensors[name] = np.frombuffer(streams[0], dtype).reshape(shape)
        elif entry["codec"] == "planes":
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            tensors[name] = np.frombuffer(read_planes(streams, size, dtype.itemsize, version), dtype).reshape(shape)
        elif entry["codec"] in ("lattice", "difference"):
            found = coordinates(entry, streams, shape, version)
            if entry["codec"] == "difference":
                assert version >= 3
                found = add(entry, found, base_of(name, entry, shape, bases or {}))
            tensors[name] = weights(entry, found, shape)
        else:
            assert entry["codec"] == "paper"
            tensors[name] = read_paper(entry, streams[0], shape)
    return tensors
