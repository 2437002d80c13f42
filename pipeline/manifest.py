"""The manifest: which checkpoints to compress, how, and where to publish them.

    store: s3://models/fleet     # optional: else BIRKHOFF_STORE, else the embedded server
    profile: balanced            # for models that name none
    models:
      - name: sam-b
        source: checkpoints/sam_vit_b_01ec64.pth   # relative to this file
      - name: sam-b-fine
        source: checkpoints/sam_vit_b_01ec64.pth
        profile: fine
      - name: sam-h
        source: https://example.org/sam_vit_h_4b8939.pth   # `fetch_spec` has every form

Unknown keys, duplicate keys and names, and YAML's aliases are refused; every complaint names file, line and key.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import DEFAULT_PROFILE, PROFILES
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.fetch_spec import SourcePart, SourceSpec
from birkhoff.pipeline.store import StoreAddress

MAX_MANIFEST_BYTES = 1 << 20
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """A model's name: letters, digits, `.`, `_` and `-`, at most 100, starting with a letter or digit."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError("a name is 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return name


def check_profile(name: str) -> str:
    """The name of a known profile."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile{_suggestion(name, PROFILES)}; known: {', '.join(PROFILES)}")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntry(_Strict):
    """One model of a manifest."""

    name: str
    """Under this name its versions are published."""
    source: SourceSpec
    """Files of the checkpoint, paths relative to the manifest: .pth, .pt, .safetensors or a safetensors index."""
    profile: str | None = None
    """Name of a profile; the manifest's where left out."""

    _name = field_validator("name")(check_name)
    _profile = field_validator("profile")(lambda name: None if name is None else check_profile(name))


class Manifest(_Strict):
    """A whole manifest, as read; `load_manifest` makes its sources absolute."""

    store: str | None = None
    """URL of the store: s3://BUCKET/PREFIX, file:///DIR or embedded."""
    profile: str = DEFAULT_PROFILE
    """Profile of the models that name none."""
    shard_mib: Annotated[int, Field(ge=1, le=1024)] = 32
    """Source bytes a shard aims at, in MiB: the unit of work, of sharing and of a worker's memory."""
    in_flight_mib: Annotated[int, Field(ge=1)] | None = None
    """Source bytes at work at any time, in MiB; an eighth of the machine's memory where left out."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """Versions a model keeps; older ones that no alias points at are retired when a new one is published."""
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1, strict=False)]
    """The models, in the order of the result table."""

    _profile = field_validator("profile")(check_profile)

    @field_validator("store")
    @classmethod
    def _check_store(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                StoreAddress.parse(url)
            except BirkhoffError as error:
                raise ValueError(str(error)) from None
        return url

    @model_validator(mode="after")
    def _names_differ(self) -> "Manifest":
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"model names must differ; used twice: {', '.join(twice)}")
        return self


def load_manifest(path: Path) -> Manifest:
    """Read a manifest and make its sources absolute paths.

    Raises:
        ManifestError: the file cannot be read, is no YAML, or does not say what a manifest says.
    """
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=_StrictLoader)
        data = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: {_one_line(error)}") from None
    except RecursionError:
        raise ManifestError(f"{path}: nested too deeply to be a manifest") from None
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise ManifestError(_explain(path, root, error)) from None
    base = path.resolve().parent
    models = tuple(
        model.model_copy(update={"source": tuple(part.absolute(base) for part in model.source)})
        for model in manifest.models
    )
    return manifest.model_copy(update={"models": models})


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes: not a manifest")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest{_nearby(path)}") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: not UTF-8 text, so not a manifest") from None


def _nearby(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"; {path.parent} has {', '.join(found[:5])}" if found else ""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a small file can expand to gigabytes) and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a manifest", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _explain(path: Path, root: yaml.Node | None, error: ValidationError) -> str:
    """One line for the first complaint: file, line, key path, what was expected."""
    # A mistyped key also leaves the right one missing: the typo says more.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = _as_written(root, tuple(part for part in first["loc"] if not str(part).startswith("function-")))
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        fields = Manifest.model_fields
        if "models" in where[:-1]:
            fields = SourcePart.model_fields if "source" in where[:-1] else ModelEntry.model_fields
        message = f"unknown key{_suggestion(str(where[-1]), fields)}; known: {', '.join(fields)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}, line {_line(root, where)}: {key or 'manifest'}: {message}{more}"


def _as_written(node: yaml.Node | None, where: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The key path without the steps that a short form of `source` leaves out."""
    written: list[int | str] = []
    for part in where:
        if isinstance(node, yaml.MappingNode) and isinstance(part, str):
            node = next((value for key, value in node.value if key.value == part), None)
            written.append(part)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part] if part < len(node.value) else None
            written.append(part)
    return tuple(written)


def _line(node: yaml.Node | None, where: tuple[int | str, ...]) -> int:
    """Line of the node at a key path, or of the last one on the way that exists."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in where:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[str(part)]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" {name!r}, did you mean {close[0]!r}?" if close else f" {name!r}"
