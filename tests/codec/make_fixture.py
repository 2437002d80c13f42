"""Writes the fixture of the present format version; run once when a version is made, then kept for ever.

python tests/codec/make_fixture.py
"""

from pathlib import Path

import numpy as np
import torch

from birkhoff.codec.container import FORMAT_VERSION, serialise
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor, encode_tensor


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


if __name__ == "__main__":
    main()
