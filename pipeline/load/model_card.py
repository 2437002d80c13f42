"""The model card of a folder for transformers: README.md with the metadata that the Hugging Face Hub reads.

Templates are Jinja's; `facts` has what they may use. Licence, tags and task come from the source's own card if the
version carries one. A label `licence` overrides that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.families import TRANSFORMERS
from birkhoff.pipeline.registry.documents import Agreement, VersionManifest
from birkhoff.pipeline.registry.labels import licence_of
from birkhoff.pipeline.text import printable, size

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_LICENCE = ("license", "license_name", "license_link")
"""Keys of a card's metadata that state its licence."""

_MASKS = "mask-generation"
"""The hub's task for the Segment Anything family."""


def model_card(facts: Mapping[str, object], template: Path | None = None) -> str:
    """Return the text of a card. `card_facts` makes `facts`.

    Raises:
        OutputError: The template cannot be read, or uses a name that does not exist.
    """
    path = template or _TEMPLATE
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True, autoescape=False
    )
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(facts)
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: the card's template cannot be read ({error}); correct --card") from None
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        known = ", ".join(sorted(facts))
        raise OutputError(f"{path}{line}: {printable(str(error))}; a card may use: {known}") from None


def card_facts(
    manifest: VersionManifest,
    *,
    version: str | None,
    architecture: str,
    settings: Mapping[str, Any],
    source_card: bytes | None,
    labels: Mapping[str, str],
) -> dict[str, object]:
    """Return what a template may use, each a text or a number. `metadata` is what the hub reads.

    Args:
        manifest: The version's manifest.
        version: Its name; None if it has none.
        architecture: transformers' class of the model.
        settings: Its configuration.
        source_card: README.md of the source's repository, if the version carries it.
        labels: The version's labels.
    """
    source, figures = manifest.source, manifest.figures()
    theirs = card_metadata(source_card)
    metadata = _metadata(manifest, settings, theirs, labels)
    coded = sum(len(shard.sqnr_db) for shard in manifest.shards)
    return {
        "metadata": metadata,
        "metadata_yaml": yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        "model": manifest.model,
        "version": f"{manifest.model}@{version or manifest.digest[:12]}",
        "digest": manifest.digest,
        "code": manifest.code,
        "profile": _code(manifest.profile),
        "base_model": metadata.get("base_model"),
        "origin": [_code(url) for url in source.origin or ()],
        "source_file": _code(source.file),
        "source_sha256": source.sha256,
        "source_bytes": source.bytes,
        "source_size": size(source.bytes),
        "stored_bytes": manifest.stored_bytes,
        "stored_size": size(manifest.stored_bytes),
        "ratio": f"{manifest.ratio:.2f}",
        "tensors": sum(shard.tensors for shard in manifest.shards),
        "coded": coded,
        "sqnr_min": figures["sqnr_db_min"],
        "sqnr_median": figures["sqnr_db_median"],
        "licence": _code(str(metadata.get("license_name") or metadata.get("license") or "")),
        "proof": _proof(manifest),
        "architecture": architecture,
        "labels": dict(labels),
        "source_card": (source_card or b"").decode(errors="replace"),
    }


def card_metadata(card: bytes | None) -> dict[str, Any]:
    """Return the metadata at the head of a card, which is YAML between lines of three dashes; empty without any."""
    text = (card or b"").decode(errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    try:
        found = yaml.safe_load(text[4 : text.index("\n---", 3)])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(key, str)} if isinstance(found, dict) else {}


def _metadata(
    manifest: VersionManifest, settings: Mapping[str, Any], theirs: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {key: theirs[key] for key in _LICENCE if isinstance(theirs.get(key), str)}
    said = licence_of(labels)
    if said is not None:
        metadata = {"license": said.lower()}
    metadata["library_name"] = "transformers"
    task = theirs.get("pipeline_tag") or (_MASKS if settings.get("model_type") in TRANSFORMERS else None)
    if isinstance(task, str):
        metadata["pipeline_tag"] = task
    if manifest.source.origin:
        metadata["base_model"] = "/".join(manifest.source.origin[0].removeprefix("hf://").split("/")[:2]).split("@")[0]
        metadata["base_model_relation"] = "quantized"
    metadata["tags"] = ["birkhoff", "compressed", "hyper-compression"]
    return metadata


def _proof(manifest: VersionManifest) -> list[dict[str, object]]:
    if manifest.proof is None:
        return []
    proof, int8 = manifest.proof, manifest.proof.int8
    sets = [("synthetic pictures", proof.measured), ("own pictures", proof.own)]
    if int8 is not None:
        sets += [("synthetic pictures, on int8", int8.measured), ("own pictures, on int8", int8.own)]
    return [_row(name, found) for name, found in sets if found is not None]


def _row(name: str, found: Agreement) -> dict[str, object]:
    facts = {key: "" if value is None else value for key, value in found.model_dump().items()}
    return {"name": name, **facts}


def _code(text: str) -> str:
    """Return untrusted text for a code span or a cell of a table."""
    return printable(text).replace("`", "'").replace("|", "/")
