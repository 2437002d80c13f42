"""The manifest: the checkpoints to compress, how, and where to publish them.

    store: s3://models/fleet     # optional; default: BIRKHOFF_STORE, then the embedded server
    profile: balanced            # for models that name none
    models:
      - name: sam-b
        source: checkpoints/sam_vit_b_01ec64.pth   # relative to this file
      - name: sam-b-fine
        source: checkpoints/sam_vit_b_01ec64.pth
        profile: fine
      - name: sam-h
        source: https://example.org/sam_vit_h_4b8939.pth   # `download.spec` has every form
        target_ratio: 7          # instead of a profile; `quality` has budgets and overrides
        proof: true              # `proving`: require a comparison of its outputs with the original's
        adapter: med_sam         # the family's member, if tensors fit several: decides how pictures are prepared
        files: [config.json]     # files that go with the weights; default: what `sidecars` finds
        labels: {licence: Apache-2.0}   # `registry.labels`
      - name: clinic
        source: checkpoints/clinic.pth
        base: sam-b              # differences to a model of this manifest, to MODEL@REF of the store, or `auto`

Unknown keys, duplicate keys and names, and YAML aliases are refused. Each error names file, line and key.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.download.spec import SourcePart, SourceSpec
from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.families import ADAPTERS
from birkhoff.pipeline.plan.proving import ProofTerms, Proving, proof_terms
from birkhoff.pipeline.plan.quality import Fidelity, OverrideRule, Quality, no_floor, no_target, resolve, wrong
from birkhoff.pipeline.registry.documents import FILE_NAME, MAX_FILE_NAME, MAX_FILES
from birkhoff.pipeline.registry.labels import MAX_LABELS, check_labels
from birkhoff.pipeline.store.base import StoreAddress
from birkhoff.pipeline.store.keys import NAME_PATTERN
from birkhoff.pipeline.text import nearest, printable, some, suggestion

MAX_MANIFEST_BYTES = 1 << 20
_SECRET = re.compile(r"access.?key|secret|token|passw|credential|private.?key|signing.?key|^sign$", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_UNKNOWN = "extra_forbidden"

SHARD_SECONDS = 900.0
"""Default time limit of a shard; the largest take about 20 s on a slow core."""

AUTO = "auto"
"""The `base` that stands for the version with the smallest differences."""

_Where = tuple[int | str, ...]
"""A path of keys: `("models", 0, "source")`."""


def check_name(name: str) -> str:
    """Return a model's name: letters, digits, `.`, `_` and `-`, at most 100, starting with a letter or digit."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError("a name is 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return name


class ModelEntry(Quality, Proving):
    """A model of a manifest. Its profile or budget replaces the manifest's."""

    name: str
    """Name under which its versions are published."""
    source: SourceSpec
    """Files of the checkpoint, relative to the manifest: .pth, .pt, .safetensors or a safetensors index."""
    files: Annotated[tuple[str, ...], Field(max_length=MAX_FILES, strict=False)] | None = None
    """Small text files that go with the weights. Default: those of transformers beside a local safetensors source."""
    base: str | None = None
    """The model that its tensors are stored as differences to if that is smaller: a model of the manifest,
    MODEL[@REF] of the store, or `auto` for the version in the store with the smallest differences."""
    adapter: str | None = None
    """The member of the family, if its tensors fit several: `med_sam`, `tiny_sam`, ..."""
    builder: str | None = None
    """Code that builds the model, as `--builder`; paths are relative to the manifest."""
    upstream: str | None = None
    """Clone of the publishers' repository, as `--upstream`, relative to the manifest."""
    inputs: str | None = None
    """FILE.py:function or module:function that returns batches, for the proof of a model without an adapter."""
    metric: str | None = None
    """FILE.py:function or module:function that compares both models' outputs."""

    labels: Annotated[dict[str, str], Field(default_factory=dict, max_length=MAX_LABELS)]
    """Labels of its versions (licence, data set, ...), which override the manifest's; not part of the digest."""

    _name = field_validator("name")(check_name)
    _labels = field_validator("labels")(check_labels)

    @field_validator("base")
    @classmethod
    def _check_base(cls, reference: str | None) -> str | None:
        model, at, ref = (reference or "x").partition("@")
        if not NAME_PATTERN.fullmatch(model) or (at and not NAME_PATTERN.fullmatch(ref)):
            raise ValueError(f"{str(reference)[:80]!r} is no MODEL[@VERSION|ALIAS|DIGEST], nor `{AUTO}`")
        return reference

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, name: str | None) -> str | None:
        if name is not None and name not in ADAPTERS:
            raise ValueError(f"no adapter{suggestion(name, ADAPTERS)}; there are: {', '.join(ADAPTERS)}")
        return name

    @model_validator(mode="after")
    def _inputs_go_with_a_model(self) -> "ModelEntry":
        if self.metric is not None and self.inputs is None:
            raise wrong("metric", "compares outputs for `inputs`; name them too")
        if self.inputs is not None and self.target_agreement is not None:
            raise wrong("target_agreement", "is of masks; with `inputs` say `target_output_db`")
        return self

    @field_validator("files")
    @classmethod
    def _check_files(cls, paths: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names: set[str] = set()
        for name in (Path(path).name for path in paths or ()):
            if not FILE_NAME.fullmatch(name) or len(name) > MAX_FILE_NAME:
                raise ValueError(
                    f"{name[:80]!r} cannot go with the weights; expected a path to a .json, .txt, .md, .yaml or .yml "
                    "file, its name of letters, digits, '.', '_' and '-'"
                )
            if name.lower() in names:
                raise ValueError(f"two files are named {name!r}")
            names.add(name.lower())
        return paths


class Manifest(Quality, Proving):
    """A whole manifest as read. `load_manifest` makes its sources absolute."""

    store: str | None = None
    """URL of the store: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, file:///DIR or embedded."""
    allow_http: bool = False
    """Permit plain http to a store on another machine; it can be read and changed in transit."""
    shard_mib: Annotated[int, Field(ge=1, le=1024)] = 32
    """Source MiB per shard: the unit of work, of sharing and of a worker's memory."""
    in_flight_mib: Annotated[int, Field(ge=1)] | None = None
    """Source MiB at work at any time. Default: an eighth of the machine's memory."""
    shard_seconds: Annotated[float, Field(gt=0, strict=False)] = SHARD_SECONDS
    """Seconds that a worker may take for a shard; then it is killed and the shard retried. Statistics may take 64
    times as long."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """Versions to keep per model; publishing a new one retires older ones that no alias points at."""
    labels: Annotated[dict[str, str], Field(default_factory=dict, max_length=MAX_LABELS)]
    """Labels of every model's versions."""
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1, strict=False)]
    """The models, in the order of the result table."""
    _labels = field_validator("labels")(check_labels)
    _whole: bool = PrivateAttr(default=True)

    @property
    def whole(self) -> bool:
        """Return whether `cut` left out no model."""
        return self._whole

    def base_of(self, entry: ModelEntry) -> ModelEntry | None:
        """Return the model of this manifest that is another one's base; None if there is none."""
        return next((model for model in self.models if model.name == entry.base), None)

    def cut(self, models: Iterable[ModelEntry]) -> "Manifest":
        """Return the manifest with only these models."""
        cut = self.model_copy(update={"models": tuple(models)})
        cut._whole = self._whole and len(cut.models) == len(self.models)
        return cut

    def labels_of(self, entry: ModelEntry) -> dict[str, str]:
        """Return the labels of a model's versions."""
        return {**self.labels, **entry.labels}

    def fidelity(self, entry: ModelEntry) -> Fidelity:
        """Return the fidelity that a model gets."""
        return resolve(self, entry)

    def proving(self, entry: ModelEntry) -> ProofTerms:
        """Return the terms of a model's proof."""
        return proof_terms(self, entry, self.fidelity(entry).budget)

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
        first: dict[str, int] = {}
        for index, model in enumerate(self.models):
            if first.setdefault(model.name, index) != index:
                raise wrong(
                    f"models.{index}.name",
                    f"model names must differ; models[{first[model.name]}] is {model.name!r} too",
                )
        return self

    @model_validator(mode="after")
    def _allocations_have_targets(self) -> "Manifest":
        for index, model in enumerate(self.models):
            profile = self.fidelity(model).profile
            if model.allocation is not None and profile.target_db is None:
                raise no_target(f"models.{index}.allocation", profile)
        return self

    @model_validator(mode="after")
    def _bases_stand_for_themselves(self) -> "Manifest":
        entries = {model.name: model for model in self.models}
        for index, model in enumerate(self.models):
            if model.base is None:
                continue
            key, fidelity = f"models.{index}.base", self.fidelity(model)
            if model.base == model.name:
                raise wrong(key, "a model cannot be its own base; name one of its versions, or another model")
            base = entries.get(model.base)
            if base is not None and base.base is not None:
                raise wrong(key, f"{base.name!r} has a base itself, and differences have no chains; name another model")
            if fidelity.profile.codec != "lattice":
                raise wrong(key, f"profile {fidelity.profile.name!r} codes no differences; name another one")
        return self

    @model_validator(mode="after")
    def _floors_are_of_promises(self) -> "Manifest":
        for index, model in enumerate(self.models):
            fidelity = self.fidelity(model)
            if fidelity.profile.allocation == "output" and fidelity.budget and fidelity.budget.floor_db is not None:
                raise no_floor("floor_db" if model.floor_db is None else f"models.{index}.floor_db")
        return self

    @model_validator(mode="after")
    def _outputs_are_proven(self) -> "Manifest":
        for index, model in enumerate(self.models):
            budget = self.fidelity(model).budget
            if budget is not None and budget.by_output and not self.proving(model).wanted:
                raise wrong(f"models.{index}.name", f"{budget.label} is found by proofs, and `proof: false` makes none")
        return self


def load_manifest(path: Path) -> Manifest:
    """Read a manifest and make its sources absolute paths.

    Raises:
        ManifestError: The file cannot be read, is not YAML, or is not a valid manifest.
    """
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=_StrictLoader)
        data = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: {_one_line(error)}") from None
    except RecursionError:
        raise ManifestError(f"{path}: nested too deeply to be a manifest") from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ManifestError(
            f"{path}, line 1: manifest: {what}; expected `models:` with a `name` and a `source` for each"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise ManifestError(_explain(path, root, error)) from None
    base = path.resolve().parent
    models = tuple(
        model.model_copy(
            update={
                "source": tuple(part.absolute(base) for part in model.source),
                **_located(model, base),
                "files": model.files and tuple(str(base / Path(path).expanduser()) for path in model.files),
                "overrides": _placed(model, path, root, ("models", index)),
            }
        )
        for index, model in enumerate(manifest.models)
    )
    whole = {"models": models, **_located(manifest, base)}
    return manifest.model_copy(update={**whole, "overrides": _placed(manifest, path, root, ())})


def manifest_of(data: Mapping[str, Any]) -> Manifest:
    """Validate a mapping as a manifest, for models without a file. Paths stay as they are.

    Raises:
        ManifestError: It is not a valid manifest; the message names the key.
    """
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise ManifestError(_explain(None, None, error)) from None


def _located(said: Proving, base: Path) -> dict[str, str]:
    """Return the keys that name folders or code, with absolute paths."""
    found = {key: getattr(said, key, None) for key in ("pictures", "builder", "upstream", "inputs", "metric")}
    return {key: _absolute(text, base) for key, text in found.items() if text is not None}


def _absolute(text: str, base: Path) -> str:
    """Return a path made absolute from the manifest's folder; names of modules stay as they are."""
    path, colon, function = text.partition(".py:")
    if colon:
        return f"{base / Path(path).expanduser()}.py:{function}"
    return text if ":" in text else str(base / Path(text).expanduser())


def _placed(quality: Quality, path: Path, root: yaml.Node | None, where: _Where) -> tuple[OverrideRule, ...]:
    """The rules of a mapping, each knowing its file, line and key."""
    places = [(*where, "overrides", index, "tensors") for index in range(len(quality.overrides))]
    return tuple(
        rule.at(f"{path}, line {_line(root, place)}: {_key(place)}")
        for rule, place in zip(quality.overrides, places, strict=True)
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes: not a manifest")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(_absent(path)) from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: not UTF-8 text, so not a manifest") from None


def _absent(path: Path) -> str:
    """What to say of a manifest that is not there: what is, and which of it may be meant."""
    if not path.parent.is_dir():
        return f"{path}: no such manifest: there is no folder {path.parent}; name a YAML file"
    found = sorted(entry.name for entry in path.parent.glob("*.y*ml"))
    if not found:
        return f"{path}: no such manifest; {path.parent} has no YAML file: name one, or write it (manifests/README.md)"
    near = nearest(path.stem, (name.rpartition(".")[0] for name in found))
    hint = next((f", did you mean {name}?" for name in found if near == name.rpartition(".")[0]), "")
    return f"{path}: no such manifest{hint}; {path.parent} has {some(found)}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a small file can expand to gigabytes) and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a manifest", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # The 42nd hour, a number of 5000 digits, `!!int x`: PyYAML's constructors fail as it comes.
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError):
            kind, text = node.tag.rpartition(":")[2], str(node.value)[:40]
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no {kind}", node.start_mark) from None

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


def _explain(path: Path | None, root: yaml.Node | None, error: ValidationError) -> str:
    """Describe the first error in one line: file and line if any, key path, the expected value, and where there are
    more."""
    found = sorted(
        ((complaint, _place(root, complaint)) for complaint in error.errors()), key=lambda pair: _weight(pair[0])
    )
    (first, where), *others = found
    typos = [place[:-1] for complaint, place in found if complaint["type"] == _UNKNOWN]
    # A mistyped key also leaves the right one missing, and wrong items leave their list too short.
    more = [
        _key(place) if path is None else f"line {_line(root, place)}: {_key(place)}"
        for complaint, place in others
        if complaint["type"] != "too_short" and (complaint["type"] != "missing" or place[:-1] not in typos)
    ]
    also = f"; wrong too: {', '.join(more[:3])}" + (", ..." if len(more) > 3 else "") if more else ""
    message = printable(_message(first, where))
    place = "" if path is None else f"{path}, line {_line(root, where)}: "
    return f"{place}{_key(where) or 'manifest'}: {message}{also}"


def _weight(complaint: ErrorDetails) -> int:
    """Rank errors, so that those which explain others come first."""
    return {_UNKNOWN: 0, "too_short": 2}.get(complaint["type"], 1)


def _place(root: yaml.Node | None, complaint: ErrorDetails) -> _Where:
    """Return the key path that an error is about."""
    where = tuple(part for part in complaint["loc"] if not str(part).startswith("function-"))
    if complaint["type"] == "key":
        where += tuple(int(part) if part.isdigit() else part for part in complaint["ctx"]["key"].split("."))
    return where if root is None else _as_written(root, where)


def _message(complaint: ErrorDetails, where: _Where) -> str:
    """Return what was expected at a key path."""
    if complaint["type"] == _UNKNOWN:
        if _SECRET.search(str(where[-1])):
            return (
                "credentials never belong in a manifest; put them into the AWS environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) or a profile, and name key files with --sign"
            )
        fields = _fields(where[:-1])
        return f"unknown key{suggestion(str(where[-1]), fields)}; known: {', '.join(fields)}"
    if complaint["type"].startswith("byte_size"):
        return f"expected a size such as 64MiB or 1.5GB, or a number of bytes, got {str(complaint['input'])[:40]!r}"
    if complaint["type"] == "too_short" and where == ("models",):
        return "the list is empty; give at least one model, with a `name` and a `source`"
    return complaint["msg"].removeprefix("Value error, ")


def _fields(where: _Where) -> Mapping[str, object]:
    """Return the known keys of the mapping at a key path."""
    kind: type[BaseModel] = ModelEntry if "models" in where else Manifest
    if "overrides" in where:
        kind = OverrideRule
    elif "source" in where:
        kind = SourcePart
    return kind.model_fields


def _key(where: _Where) -> str:
    """Format a key path as `models[0].source`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in where).lstrip(".")


def _shown(key: str) -> str:
    """Return a key as it is if it is a plain word, else quoted on one line."""
    return key if _WORD.fullmatch(key) else repr(key[:80])


def _as_written(root: yaml.Node, where: _Where) -> _Where:
    """Return the key path without the steps that a short form of `source` omits."""
    node: yaml.Node | None = root
    written: list[int | str] = []
    for part in where:
        if isinstance(node, yaml.MappingNode) and isinstance(part, str):
            node = next((value for key, value in node.value if key.value == part), None)
            written.append(part)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part] if part < len(node.value) else None
            written.append(part)
    return tuple(written)


def _line(node: yaml.Node | None, where: _Where) -> int:
    """Return the line of the node at a key path, or of the last existing node on the way."""
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
