"""The generated parts of the site: commands from the typer app, manifest keys from the models that read manifests."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.cli
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.pycode import ModuleAnalyzer

import birkhoff.pipeline.cli.main  # noqa: F401  (every command registers itself)
from birkhoff.pipeline.cli.app import app
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.plan.manifest import Manifest, ModelEntry
from birkhoff.pipeline.plan.quality import OverrideRule

_WORDS = {"str": "text", "bool": "true or false", "int": "whole number", "float": "number", "ByteSize": "size"}
"""Types as a manifest's author knows them."""


def write(folder: Path) -> None:
    """Write `cli.md` and `keys.md` into a folder; a file that would stay the same is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("cli.md", commands()), ("keys.md", keys())):
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def commands() -> str:
    """Every command with its arguments and options, in Markdown, by typer's own generator."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="birkhoff")
    return typer.cli.get_docs_for_click(obj=command, ctx=context, name="birkhoff")


def keys() -> str:
    """A table of keys for the manifest, its models, sources and overrides."""
    shared = set(Manifest.model_fields) & set(ModelEntry.model_fields)
    parts = (
        ("For a manifest or a model", Manifest, shared),
        ("For a manifest", Manifest, set(Manifest.model_fields) - shared),
        ("For a model", ModelEntry, set(ModelEntry.model_fields) - shared),
        ("For a source", SourcePart, set(SourcePart.model_fields)),
        ("For an override", OverrideRule, set(OverrideRule.model_fields)),
    )
    return "\n\n".join(f"## {title}\n\n{_table(model, names)}" for title, model, names in parts) + "\n"


def _table(model: type[BaseModel], names: set[str]) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_said(model, name)} |"
        for name, field in model.model_fields.items()
        if name in names
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(field: FieldInfo) -> str:
    """A field's type as a manifest's author sees it."""
    return " or ".join(f"`{name}`" for name in dict.fromkeys(_names(field.annotation)))


def _names(kind: Any) -> list[str]:
    if kind is type(None):
        return []
    if get_origin(kind) is Literal:
        return [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(kind)]
    origin = get_origin(kind)
    if origin is Annotated:
        return _names(get_args(kind)[0])
    if origin in (tuple, list, frozenset):
        return ["list"]
    if origin is dict:
        return ["mapping"]
    if get_args(kind):
        return [name for part in get_args(kind) if part is not Ellipsis for name in _names(part)]
    return [_WORDS.get(kind.__name__, kind.__name__)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None or value in ((), {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _said(model: type[BaseModel], name: str) -> str:
    """The docstring that stands under the field, on one line."""
    for owner in model.__mro__:
        if name in vars(owner).get("__annotations__", {}):
            found = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs()
            return " ".join(" ".join(found.get((owner.__name__, name), [])).split()).replace("|", "\\|")
    raise KeyError(name)
