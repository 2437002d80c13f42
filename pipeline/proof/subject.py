"""Decide from headers alone how a planned model is run, for its proof and for its statistics."""

from dataclasses import dataclass

from birkhoff.pipeline.errors import BuilderError, ProofError
from birkhoff.pipeline.families import CONFIG_FILE, TRANSFORMERS
from birkhoff.pipeline.load.architectures import is_known
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.plan.sidecars import config_beside, settings_in, settings_of
from birkhoff.pipeline.proof.task import Subject

NOT_RUN = "no adapter runs such a model; name its `adapter`, or the `builder` and `inputs` that run it"
"""Why a model cannot be run, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """How a planned model is run for its proof and for its statistics; None if it is not run."""

    proof: Subject | None = None
    statistics: Subject | None = None
    unproven: str | None = None
    """Why there will be no proof, although the manifest asks for one."""


def subjects_of(planned: Planned) -> Subjects:
    """Return how a model is run for its proof and its statistics. `plan` and `compress` both check a model here.

    Raises:
        ProofError: A proof is required, but the model cannot be run.
        BuilderError: The allocation needs statistics, but the model cannot be run.
    """
    found = run_as(planned)
    if found is None and planned.proof.required:
        raise ProofError(f"a proof is required, and {NOT_RUN}")
    if found is None and planned.takes_statistics:
        raise BuilderError(f"`allocation: output` needs a model that runs, and {NOT_RUN}")
    return Subjects(
        proof=found if planned.proof.wanted else None,
        statistics=found if planned.takes_statistics else None,
        unproven=NOT_RUN if found is None and planned.proof.wanted else None,
    )


def run_as(planned: Planned) -> Subject | None:
    """Return how a model is run, or None if neither its tensors nor the manifest tell."""
    entry, terms = planned.entry, planned.proof
    config = _config(planned)
    shapes = {tensor.name: tensor.shape for tensor in planned.checkpoint.tensors}
    named = entry.adapter is not None or entry.builder is not None or entry.inputs is not None
    runs = is_known(shapes) if config is None else config[1].get("model_type") in TRANSFORMERS
    if not (named or runs):
        return None
    return Subject(
        adapter=entry.adapter,
        builder=entry.builder,
        upstream=entry.upstream,
        config=config,
        inputs=entry.inputs,
        metric=entry.metric,
        pictures=terms.pictures,
        required=terms.required,
        int8=terms.compute == "int8",
    )


def _config(planned: Planned) -> tuple[str, dict[str, object]] | None:
    """Return the transformers configuration among the model's files or beside its weights."""
    for file in planned.files:
        if file.record.name == CONFIG_FILE and (settings := settings_in(file.body)) is not None:
            return f"{CONFIG_FILE} of {planned.entry.name}", settings
    path = config_beside(planned.checkpoint.path)
    settings = None if path is None else settings_of(path)
    return None if settings is None else (str(path), settings)
