"""Profiles: the decision for a tensor, from its header alone.

A profile is a codec and a target. Its resolved form (`Profile.recipe`) is part of every shard's key, so another recipe
makes other shards. Its result for one tensor is a `Decision`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10, prod
from typing import Literal, NamedTuple

from birkhoff.codec.dtype_names import is_float

Codec = Literal["lattice", "paper"]
Action = Literal["coded", "lossless"]
Allocation = Literal["uniform", "size", "header", "scale", "output"]
"""How a profile's target is divided among a model's tensors, see `Profile`."""

_ALLOCATIONS: dict[str, Allocation] = {
    "size": "size",
    "header": "header",
    "scale": "scale",
    "output": "output",
}
"""Allocations by the name in a recipe. A recipe leaves out `uniform`."""

Override = float | Literal["lossless"]
"""The user's choice for a single tensor: a target in dB, or to keep it lossless."""

Recipe = dict[str, str | float | int | None]
"""A profile resolved to plain values, as manifests and shard keys hold it."""


class Header(NamedTuple):
    """What is known about a tensor before its weights are read. `dtype` is torch's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


TARGET_DB_RANGE = (6.0, 48.0)
"""Targets that the trajectory can serve. Below them tensors become zeros; above them most pairs would be escapes."""

FIXED_POINT_DB = 44.0
"""Nominal target from which a weight is 16 bits of fixed point, which reach about 80 times the root mean square at 60
dB, and 20 times at 72. Nodes of pairs would take 0.2 bits per weight more there, and 2 more at 48 dB, because escapes
take 40 bits."""

FINEST_DB = 63.0
"""Highest target of all. Above those of the trajectory a weight is 16 bits of fixed point, which reach about 60 times
the root mean square here; rarer weights take more bits."""

NOMINAL_MEAN_RANGE_DB = (3.0, 60.0)
"""Range of the mean of nominal targets for a budget. Below it a model of 1.5 bits per weight carries no information."""

REFERENCE_WEIGHTS = 1 << 20
"""Size of the tensor that gets exactly the profile's target under allocation by size."""

_LARGEST = 1 << 26
"""Number of weights of a large tensor."""

_SIZE_SLOPE_DB = 7.5
"""Extra dB for a tensor with a tenth of the weights, see `Profile`. The best of 0, 5, 7.5 and 10 on the demo model,
by its masks at equal bytes."""

_FLOOR_DB = 12.0
"""Least target under allocation by header, unless the profile's target is lower: below it, tensors become zeros."""

BUDGET_FLOOR_DB = 15.0
"""The least target that a budget may give a coded tensor, which `floor_db` of a manifest overrides, and the least under
allocation by scale.

At 15 dB, 3 % of the weights' energy is lost, which is about where a tensor is ten times smaller than float32. At 9 dB
an eighth is lost.
"""

MATRIX_DB = 45.0
"""Highest target of matrices under allocation by scale. Above it escapes cost two bits more, and in fixed point no
HyperLinear could be made of them."""

_FIXED_DB = 48.01
"""Lowest target in fixed point. It takes fewer bits than the trajectory does from `MATRIX_DB` to the end of its
targets."""

_FARTHEST_DB = 64.0
_HALVINGS = 30
"""Where a model's mean gain is searched beyond those of its tensors, and how often that is halved."""

_SCALE_STEP_DB = 2.0
"""Steps of a model's mean gain under allocation by scale."""

_DEPTHWISE_DB = 14.0
_CONVOLUTION_DB = 8.0
_FAN_IN = 256
_GAIN_RANGE_DB = (-26.0, 52.0)
"""Gains of extreme tensors: [8192, 8192], and a depthwise convolution of 1024 weights."""

_LIKE_ALL_DB = 1.0
"""Largest difference in dB at which the mean gain of a model's largest part replaces the mean of all, see
`Profile.of_model`."""

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

LEAST_VECTOR = 64
"""Size in weights from which small parameters are coded under allocation by output. On fewer weights a code table
costs more than it saves."""

ENCODER_VERSION = 7
"""Raised when the encoder writes other bytes for the same tensor and profile, so that old shards are not reused.

2: A tensor that falls back to lossless stores the reason.
3: Targets hold for the bulk of the weights if few outliers carry most of the energy.
4: A frame is coded without a search for repeats if that is smaller.
5: Format 2; up to 1 / 40 of a path's pairs may be escapes in memory.
6: On a CPU, errors are summed in float64 in an order of their own; before, steps depended on torch's threads and
   vectors. Under nominal targets of 44 dB and more, fixed point has feedback, also for matrices.
7: Under nominal targets, errors are fed back between the rows of a matrix too.
"""

PUBLISHED_ERROR_LIMIT = 0.006
"""Mean absolute error above which the published codec leaves a tensor raw."""

_LARGEST_INTEGER = 1 << 24
"""From here on, float32 holds only whole numbers."""

FALLBACKS = {
    "constant": "all its weights are equal",
    "range": "its weights leave float32's range when squared, or that of their own type when decoded",
    "integers": "all its weights are whole numbers, as in a table of indices",
    "target": "no step meets its target in fewer bytes",
    "published": f"the published codec leaves it raw: its mean error would exceed {PUBLISHED_ERROR_LIMIT}",
}
"""Reasons why a codable tensor was stored lossless, by the `reason` stored with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision for one tensor. Together with its weights it determines the coded bytes.

    A model's plan is the list of its decisions. Encoding, validation, verification and inspection use it.
    """

    codec: Literal["lattice", "paper", "planes", "raw"]
    """`planes` is replaced by `raw` if that is smaller. A lossy codec is replaced by these if the weights cannot be
    coded (`FALLBACKS`)."""
    target_db: float | None = None
    """SQNR to reach in dB. None without a target, and for `lattice` if the target is the published codec's error."""
    path: bool = False
    """Whether trellis paths are searched."""
    states_target: bool = False
    """Whether the target is stored with the tensor, because its recipe alone does not determine it."""
    override: Override | None = None
    """The user's choice for this tensor. It is part of the key of the tensor's shard and of the version's manifest,
    because the recipe does not contain it."""
    reason: str = ""
    """Why the tensor is not coded as the profile says, or empty."""
    nominal: bool = False
    """Whether the target only determines the step, and no SQNR is promised, see `output.allocation`."""
    hessian: str | None = None
    """With a nominal target, the SHA-256 of the packed Hessian for error feedback; None if each weight is rounded on
    its own. Only the encoder needs it, so versions do not store it."""

    @property
    def action(self) -> Action:
        """Whether the tensor is lossy."""
        return "coded" if self.codec in ("lattice", "paper") else "lossless"

    @property
    def searches(self) -> bool:
        """Whether the encoder's work grows faster than the weights: it follows the published codec's search, or feeds
        errors back. All else takes a processor less time than a GPU's fixed costs."""
        return self.codec == "paper" or self.matches_published or self.hessian is not None

    @property
    def matches_published(self) -> bool:
        """Whether the target is the error of the published codec on this tensor."""
        return self.codec == "lattice" and self.target_db is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How tensors are coded.

    `target_db` is the SQNR (10*log10(sum w^2 / sum (w - w')^2), dB) that every coded tensor must reach. If few outliers
    carry most of the energy, sum w^2 counts only the bulk (see `metrics`). The published codec has no target; it bounds
    the mean absolute error. Codec `lattice` without a target takes for each tensor the SQNR of the published codec, or
    48 dB where that codec leaves it raw. `path` searches trellis paths: about 0.17 bits per weight fewer at the same
    error, for several times the encoding time on a CPU. Tensors of fewer than `min_weights` weights stay lossless.

    With `allocation` `size`, `target_db` is for a tensor of `REFERENCE_WEIGHTS` weights, and smaller ones get more. The
    relative errors of layers reach the output about equally at any size, while a dB costs bits in proportion to the
    size. The sum of relative errors sum 10^(-d_i/10) at a given number of bits sum n_i d_i is least at d_i = c -
    10*log10(n_i). Three quarters of that slope are used, because a tensor's share of the output's error does depend on
    its size a little. Each tensor's target stays in `TARGET_DB_RANGE`.

    With `header`, `target_db` is the mean over the coded weights of a model. Each tensor gets its `gain_db` minus the
    mean gain, which `of_model` computes, on top. So a profile takes about as many bytes as with `uniform`, at any sizes
    of a model's layers. The gain is the full slope by size, minus 5 dB for ten times the fan-in, plus 14 dB for
    depthwise and 8 dB for dense convolutions, whose few weights affect every position of a picture. Targets are at most
    48 dB, and at least 12 dB or the profile's own if that is lower. Fitted on LiteMedSAM, validated on the demo model
    and MiniLM-L6 (`python -m tests.harness.benchmarks budget`).

    With `scale`, it is the mean too, and a tensor's gain is by its root mean square, its size and its kind: tensors of
    one size and kind get the same step, not the same SQNR. Weight decay shrinks what training does not hold up, and
    errors add up in a residual stream as they are, not relative to their branch. The gains of a model follow from its
    weights (`scale_gains_db`), so a version stores them. Targets are at most `MATRIX_DB`, if a tensor is no matrix
    `FINEST_DB`, and at least `floor_db`, or the profile's own if that is lower. Chosen on the demo model and MiniLM-L6
    among powers of the root mean square and slopes by fan-in (`tests/harness/benchmarks/masks.md`).

    With `output`, `target_db` is the mean of nominal targets, which determine a tensor's step and promise no SQNR. Each
    tensor's gain over the mean, and the Hessian for its error feedback, come from the model's `statistics`, not from
    the profile; here every tensor gets the mean. With `vectors`, biases, scales of norms and other small parameters are
    coded too, because only their measured sensitivity can set their precision. A parameter that affects no output stays
    lossless.

    `raw_buffers`: the published codec leaves the buffers of BatchNorm raw, as its method does. A variance rounded to
    0 or below would make every output NaN.
    """

    name: str
    codec: Codec
    target_db: float | None
    path: bool = True
    min_weights: int = 1024
    summary: str = ""
    allocation: Allocation = "uniform"
    mean_gain_db: float | None = None
    """Under allocation by header, the gain of a tensor that gets exactly the target. None: each tensor gets the
    target, as if it were the whole model."""
    statistics: str | None = None
    """Under allocation by output, the key of the statistics used; None until they are known."""
    raw_buffers: bool = False
    floor_db: float = BUDGET_FLOOR_DB
    """Under allocation by scale, the least target of a tensor, unless the profile's is lower."""
    vectors: bool = True
    """Under allocation by output, whether parameters of any shape with at least `LEAST_VECTOR` weights are coded. Older
    versions do not code them."""

    def of_model(self, headers: Iterable[Header]) -> "Profile":
        """Return the profile for a model of these tensors: under allocation by header, with their mean gain.

        Models with the same encoder but other decoders share its shards only if both have the same mean. So the
        mean of the largest part (the tensors with the same name up to the first dot that have the most coded weights)
        is used if it is within 1 dB, a sixth of a bit, of the mean of all.
        """
        if self.allocation != "header":
            return self
        coded = (one for one in headers if not _uncoded(self.codec, one.shape, one.dtype, self.min_weights))
        mean = _mean_gain_db((name, prod(shape), gain_db(shape)) for name, shape, _ in coded)
        return self if mean is None else replace(self, mean_gain_db=mean)

    def decide(self, shape: tuple[int, ...], dtype: str, override: Override | None = None, name: str = "") -> Decision:
        """Decide about a tensor from its header and its override. `dtype` is torch's name.

        An override is dropped if it has no effect: a target for a lossless tensor, or lossless for a tensor that is
        lossless anyway. With a target, tensors that only the published codec would code stay lossless. The name matters
        only under `raw_buffers`.

        Published versions are read by these rules for ever. Other rules need another `ENCODER_VERSION`.
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

    def scaled(self, decision: Decision, shape: tuple[int, ...], gain_db: float) -> Decision:
        """Return the decision for a tensor with its gain under allocation by scale. Lossless tensors and those with an
        override keep theirs."""
        if decision.action == "lossless" or decision.override is not None or self.target_db is None:
            return decision
        share = round(self.scaled_db(shape, gain_db), 2)
        if MATRIX_DB < share < _FIXED_DB:
            share = _FIXED_DB
        return replace(decision, target_db=share, states_target=True)

    def scaled_db(self, shape: tuple[int, ...], gain_db: float) -> float:
        """Return the target of a tensor with this gain under allocation by scale, within its limits."""
        assert self.target_db is not None
        low, high = self.scale_limits(shape)
        return max(low, min(self.target_db + gain_db, high))

    def scale_limits(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return the least and the greatest target of a tensor under allocation by scale."""
        assert self.target_db is not None
        return max(TARGET_DB_RANGE[0], min(self.floor_db, self.target_db)), MATRIX_DB if len(shape) == 2 else FINEST_DB

    def is_vector(self, shape: tuple[int, ...], dtype: str, name: str) -> bool:
        """Return whether a tensor is coded, if it affects an output, although it is small or has one dimension."""
        if self.allocation != "output" or not self.vectors or self.target_db is None or not is_float(dtype):
            return False
        if not _uncoded(self.codec, shape, dtype, self.min_weights):
            return False
        return prod(shape) >= LEAST_VECTOR and name.rsplit(".", 1)[-1] not in _BATCH_NORM_BUFFERS

    def _share_db(self, shape: tuple[int, ...]) -> float | None:
        """Return a tensor's target under the allocation; None if it is the profile's."""
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
        """Return the profile of a stored recipe. Keys that an older recipe lacks take the values of that time."""
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
            floor_db=float(recipe.get("floor_db") or BUDGET_FLOOR_DB),
            vectors=bool(recipe.get("vectors", 0)),
        )

    @property
    def target_range(self) -> tuple[float, float]:
        """The range of targets over which tensors of usual sizes cover `TARGET_DB_RANGE`."""
        low, high = TARGET_DB_RANGE
        if self.allocation == "output":
            return NOMINAL_MEAN_RANGE_DB
        if self.allocation == "size":
            small, large = (_SIZE_SLOPE_DB * log10(n / REFERENCE_WEIGHTS) for n in (self.min_weights, _LARGEST))
            return math.floor(low + small), math.ceil(high + large)
        if self.allocation == "scale":
            return math.floor(low - _GAIN_RANGE_DB[1]), math.ceil(high - _GAIN_RANGE_DB[0])
        if self.allocation == "header" and self.mean_gain_db is not None:
            least, most = (gain - self.mean_gain_db for gain in _GAIN_RANGE_DB)
            return math.floor(low - most), math.ceil(high - least)
        return low, high

    def recipe(self) -> Recipe:
        """Return everything that determines the coded bytes, as plain values."""
        recipe: Recipe = {"codec": self.codec, "encoder": ENCODER_VERSION}
        recipe["target_db"] = self.target_db
        recipe |= {"path": int(self.path), "min_weights": self.min_weights}
        if self.allocation != "uniform":
            recipe["allocation"] = self.allocation
        if self.allocation == "output" and self.vectors:
            recipe["vectors"] = 1
        if self.allocation == "scale" and self.floor_db != BUDGET_FLOOR_DB:
            recipe["floor_db"] = self.floor_db
        if self.mean_gain_db is not None:
            recipe["mean_gain_db"] = self.mean_gain_db
        if self.statistics is not None:
            recipe["statistics"] = self.statistics
        return recipe | {"buffers": "raw"} if self.raw_buffers else recipe


def gain_db(shape: tuple[int, ...]) -> float:
    """Return how many dB more a tensor gets than one of 2^20 weights and fan-in 256, under allocation by header.

    The fan-in is the product of shape[1:]. Convolutions have more than two dimensions, also those of 1 x 1; depthwise
    ones have one channel per filter. A tensor of one row (a position embedding) has no fan-in and is not a convolution.
    """
    gain = -10 * log10(max(1, prod(shape)) / REFERENCE_WEIGHTS)
    if len(shape) < 2 or shape[0] == 1 or not prod(shape):
        return gain
    return gain - 5 * log10(prod(shape[1:]) / _FAN_IN) + _kind_db(shape)


def _kind_db(shape: tuple[int, ...]) -> float:
    """Return the gain of a kind of layer in dB: of convolutions, by the axes of a tensor of several rows."""
    if len(shape) <= 2 or shape[0] == 1:
        return 0.0
    return _DEPTHWISE_DB if shape[1] == 1 else _CONVOLUTION_DB


def scale_gains_db(tensors: Mapping[str, tuple[tuple[int, ...], float]], profile: Profile) -> dict[str, float]:
    """Return by how many dB each tensor's target exceeds a model's under allocation by scale, rounded to 0.01 dB.

    The mean target over all weights, within the limits, is the profile's, or as close to it as under allocation by
    header and as a step of 2 dB allows: else one changed tensor would move the targets of all others, and no shard of
    an earlier version could be used again. A root mean square of 0 is that of weights that no target moves. Their gain
    is 0, and they do not count.

    Worked example: matrices [256, 256] of rms 0.1 and 0.01. The gain of their size is 10 log10(2^20 / 2^16) = 12.04 dB
    for both, their root mean squares add -20 and -40 dB. The mean is -17.96, in steps -18, so they get 10.04 and -9.96
    dB, and the same step.

    Args:
        tensors: Shape and root mean square of the bulk (see `metrics`) of each coded tensor, by name.
        profile: With a target.
    """
    gains = {
        name: 10 * log10(REFERENCE_WEIGHTS / prod(shape)) + _kind_db(shape) + 20 * log10(rms)
        for name, (shape, rms) in tensors.items()
        if rms > 0
    }
    parts: dict[str, list[str]] = {}
    for name in gains:
        parts.setdefault(name.split(".", 1)[0], []).append(name)

    def mean_of(names: Iterable[str]) -> float:
        return _mean_scale_db([(tensors[name][0], gains[name]) for name in names], profile)

    mean = 0.0
    if parts:
        largest = max(parts.values(), key=lambda names: (sum(prod(tensors[name][0]) for name in names), names))
        near, mean = mean_of(largest), mean_of(gains)
        mean = _SCALE_STEP_DB * round((near if abs(near - mean) <= _LIKE_ALL_DB else mean) / _SCALE_STEP_DB)
    return {name: round(gains[name] - mean, 2) if name in gains else 0.0 for name in tensors}


def _mean_scale_db(tensors: Sequence[tuple[tuple[int, ...], float]], profile: Profile) -> float:
    """Return the gain of a tensor that gets the profile's target if the mean of all is to be that, from shapes and
    gains."""
    import numpy as np  # planning alone needs it, not whoever reads a recipe

    assert profile.target_db is not None
    gains = np.array([gain for _, gain in tensors])
    weights = np.array([prod(shape) for shape, _ in tensors])
    lowest, highest = np.array([profile.scale_limits(shape) for shape, _ in tensors]).T
    low, high = float(gains.min()) - _FARTHEST_DB, float(gains.max()) + _FARTHEST_DB
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        targets = (profile.target_db + (gains - middle)).clip(lowest, highest)
        low, high = (middle, high) if targets @ weights > profile.target_db * weights.sum() else (low, middle)
    return (low + high) / 2


def _mean_gain_db(tensors: Iterable[tuple[str, int, float]]) -> float | None:
    """Return the gain of a tensor that gets exactly the target, from (name, weights, gain in dB) of all that are coded:
    their mean, or that of their largest part if it is close. None if there are none."""
    parts: dict[str, tuple[int, float]] = {}
    for name, count, gain in tensors:
        part = name.split(".", 1)[0]
        weights, gains = parts.get(part, (0, 0.0))
        parts[part] = weights + count, gains + count * gain
    if not parts:
        return None
    mean = sum(gains for _, gains in parts.values()) / sum(weights for weights, _ in parts.values())
    weights, gains = max(parts.values())
    near = gains / weights
    return round(near if abs(near - mean) <= _LIKE_ALL_DB else mean, 2)


def unfit(low: float, high: float, whole: Callable[[], bool]) -> str | None:
    """Return why weights in a range that should be coded cannot be: a key of `FALLBACKS`. Return None if they can.

    `whole` says whether all weights are whole numbers.
    """
    if low == high:
        return "constant"
    if not 2.0**-60 < max(-low, high) < 2.0**60:
        return "range"
    return "integers" if max(-low, high) <= _LARGEST_INTEGER and whole() else None


def _uncoded(codec: Codec, shape: tuple[int, ...], dtype: str, min_weights: int) -> str:
    """Return why a codec does not code a tensor of this header, or "" if it does."""
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
            name="small", codec="lattice", target_db=27.0, allocation="scale", summary="smallest; 27 dB on average"
        ),
        Profile(
            name="balanced",
            codec="lattice",
            target_db=30.0,
            allocation="scale",
            summary="the default; 30 dB on average",
        ),
        Profile(
            name="fine", codec="lattice", target_db=36.0, allocation="scale", summary="near lossless; 36 dB on average"
        ),
        Profile(
            name="fast",
            codec="lattice",
            target_db=30.0,
            path=False,
            allocation="scale",
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
