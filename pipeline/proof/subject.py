"""Decide from headers alone how a planned model is run, for its proof and its statistics."""

from birkhoff.pipeline.errors import ProofError
from birkhoff.pipeline.families import CONFIG_FILE, TRANSFORMERS
from birkhoff.pipeline.load.architectures import is_known
from birkhoff.pipeline.plan.models import Planned
from birkhoff.pipeline.plan.sidecars import config_beside, settings_in, settings_of
from birkhoff.pipeline.proof.task import Subject


def subject_of(planned: Planned) -> Subject | None:
    """Return how a model is run for its proof; None if none is wanted, or no adapter runs such a model.

    Raises:
        ProofError: a proof is required, and nothing tells how to run the model.
    """
    if not planned.proof.wanted:
        return None
    found = run_as(planned)
    if found is None and planned.proof.required:
        raise ProofError(f"a proof is required, and {NOT_RUN}")
    return found


NOT_RUN = "no adapter runs such a model; name its `adapter`, or the `builder` and `inputs` that run it"


def run_as(planned: Planned) -> Subject | None:
    """Return how a model is run; None if nothing tells."""
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
    """Return the transformers configuration that goes with the weights, or lies beside them."""
    for file in planned.files:
        if file.record.name == CONFIG_FILE and (settings := settings_in(file.body)) is not None:
            return f"{CONFIG_FILE} of {planned.entry.name}", settings
    path = config_beside(planned.checkpoint.path)
    settings = None if path is None else settings_of(path)
    return None if settings is None else (str(path), settings)
