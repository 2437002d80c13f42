"""Profiles: what to do with which tensor, decided from its header alone.

A profile is a codec and a target. Its resolved form (`Profile.recipe`) is part of every shard's key: change it, and
the shard is another shard.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log10, prod
from typing import Literal

from birkhoff.codec.dtype_names import is_float

Codec = Literal["lattice", "paper", "lossless"]
Action = Literal["coded", "lossless"]
Allocation = Literal["uniform", "size"]
Override = float | Literal["lossless"]
"""What is said of a single tensor, over its profile: a target in dB, or to keep it lossless."""

TARGET_DB_RANGE = (6.0, 48.0)
"""Targets the trajectory can serve: below, tensors die; above, most pairs would be escapes."""

REFERENCE_WEIGHTS = 1 << 20
"""Size of the tensor that gets just the profile's target under allocation by size."""

_LARGEST = 1 << 26
"""Weights of a large tensor."""

_SIZE_SLOPE_DB = 7.5
"""dB that a tensor of a tenth of the weights gets more: see `Profile`. Of 0, 5, 7.5 and 10 the best on the demo model,
judged by its masks at equal bytes."""

ENCODER_VERSION = 3
"""Raised when the encoder writes other bytes for the same tensor and profile: old shards are then not reused.

2: the reason goes with a tensor that falls back to lossless.
3: targets hold for the bulk of the weights where few outliers carry most of the energy.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How tensors are coded.

    `target_db` is the SQNR (10*log10(sum w^2 / sum (w - w')^2), dB) that every coded tensor must reach, sum w^2 being
    that of its bulk where few outliers carry most of it (the rule stands in `metrics`). The published codec has none,
    it holds a mean absolute error; our own without one takes for each tensor what the published codec reaches on it,
    and 48 dB for what that leaves raw. `path` searches paths of the trellis: some 0.17 bits a weight fewer at the same
    error, for several times the encoding time on a CPU. Tensors of under `min_weights` weights stay lossless. `single`
    marks what is said of one tensor only: its target then goes with it.

    With `allocation` `size`, `target_db` is that of a tensor of `REFERENCE_WEIGHTS` weights and smaller ones get more.
    Each layer's relative error reaches the output much alike, whatever the layer's size, while a dB costs bits in
    proportion to it: the least sum of relative errors sum 10^(-d_i/10) for so many bits sum n_i d_i is at
    d_i = c - 10*log10(n_i). Three quarters of that slope are taken: a tensor's share of the output's error is not quite
    independent of its size. Each tensor's target stays in `TARGET_DB_RANGE`.
    """

    name: str
    codec: Codec
    target_db: float | None
    path: bool = True
    min_weights: int = 1024
    summary: str = ""
    allocation: Allocation = "uniform"
    single: bool = False

    @property
    def matches_published(self) -> bool:
        """Whether each tensor's target is the error that the published codec makes on it."""
        return self.codec == "lattice" and self.target_db is None

    def action(self, shape: tuple[int, ...], dtype: str) -> tuple[Action, str]:
        """What happens to a tensor, and why, from its header: ("coded" or "lossless", reason)."""
        count = prod(shape)
        if not is_float(dtype):
            kind = "quantised already" if dtype.startswith("float8") else "not a float type"
            return "lossless", f"{dtype} is {kind}"
        if self.codec == "lossless":
            return "lossless", "by override"
        if self.codec == "paper":
            return ("coded", "") if count >= 10 else ("lossless", "fewer than 10 weights")
        if len(shape) < 2:
            return "lossless", "one-dimensional"
        if count < self.min_weights:
            return "lossless", f"fewer than {self.min_weights} weights"
        return "coded", ""

    def of_tensor(self, shape: tuple[int, ...], override: Override | None = None) -> "Profile":
        """The profile of one tensor: its share under `allocation`, or what the manifest says of it."""
        if override == "lossless":
            return replace(self, codec="lossless", target_db=None, allocation="uniform", single=True)
        if override is not None:
            return replace(self, codec="lattice", target_db=override, allocation="uniform", single=True)
        if self.allocation == "uniform" or self.target_db is None:
            return self
        share = self.target_db - _SIZE_SLOPE_DB * log10(max(1, prod(shape)) / REFERENCE_WEIGHTS)
        low, high = TARGET_DB_RANGE
        return replace(self, target_db=round(min(max(low, share), high), 2), allocation="uniform", single=True)

    @classmethod
    def of_recipe(cls, name: str, recipe: Mapping[str, str | float | int | None]) -> "Profile":
        """The profile of a stored recipe; what an older one does not say was not there to be chosen."""
        target, codec = recipe.get("target_db"), recipe.get("codec", "lattice")
        return cls(
            name=name,
            codec="paper" if codec == "paper" else "lattice",
            target_db=None if target is None else float(target),
            path=bool(recipe.get("path", 1)),
            min_weights=int(recipe.get("min_weights") or 0),
            allocation="size" if recipe.get("allocation") == "size" else "uniform",
        )

    @property
    def target_range(self) -> tuple[float, float]:
        """Targets between which tensors of every usual size go through the whole of `TARGET_DB_RANGE`."""
        low, high = TARGET_DB_RANGE
        if self.allocation == "uniform":
            return low, high
        small, large = (_SIZE_SLOPE_DB * log10(n / REFERENCE_WEIGHTS) for n in (self.min_weights, _LARGEST))
        return math.floor(low + small), math.ceil(high + large)

    def recipe(self) -> dict[str, str | float | int | None]:
        """Everything that decides the coded bytes, as plain values."""
        recipe: dict[str, str | float | int | None] = {"codec": self.codec, "encoder": ENCODER_VERSION}
        recipe["target_db"] = self.target_db
        recipe |= {"path": int(self.path), "min_weights": self.min_weights}
        return recipe if self.allocation == "uniform" else recipe | {"allocation": self.allocation}


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="small", codec="lattice", target_db=27.0, summary="smallest; 27 dB"),
        Profile(name="balanced", codec="lattice", target_db=30.0, summary="the default; 30 dB"),
        Profile(name="fine", codec="lattice", target_db=36.0, summary="near lossless; 36 dB"),
        Profile(name="fast", codec="lattice", target_db=30.0, path=False, summary="30 dB, encoded fastest"),
        Profile(name="match-paper", codec="lattice", target_db=None, summary="our codec at the published one's error"),
        Profile(name="paper", codec="paper", target_db=None, path=False, summary="the published codec, for comparison"),
    )
}

DEFAULT_PROFILE = "balanced"
