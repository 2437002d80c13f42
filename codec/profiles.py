"""Profiles: the decision for a tensor, from its header alone.

A profile is a codec and a target. Its resolved form (`Profile.recipe`) is part of every shard's key: change it, and
the shard is another shard. What it comes to for one tensor is a `Decision`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log10, prod
from typing import Literal, NamedTuple

from birkhoff.codec.dtype_names import is_float

Codec = Literal["lattice", "paper"]
Action = Literal["coded", "lossless"]
Allocation = Literal["uniform", "size", "header", "output"]
"""How a profile's target is shared among a model's tensors: see `Profile`."""

_ALLOCATIONS: dict[str, Allocation] = {"size": "size", "header": "header", "output": "output"}
"""By what a recipe says; it says nothing of `uniform`."""

Override = float | Literal["lossless"]
"""What is said of a single tensor, over its profile: a target in dB, or to keep it lossless."""

Recipe = dict[str, str | float | int | None]
"""A profile resolved to plain values, as manifests and shard keys hold it."""


class Header(NamedTuple):
    """What is known of a tensor before its weights are read; `dtype` is torch's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


TARGET_DB_RANGE = (6.0, 48.0)
"""Targets the trajectory can serve: below, tensors die; above, most pairs would be escapes."""

NOMINAL_MEAN_RANGE_DB = (3.0, 60.0)
"""Means of nominal targets that a budget can choose from: below, a model of 1.5 bits a weight says nothing more."""

REFERENCE_WEIGHTS = 1 << 20
"""Size of the tensor that gets just the profile's target under allocation by size."""

_LARGEST = 1 << 26
"""Weights of a large tensor."""

_SIZE_SLOPE_DB = 7.5
"""dB that a tensor of a tenth of the weights gets more: see `Profile`. Of 0, 5, 7.5 and 10 the best on the demo model,
judged by its masks at equal bytes."""

_FLOOR_DB = 12.0
"""Least target under allocation by header, unless the profile's own is lower: below, tensors die."""

_DEPTHWISE_DB = 14.0
_CONVOLUTION_DB = 8.0
_FAN_IN = 256
_GAIN_RANGE_DB = (-26.0, 52.0)
"""Gains of usual tensors: [8192, 8192], and a depthwise convolution of 1024 weights."""

_LIKE_ALL_DB = 1.0
"""Within so many dB, the mean gain of a model's largest part stands for the mean of all: see `Profile.of_model`."""

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

LEAST_VECTOR = 64
"""Weights from which a small parameter is coded under allocation by output: a code table costs more on fewer."""

ENCODER_VERSION = 6
"""Raised when the encoder writes other bytes for the same tensor and profile: old shards are then not reused.

2: the reason goes with a tensor that falls back to lossless.
3: targets hold for the bulk of the weights where few outliers carry most of the energy.
4: a frame is coded without a search for repeats where that is smaller.
5: format 2; paths up to a share of 1 / 40 of pairs that are escapes in memory.
6: on a CPU, errors are summed in float64 in an order of their own: before, steps hung on torch's threads and vectors.
   Under nominal targets of 44 dB and more, fixed point with feedback, matrices too.
"""

PUBLISHED_ERROR_LIMIT = 0.006
"""Mean absolute error above which the published codec leaves a tensor raw."""

FALLBACKS = {
    "constant": "all its weights are equal",
    "range": "its weights leave float32's range when squared, or that of their own type when decoded",
    "integers": "all its weights are whole numbers, as in a table of indices",
    "target": "no step meets its target",
    "published": f"the published codec leaves it raw: its mean error would exceed {PUBLISHED_ERROR_LIMIT}",
}
"""Why a tensor that its header sends to coding is lossless all the same, by the `reason` stored with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision for one tensor: with its weights, everything that determines its coded bytes.

    Made at planning; encoding, validation, verification and inspection read it. A list of them is a model's plan,
    whoever made it.
    """

    codec: Literal["lattice", "paper", "planes", "raw"]
    """`planes` gives way to `raw` where that is smaller, a lossy one to these where the weights themselves cannot be
    coded (`FALLBACKS`)."""
    target_db: float | None = None
    """SQNR to reach, dB. None where there is none, and of `lattice` where the published codec's error is the target."""
    path: bool = False
    """Whether paths of the trellis are searched."""
    states_target: bool = False
    """Whether the target is stored with the tensor, its recipe alone not telling it."""
    override: Override | None = None
    """What was decided for this tensor alone. The recipe does not tell it: it is part of the key of the tensor's shard,
    and stands in the version's manifest."""
    reason: str = ""
    """Why it is not coded as the profile says; empty where it is."""
    nominal: bool = False
    """Whether the target only says the step, and no SQNR is promised: see `output.allocation`."""
    hessian: str | None = None
    """Under a nominal target, the sha256 of the packed Hessian through which errors are fed back; None where each
    weight is rounded for itself. Needed to make a tensor, not to read it: what a version stores does not say it."""

    @property
    def action(self) -> Action:
        """Whether weights are lost."""
        return "coded" if self.codec in ("lattice", "paper") else "lossless"

    @property
    def matches_published(self) -> bool:
        """Whether the target is the error that the published codec makes on the tensor."""
        return self.codec == "lattice" and self.target_db is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How tensors are coded.

    `target_db` is the SQNR (10*log10(sum w^2 / sum (w - w')^2), dB) that every coded tensor must reach, sum w^2 being
    that of its bulk where few outliers carry most of it (the rule stands in `metrics`). The published codec has none,
    it holds a mean absolute error; our own without one takes for each tensor what the published codec reaches on it,
    and 48 dB for what that leaves raw. `path` searches paths of the trellis: some 0.17 bits a weight fewer at the same
    error, for several times the encoding time on a CPU. Tensors of under `min_weights` weights stay lossless.

    With `allocation` `size`, `target_db` is that of a tensor of `REFERENCE_WEIGHTS` weights and smaller ones get more.
    Each layer's relative error reaches the output much alike, whatever the layer's size, while a dB costs bits in
    proportion to it: the least sum of relative errors sum 10^(-d_i/10) for so many bits sum n_i d_i is at
    d_i = c - 10*log10(n_i). Three quarters of that slope are taken: a tensor's share of the output's error is not quite
    independent of its size. Each tensor's target stays in `TARGET_DB_RANGE`.

    With `header`, `target_db` is the mean over the coded weights of a model: each tensor gets its `gain_db` more than
    that of the mean weight, which `of_model` finds. So a profile takes about as many bytes as with `uniform`, whatever
    the sizes of a model's layers. The gain is the full slope by size, 5 dB less for ten times the fan-in, and 14 dB
    more for depthwise and 8 for dense convolutions, whose few weights reach every position of a picture. Targets end at
    48 dB and at 12, or at the profile's own where that is lower: who asks for less gets less. Fitted on LiteMedSAM,
    held on the demo model and MiniLM-L6 (`python -m tests.harness.benchmarks budget`).

    With `output`, `target_db` is the mean of nominal targets, which say a tensor's step and promise no SQNR: what each
    gets over the mean, and the Hessian through which its errors are fed back, come from the model's `statistics` and
    stand beside the profile. Here they are unknown, and every tensor gets the mean. With `vectors`, biases, scales of
    norms and other small parameters are coded too, which no other allocation dares to: their sensitivity says how
    finely. One that no output feels stays lossless.

    `raw_buffers`: the published codec leaves buffers of BatchNorm as they are, as its method does; a variance that it
    has rounded to 0 or below makes NaN of every output.
    """

    name: str
    codec: Codec
    target_db: float | None
    path: bool = True
    min_weights: int = 1024
    summary: str = ""
    allocation: Allocation = "uniform"
    mean_gain_db: float | None = None
    """Under allocation by header, the gain of what gets just the target. None: each tensor is a model of its own, and
    gets it."""
    statistics: str | None = None
    """Under allocation by output, the key of the statistics that it is by; None before these are known."""
    raw_buffers: bool = False
    vectors: bool = True
    """Under allocation by output, whether parameters of `LEAST_VECTOR` weights and more are coded whatever their form;
    versions of before have none that are."""

    def of_model(self, headers: Iterable[Header]) -> "Profile":
        """The profile for a model of these tensors: under allocation by header, with their mean gain.

        Models that share an encoder share its shards, whatever decoder follows, only if both have the same mean. So
        that of the largest part (of the names up to the first dot, that with the most coded weights) stands for the
        whole wherever it lies within 1 dB, a sixth of a bit, of the mean of all.
        """
        if self.allocation != "header":
            return self
        parts: dict[str, tuple[int, float]] = {}
        for name, shape, dtype in headers:
            if not _uncoded(self.codec, shape, dtype, self.min_weights):
                part, count = name.split(".", 1)[0], prod(shape)
                weights, gains = parts.get(part, (0, 0.0))
                parts[part] = weights + count, gains + count * gain_db(shape)
        if not parts:
            return self
        mean = sum(gains for _, gains in parts.values()) / sum(weights for weights, _ in parts.values())
        weights, gains = max(parts.values())
        near = gains / weights
        return replace(self, mean_gain_db=round(near if abs(near - mean) <= _LIKE_ALL_DB else mean, 2))

    def decide(self, shape: tuple[int, ...], dtype: str, override: Override | None = None, name: str = "") -> Decision:
        """Decide about a tensor from its header and its override alone; `dtype` is torch's name.

        A target does not make a lossless tensor a coded one, and that a tensor is to be lossless says nothing where it
        is so anyway: such an `override` is dropped. One with a target keeps tensors lossless that only the published
        codec would take. The name counts under `raw_buffers` alone.

        Published versions are read by the same rules for ever: others need another `ENCODER_VERSION` to be told by.
        """
        if override is not None and override != "lossless" and not _uncoded("lattice", shape, dtype, self.min_weights):
            reason = f"{override:g} dB by override"
            return self._lattice(override, states_target=True, override=override, reason=reason)
        reason = _uncoded(self.codec, shape, dtype, self.min_weights)
        if reason and self.is_vector(shape, dtype, name):
            reason = ""
        if self.raw_buffers and len(shape) <= 1 and name.rsplit(".", 1)[-1] in _BATCH_NORM_BUFFERS:
            reason = reason or "a buffer of BatchNorm"
        if reason:
            return Decision(codec="raw" if self.codec == "paper" else "planes", reason=reason)
        if override is not None:
            return Decision(codec="planes", override="lossless", reason="by override")
        if self.codec == "paper":
            return Decision(codec="paper")
        if self.target_db is None:
            return self._lattice(None, states_target=True)
        if self.allocation == "output":
            return replace(self._lattice(self.target_db, states_target=False), nominal=True)
        share = self._share_db(shape)
        return self._lattice(self.target_db if share is None else share, states_target=share is not None)

    def is_vector(self, shape: tuple[int, ...], dtype: str, name: str) -> bool:
        """Whether a tensor is coded, if an output feels it, although it is small or has one dimension."""
        if self.allocation != "output" or not self.vectors or self.target_db is None or not is_float(dtype):
            return False
        if not _uncoded(self.codec, shape, dtype, self.min_weights):
            return False
        return prod(shape) >= LEAST_VECTOR and name.rsplit(".", 1)[-1] not in _BATCH_NORM_BUFFERS

    def _share_db(self, shape: tuple[int, ...]) -> float | None:
        """A tensor's target under the allocation; None where it is the profile's."""
        assert self.target_db is not None
        low, high = TARGET_DB_RANGE
        if self.allocation == "size":
            share = self.target_db - _SIZE_SLOPE_DB * log10(max(1, prod(shape)) / REFERENCE_WEIGHTS)
        elif self.allocation == "header" and self.mean_gain_db is not None:
            share = self.target_db + gain_db(shape) - self.mean_gain_db
            low = max(low, min(_FLOOR_DB, self.target_db))
        else:
            return None
        return round(min(max(low, share), high), 2)

    def _lattice(
        self, target_db: float | None, *, states_target: bool, override: Override | None = None, reason: str = ""
    ) -> Decision:
        return Decision(
            codec="lattice",
            target_db=target_db,
            path=self.path,
            states_target=states_target,
            override=override,
            reason=reason,
        )

    @classmethod
    def of_recipe(cls, name: str, recipe: Mapping[str, str | float | int | None]) -> "Profile":
        """The profile of a stored recipe; what an older one does not say was not there to be chosen."""
        target, codec = recipe.get("target_db"), recipe.get("codec", "lattice")
        allocation, mean = recipe.get("allocation"), recipe.get("mean_gain_db")
        statistics = recipe.get("statistics")
        return cls(
            name=name,
            codec="paper" if codec == "paper" else "lattice",
            target_db=None if target is None else float(target),
            path=bool(recipe.get("path", 1)),
            min_weights=int(recipe.get("min_weights") or 0),
            allocation=_ALLOCATIONS.get(str(allocation), "uniform"),
            mean_gain_db=None if mean is None else float(mean),
            statistics=None if statistics is None else str(statistics),
            raw_buffers=recipe.get("buffers") == "raw",
            vectors=bool(recipe.get("vectors", 0)),
        )

    @property
    def target_range(self) -> tuple[float, float]:
        """Targets between which tensors of every usual size go through the whole of `TARGET_DB_RANGE`."""
        low, high = TARGET_DB_RANGE
        if self.allocation == "output":
            return NOMINAL_MEAN_RANGE_DB
        if self.allocation == "size":
            small, large = (_SIZE_SLOPE_DB * log10(n / REFERENCE_WEIGHTS) for n in (self.min_weights, _LARGEST))
            return math.floor(low + small), math.ceil(high + large)
        if self.allocation == "header" and self.mean_gain_db is not None:
            least, most = (gain - self.mean_gain_db for gain in _GAIN_RANGE_DB)
            return math.floor(low - most), math.ceil(high - least)
        return low, high

    def recipe(self) -> Recipe:
        """Everything that decides the coded bytes, as plain values."""
        recipe: Recipe = {"codec": self.codec, "encoder": ENCODER_VERSION}
        recipe["target_db"] = self.target_db
        recipe |= {"path": int(self.path), "min_weights": self.min_weights}
        if self.allocation != "uniform":
            recipe["allocation"] = self.allocation
        if self.allocation == "output" and self.vectors:
            recipe["vectors"] = 1
        if self.mean_gain_db is not None:
            recipe["mean_gain_db"] = self.mean_gain_db
        if self.statistics is not None:
            recipe["statistics"] = self.statistics
        return recipe | {"buffers": "raw"} if self.raw_buffers else recipe


def gain_db(shape: tuple[int, ...]) -> float:
    """Return how many dB more a tensor gets than one of 2^20 weights and fan-in 256, under allocation by header.

    Fan-in: the product of shape[1:]. Convolutions, those of 1 x 1 too, have more than two dimensions; depthwise ones
    have one channel a filter. A tensor of one row (a position embedding) has no fan-in and is no convolution.
    """
    gain = -10 * log10(max(1, prod(shape)) / REFERENCE_WEIGHTS)
    if len(shape) < 2 or shape[0] == 1 or not prod(shape):
        return gain
    gain -= 5 * log10(prod(shape[1:]) / _FAN_IN)
    if len(shape) > 2:
        gain += _DEPTHWISE_DB if shape[1] == 1 else _CONVOLUTION_DB
    return gain


def _uncoded(codec: Codec, shape: tuple[int, ...], dtype: str, min_weights: int) -> str:
    """Why a codec is not for a tensor of this header; empty where it is."""
    count = prod(shape)
    if not is_float(dtype):
        kind = "quantised already" if dtype.startswith("float8") else "not a float type"
        return f"{dtype} is {kind}"
    if codec == "paper":
        return "" if count >= 10 else "fewer than 10 weights"
    if len(shape) < 2:
        return "one-dimensional"
    return "" if count >= min_weights else f"fewer than {min_weights} weights"


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="small", codec="lattice", target_db=27.0, allocation="header", summary="smallest; 27 dB on average"
        ),
        Profile(
            name="balanced",
            codec="lattice",
            target_db=30.0,
            allocation="header",
            summary="the default; 30 dB on average",
        ),
        Profile(
            name="fine", codec="lattice", target_db=36.0, allocation="header", summary="near lossless; 36 dB on average"
        ),
        Profile(
            name="fast",
            codec="lattice",
            target_db=30.0,
            path=False,
            allocation="header",
            summary="30 dB on average, encoded fastest",
        ),
        Profile(name="match-paper", codec="lattice", target_db=None, summary="our codec at the published one's error"),
        Profile(
            name="paper",
            codec="paper",
            target_db=None,
            path=False,
            raw_buffers=True,
            summary="the published codec, for comparison",
        ),
    )
}

DEFAULT_PROFILE = "balanced"
