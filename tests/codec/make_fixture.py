"""Writes the fixture and the test vectors of the present format version; run once when a version is made, then kept.

python tests/codec/make_fixture.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from birkhoff.codec import contexts, rate, rest, trellis
from birkhoff.codec.container import FORMAT_VERSION, serialise
from birkhoff.codec.entropy import rans, tables
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import Encoded, decode_tensor, encoded_code
from tests.codec.by_profile import encode_tensor


def main() -> None:
    """Tensors that take every branch of the page: groups, paths, escapes, odd sizes, each codec and several dtypes."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(300, 1, generator=generator).exp()
    grouped = torch.randn(300, 330, generator=generator) * scale * torch.randn(1, 330, generator=generator).exp()
    tailed = torch.randn(40, 131, generator=generator)
    tailed[0, 0], tailed[3, 70], tailed[39, 130] = 900.0, -500.0, 300.0
    small = torch.randn(40, 33, generator=generator) * 0.02
    fast, path = PROFILES["fast"], PROFILES["balanced"]
    made = [
        encode_tensor("grouped.fast", grouped, fast),
        encode_tensor("grouped.path", grouped, path),
        encode_tensor("tailed.fast", tailed, fast),
        encode_tensor("tailed.path", tailed, path),
        down_columns("grouped.columns", grouped),
        down_columns("tailed.columns", tailed),
        fine_path("tailed.fine", torch.randn(70, 90, generator=generator) ** 3),
        encode_tensor("conv.half", torch.randn(16, 8, 3, 3, generator=generator).half(), fast),
        encode_tensor("flat.double", torch.randn(70, 1, 5, 5, generator=generator).double(), path),
        encode_tensor("vector", torch.randn(50, generator=generator), fast),
        encode_tensor("count", torch.tensor(12345), fast),
        encode_tensor("flags", torch.randn(40, 40, generator=generator) > 0, fast),
        encode_tensor("empty", torch.empty(0, 3), fast),
        encode_tensor("paper.rows", small, PROFILES["paper"]),
        encode_tensor("paper.rings", torch.cat((small, small.flip(0) * 6)).reshape(8, 10, 33), PROFILES["paper"]),
        encode_tensor("eight bits", torch.randint(0, 9, (30,), generator=generator, dtype=torch.uint8), fast),
    ]
    folder = Path(__file__).parent / "fixtures"
    blob = serialise([item.tensor for item in made])
    (folder / f"v{FORMAT_VERSION}.safetensors").write_bytes(blob)
    decoded = {item.tensor.name: decode_tensor(item.tensor).numpy() for item in made}
    np.savez_compressed(folder / f"v{FORMAT_VERSION}.npz", **decoded)  # type: ignore[arg-type]

    (folder / f"v{FORMAT_VERSION}_vectors.json").write_text(json.dumps(vectors(), indent=1) + "\n")


def down_columns(name: str, weight: torch.Tensor) -> Encoded:
    """A matrix whose paths run down its columns, as feedback of errors makes them."""
    return encoded_code(name, weight, *rate.encode(weight, 30.0, path=2), path=2)


def fine_path(name: str, weight: torch.Tensor) -> Encoded:
    """A path whose coordinates need escapes in memory and none, or few, at rest."""
    code, _ = rate.encode(weight, 44.0, path=1)
    return encoded_code(name, weight, code, fidelity(weight, code.decode()), path=1)


def vectors() -> dict[str, Any]:
    """What another implementer can hold each part of a reader to; bytes in hex."""
    random = np.random.default_rng(2)
    normal = (np.clip(np.rint(random.standard_normal(3000) * 5), -128, 127).astype(np.int8).view(np.uint8)) ^ 128
    made: dict[str, Any] = {"tables": [], "streams": [], "groups": [], "paths": []}
    for counts in ({5: 3, 6: 1}, {0: 1, 255: 1}, {7: 40000, 9: 1}, dict(enumerate([1, 9, 80, 300, 90, 8, 0, 1], 120))):
        table = tables.reference_fit(np.array([counts.get(value, 0) for value in range(256)]))
        assert table is not None
        frequency = {str(value): int(f) for value, f in enumerate(table.frequency) if f}
        made["tables"].append({"counts": counts, "table": table.data.hex(), "frequency": frequency})
    for data, lanes in ((normal[:50], 1), (normal[:500], 4), (normal, 32)):
        table = tables.reference_fit(np.bincount(data, minlength=256))
        assert table is not None
        (blocks,) = rans.encode(data, np.array([data.size]), table.frequency[None], np.array([lanes]))
        coded = bytes([rest.ANS, lanes.bit_length() - 1]) + table.data + blocks
        made["streams"].append({"stream": coded.hex(), "holds": data.tobytes().hex()})
    for data in (np.arange(4, dtype=np.uint8), np.zeros(300, np.uint8)):
        made["streams"].append({"stream": rest.pack(data).hex(), "holds": data.tobytes().hex()})
    for rows, columns, bits in (([1, 0], [0, 2, 0], 8), ([0] * 40 + [7] * 30 + [3] * 50, [0] * 20 + [9] * 30, 10)):
        sizes = contexts.group_sizes(*(np.array(v, dtype=np.uint8) for v in (rows, columns)), contexts.rule_2(bits))
        made["groups"].append({"g": bits, "rows": rows, "columns": columns, "sizes": sizes})
    for shape, path in (((3, 70), 1), ((70, 3), 2), ((65, 2), 2)):
        k = torch.from_numpy(random.integers(-3, 4, shape[0] * shape[1]))
        n = trellis.numbers(k, trellis.lanes_of(*shape, path))
        made["paths"].append({"path": path, "shape": shape, "symbols": k.tolist(), "coordinates": n.tolist()})
    small = serialise([encode_tensor("n", torch.tensor([1.0, -2.5]), PROFILES["fast"]).tensor])
    made["containers"] = [
        {"bytes": serialise([]).hex(), "tensors": {}},
        {"bytes": small.hex(), "tensors": {"n": [1.0, -2.5]}},
    ]
    return made


if __name__ == "__main__":
    main()
