"""The manifest keys about proofs, for all models or for one.

    proof: true                  # publish nothing without a proof; default: make one if possible
    floor_agreement: 0.9         # the least mean IoU with the original's masks; default 0.75
    floor_output_db: 15          # for models without masks, the least SQNR of their outputs; default 10
    pictures: scans/             # the user's own pictures, measured beside the synthetic ones
    compute: int8                # prove the version on int8 tensor cores too, and say which layers stay in float

`proof: false` publishes without a proof. A model's keys override the manifest's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from birkhoff.pipeline.plan.quality import Strict, wrong
from birkhoff.pipeline.registry.documents import BudgetRecord, ProofRecord

FLOOR_AGREEMENT = 0.75
"""LiteMedSAM's agreement on the proof's pictures, with weights rounded to the steps of these targets: bfloat16
0.984, `balanced` 0.917, 24 dB 0.813, 30 dB in every tensor 0.713 (0.67 to 0.73 on real pictures), 20 dB 0.686.
The demo: `balanced` 0.955, the published codec 0.863."""
FLOOR_OUTPUT_DB = 10.0
"""Allows an error of a tenth of the outputs' energy."""


class Proving(Strict):
    """The keys about proofs that a manifest shares with its models."""

    proof: bool | None = None
    """`true`: publish nothing without a proof; `false`: make none. Default: make one if possible."""
    floor_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least mean IoU of masks with the original's; a model below it is not published. Default: 0.75."""
    floor_output_db: float | None = None
    """The least SQNR of outputs, for models without masks, dB. Default: 10."""
    pictures: str | None = None
    """Folder of your own pictures, relative to the manifest."""
    compute: Literal["int8"] | None = None
    """`int8`: measure the masks on int8 tensor cores too, layer by layer, for `load_into(compute="proven")`."""

    @model_validator(mode="after")
    def _proof_is_made(self) -> "Proving":
        if self.proof is False:
            for key in ("floor_agreement", "floor_output_db", "pictures", "compute"):
                if getattr(self, key) is not None:
                    raise wrong(key, "goes with a proof, and `proof: false` makes none; keep one of them")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofTerms:
    """The terms that a model's proof must meet, if one is made."""

    wanted: bool = True
    required: bool = False
    floor_agreement: float = FLOOR_AGREEMENT
    floor_output_db: float = FLOOR_OUTPUT_DB
    pictures: str | None = None
    compute: Literal["int8"] | None = None

    def met_by(self, record: ProofRecord | None) -> bool:
        """Return whether a version with this proof could be published now."""
        if not self.wanted:
            return True
        if record is None:
            return not self.required
        measured = (self.pictures is None or record.own is not None) and (
            self.compute is None or record.int8 is not None
        )
        return measured and self.complaint(record) is None

    def complaint(self, record: ProofRecord) -> str | None:
        """Return what falls below its floor, by name and figure; None if nothing does."""
        said = self._below("", record.figures)
        return said if said is not None or record.int8 is None else self._below(" on int8", record.int8.figures)

    def _below(self, how: str, found: Mapping[str, float | None]) -> str | None:
        agreement, output = found["agreement_mean"], found["output_db"]
        if agreement is not None:
            if agreement < self.floor_agreement:
                return (
                    f"mean agreement of its masks{how} with the original's is {agreement:g}, floor_agreement is "
                    f"{self.floor_agreement:g}"
                )
            return None
        if output is not None and output < self.floor_output_db:
            return f"SQNR of its outputs{how} is {output:g} dB, floor_output_db is {self.floor_output_db:g}"
        return None


def proof_terms(whole: Proving, model: Proving, budget: BudgetRecord | None) -> ProofTerms:
    """Return a model's terms, from its keys and the manifest's.

    A target for the outputs that is below the default floor replaces the floor.
    """

    def said(key: str) -> object:
        own = getattr(model, key)
        return getattr(whole, key) if own is None else own

    given = {key: said(key) for key in ("floor_agreement", "floor_output_db", "pictures", "compute")}
    if budget is not None and budget.by_output:
        low = {"floor_agreement": FLOOR_AGREEMENT, "floor_output_db": FLOOR_OUTPUT_DB}
        wanted = {"floor_agreement": budget.target_agreement, "floor_output_db": budget.target_output_db}
        for key, target in wanted.items():
            if given[key] is None and target is not None:
                given[key] = min(low[key], target)
    proof = said("proof")
    return ProofTerms(
        wanted=proof is not False,
        required=proof is True or (budget is not None and budget.by_output),
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
