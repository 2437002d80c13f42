"""A version's proof in words."""

from birkhoff.pipeline.registry.documents import Agreement, VersionManifest


def proven(manifest: VersionManifest) -> str:
    """Return the proof as `, agreement 0.963 (5th percentile 0.700), logits 37.8 dB`, to append to other text.

    Empty if no proof was made.
    """
    if manifest.proof is None:
        return ""
    said = _said(manifest.proof.measured)
    if manifest.proof.own is not None:
        said += f"; on own pictures {_said(manifest.proof.own)}"
    if (int8 := manifest.proof.int8) is not None:
        said += f"; on int8, {int8.layers} layers and {len(int8.in_float)} in float, {_said(int8.own or int8.measured)}"
    return f", {said}"


def _said(found: Agreement) -> str:
    parts = []
    if found.agreement_mean is not None:
        parts.append(f"agreement {found.agreement_mean:.3f} (5th percentile {found.agreement_p5 or 0:.3f})")
    if found.embedding_db is not None:
        parts.append(f"embedding {found.embedding_db:.1f} dB")
    if found.output_db is not None:
        parts.append(f"{'logits' if found.prompts is not None else 'outputs'} {found.output_db:.1f} dB")
    if found.cosine is not None:
        parts.append(f"cosine {found.cosine:.4f}")
    parts += [f"{name} {value:g}" for name, value in (found.metrics or {}).items()]
    return ", ".join(parts) or "outputs without error"
