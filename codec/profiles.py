"""Profiles: what to do with which tensor, decided from its header alone.

A profile is a codec and a target. Its resolved form (`Profile.recipe`) is part of every shard's key: change it, and
the shard is another shard.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from birkhoff.codec.dtypes import is_float

Codec = Literal["lattice", "paper"]
Action = Literal["coded", "lossless"]


ENCODER_VERSION = 1
"""Raised when the encoder writes other bytes for the same tensor and profile: old shards are then not reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How tensors are coded.

    `target_db` is the SQNR (10*log10(sum w^2 / sum (w - w')^2), dB) that every coded tensor must reach. The published
    codec has none, it holds a mean absolute error; our own without one takes for each tensor what the published codec
    reaches on it, and 48 dB for what that leaves raw. `path` searches paths of the trellis: some 0.17 bits a
    weight fewer at the same error, for several times the encoding time on a CPU. Tensors of under `min_weights`
    weights stay lossless.
    """

    name: str
    codec: Codec
    target_db: float | None
    path: bool = True
    min_weights: int = 1024
    summary: str = ""

    @property
    def matches_published(self) -> bool:
        """Whether each tensor's target is the error that the published codec makes on it."""
        return self.codec == "lattice" and self.target_db is None

    def action(self, shape: tuple[int, ...], dtype: str) -> tuple[Action, str]:
        """What happens to a tensor, and why, from its header: ("coded" or "lossless", reason)."""
        count = prod(shape)
        if not is_float(dtype):
            return "lossless", f"{dtype} is not a float type"
        if self.codec == "paper":
            return ("coded", "") if count >= 10 else ("lossless", "fewer than 10 weights")
        if len(shape) < 2:
            return "lossless", "one-dimensional"
        if count < self.min_weights:
            return "lossless", f"fewer than {self.min_weights} weights"
        return "coded", ""

    def recipe(self) -> dict[str, str | float | int | None]:
        """Everything that decides the coded bytes, as plain values."""
        recipe: dict[str, str | float | int | None] = {"codec": self.codec, "encoder": ENCODER_VERSION}
        recipe["target_db"] = self.target_db
        return {**recipe, "path": int(self.path), "min_weights": self.min_weights}


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
