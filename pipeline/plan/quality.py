"""The manifest keys about fidelity, for all models or for one: a profile or a budget, and overrides.

    target_ratio: 7              # a budget: the best quality in a seventh of the source's bytes
    max_bytes: 64MiB             # or in this many bytes, every byte of the version counted
    target_agreement: 0.97       # or the fewest bytes whose masks have this mean IoU with the original's
    target_output_db: 30         # or whose outputs (mask logits) have this SQNR
    allocation: uniform          # one dB for every tensor; `size`, `header`, `scale` (the default), `output`: `Profile`
    floor_db: 12                 # the least target that a budget may give a coded tensor; default 15
    profile: fast                # how to encode; any other profile sets a quality and excludes a budget
    overrides:                   # single tensors by glob; the last matching rule applies, a model's rules come last
      - {tensors: "mask_decoder.*", target_db: 36}
      - {tensors: "*.pos_embed", lossless: true}

A profile or budget of a model replaces the manifest's. An allocation alone is combined with the manifest's profile or
budget. 1-D and tiny tensors stay lossless whatever dB a rule says; only `allocation: output` codes them.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from birkhoff.codec.profiles import DEFAULT_PROFILE, PROFILES, TARGET_DB_RANGE, Allocation, Override, Profile
from birkhoff.pipeline.registry.documents import BudgetRecord
from birkhoff.pipeline.text import suggestion

BUDGETS = ("target_ratio", "max_bytes", "target_agreement", "target_output_db")
"""The keys of budgets, whose target is searched. At most one may be set."""


def check_profile(name: str) -> str:
    """Return the name of a known profile. Raises ValueError."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile{suggestion(name, PROFILES)}; known: {', '.join(PROFILES)}")
    return name


def wrong(key: str, message: str) -> PydanticCustomError:
    """Return an error about one key of a mapping. `manifest` adds the key's line number."""
    # In the context instead of the text, because pydantic interprets braces in the text.
    return PydanticCustomError("key", "{message}", {"key": key, "message": message})


def no_target(key: str, profile: Profile) -> PydanticCustomError:
    """Return the error for an allocation of a profile without a target."""
    return wrong(key, f"shares a target in dB, and profile {profile.name!r} has none; leave it out")


def no_floor(key: str) -> PydanticCustomError:
    """Return the error for a floor under an allocation that promises no target to single tensors."""
    return wrong(
        key,
        "is for allocations with a target for each tensor, and `allocation: output` has none: set `floor_agreement`, "
        "or leave it out",
    )


class Strict(BaseModel):
    """A part of a manifest: unknown keys and wrong types are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True)


class OverrideRule(Strict):
    """A rule for some tensors that overrides profile and budget."""

    tensors: Annotated[str, Field(min_length=1)]
    """Shell glob on tensor names: `*`, `?`, `[abc]`; `*` matches dots too."""
    target_db: Annotated[float, Field(ge=TARGET_DB_RANGE[0], le=TARGET_DB_RANGE[1])] | None = None
    """The least SQNR of matching tensors that are coded, dB."""
    lossless: Literal[True] | None = None
    """Keep matching tensors bit for bit."""
    _place: str = PrivateAttr(default="overrides")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.target_db is None) == (self.lossless is None):
            raise wrong("tensors", "an override says one of `target_db: DB` and `lossless: true`")
        return self

    @property
    def place(self) -> str:
        """File, line and key, for messages."""
        return self._place

    def at(self, place: str) -> "OverrideRule":
        """Return the rule with its place in the file."""
        placed = self.model_copy()
        placed._place = place
        return placed

    @property
    def override(self) -> Override:
        """The override of each matching tensor."""
        return "lossless" if self.target_db is None else self.target_db


class Quality(Strict):
    """The keys about fidelity that a manifest shares with its models."""

    profile: str | None = None
    """Name of a profile. Default: `balanced`."""
    target_ratio: Annotated[float, Field(gt=1, le=1e6, allow_inf_nan=False)] | None = None
    """Budget: the least ratio of source bytes to stored bytes."""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Budget: the most stored bytes; a number or a size such as `64MiB`."""
    target_agreement: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The least mean IoU of masks with the original's. The smallest version that reaches it is published."""
    target_output_db: Annotated[float, Field(ge=0, le=100)] | None = None
    """The least SQNR of mask logits, or of another model's outputs, dB. The smallest version that reaches it is
    published."""
    allocation: Allocation | None = None
    """How the target of a profile or a budget is allocated to tensors. Default: `scale`."""
    floor_db: Annotated[float, Field(ge=TARGET_DB_RANGE[0], le=TARGET_DB_RANGE[1])] | None = None
    """The least target that a budget may give a coded tensor, dB. Default: 15."""
    overrides: Annotated[tuple[OverrideRule, ...], Field(strict=False)] = ()
    """Rules for single tensors; the last one that matches applies."""

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, name: str | None) -> str | None:
        return None if name is None else check_profile(name)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        said = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(said) > 1:
            raise wrong(said[1], f"`{said[0]}` and `{said[1]}` are two budgets; keep one of them")
        if self.budget is None and self.floor_db is not None:
            raise wrong(
                "floor_db",
                "goes with a budget: give " + " or ".join(f"`{key}`" for key in BUDGETS) + ", or leave it out",
            )
        if self.profile is not None and PROFILES[self.profile].target_db is None and self.allocation is not None:
            raise no_target("allocation", PROFILES[self.profile])
        if self.budget is not None and self.profile is not None and not is_method(PROFILES[self.profile]):
            raise wrong(
                "profile",
                f"{self.profile!r} ({PROFILES[self.profile].summary}) and a budget are two qualities; keep one of "
                "them, or say `fast`, which only says how to encode",
            )
        return self

    @property
    def budget(self) -> BudgetRecord | None:
        """The budget; None without one."""
        if all(getattr(self, key) is None for key in BUDGETS):
            return None
        return BudgetRecord(
            target_ratio=self.target_ratio,
            max_bytes=None if self.max_bytes is None else int(self.max_bytes),
            target_agreement=self.target_agreement,
            target_output_db=self.target_output_db,
            floor_db=self.floor_db,
        )

    @property
    def decides(self) -> bool:
        """Whether a profile or a budget is set."""
        return self.profile is not None or self.budget is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """The fidelity of one model: a profile, a budget that its target must be found for, and rules for single
    tensors."""

    profile: Profile
    budget: BudgetRecord | None
    rules: tuple[OverrideRule, ...]


def is_method(profile: Profile) -> bool:
    """Return whether a profile differs from the default only in how it encodes, not in the result."""
    default = PROFILES[DEFAULT_PROFILE]
    return profile != default and replace(profile, name=default.name, path=True, summary=default.summary) == default


def resolve(whole: Quality, model: Quality) -> Fidelity:
    """Return a model's fidelity, from its keys and the manifest's."""
    words = model if model.decides else whole
    profile, budget = PROFILES[words.profile or DEFAULT_PROFILE], words.budget
    allocation = model.allocation or words.allocation
    if allocation is not None:
        profile = replace(profile, allocation=allocation)
    if budget is not None:
        profile = replace(profile, name=budget.label, floor_db=budget.least_db)
    return Fidelity(profile=profile, budget=budget, rules=(*whole.overrides, *model.overrides))
