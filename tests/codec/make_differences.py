"""Writes the fixture of version 3: differences to tensors of the fixture of version 2; run once, then kept.

python tests/codec/make_differences.py
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from birkhoff.codec.container import DIFFERENCE_VERSION, CodedTensor, parse, serialise
from birkhoff.codec.difference.encode import Base, encode
from birkhoff.codec.profiles import PROFILES, Decision
from birkhoff.codec.tensor import decode_tensor, encode_tensor

FOLDER = Path(__file__).parent / "fixtures"

NEAR = {
    "grouped.path": 0.6,
    "tailed.fast": 0.3,
    "tailed.path": 0.5,
    "tailed.fine": 0.0,
    "conv.half": 0.05,
    "flat.double": 0.2,
}
"""How far a tensor lies from its base, by the size of its bulk."""


def main() -> None:
    """Differences with and without paths, escapes and levels, for several dtypes; one tensor that is none."""
    blob = (FOLDER / "v2.safetensors").read_bytes()
    digest, held = hashlib.sha256(blob).hexdigest(), {coded.name: coded for coded in parse(blob)}
    generator = torch.Generator().manual_seed(3)
    made = [near(held[name], digest, share, generator) for name, share in NEAR.items()]
    decision = Decision(codec="planes")
    made.append(encode_tensor("own", torch.randn(30, generator=generator), decision).tensor)
    (FOLDER / f"v{DIFFERENCE_VERSION}.safetensors").write_bytes(serialise(made))
    decoded = {coded.name: decode_tensor(coded).numpy() for coded in made}
    np.savez_compressed(FOLDER / f"v{DIFFERENCE_VERSION}.npz", **decoded)  # type: ignore[arg-type]


def near(base: CodedTensor, container: str, share: float, generator: torch.Generator) -> CodedTensor:
    """A tensor that lies near a stored one, as a difference to it."""
    weight = moved(decode_tensor(base), share, generator)
    if base.name == "tailed.path":  # a weight that is far from its base
        weight[7, 5] += 3000.0
    decision = PROFILES["balanced"].decide(tuple(weight.shape), str(weight.dtype).removeprefix("torch."))
    return encode(base.name, weight, decision, Base(container=container, tensor=base)).tensor


def moved(weight: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A tensor moved by noise that follows the size of its rows."""
    rows = weight.reshape(weight.shape[0], -1).float().abs().median(dim=1).values * 1.5
    noise = torch.randn(weight.shape, generator=generator) * rows.view(-1, *[1] * (weight.dim() - 1)) * share
    return (weight.double() + noise.double()).to(weight.dtype)


if __name__ == "__main__":
    main()
