"""Build a model for an artifact or a checkpoint: choose its code and its settings.

Weights alone do not say what computes on them. Builders are tried in this order:

1. `--builder`: `module:function`, `FILE.py:function`, or a transformers configuration (a .json file, or its folder);
2. the transformers configuration that the artifact carries, or one beside the weights: `config.json`, or the weights'
   own name with `.json`; for a checkpoint, the one beside it comes first;
3. architectures known by their tensors (`architectures`, `published`): the members of the Segment Anything family, with
   the names of their packages or of transformers.

Nothing in a store can name code to run. A builder is code on this machine that the user named. Of a configuration that
came with weights, only the part that `stored_config` allows is used.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from birkhoff.pipeline.artifact.readers import Artifact, folder_meant, inspect, open_artifact
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError, SourceError
from birkhoff.pipeline.families import CONFIG_FILE
from birkhoff.pipeline.load.architectures import known, package
from birkhoff.pipeline.load.layer_forms import Compute
from birkhoff.pipeline.load.load import load_into
from birkhoff.pipeline.load.name_maps import joined, renaming
from birkhoff.pipeline.load.published import Shapes
from birkhoff.pipeline.load.refresh import refresh
from birkhoff.pipeline.load.stored_config import Settings, allowed, hub_shut
from birkhoff.pipeline.paths import source_cache
from birkhoff.pipeline.plan.sidecars import config_beside, settings_in, settings_of

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def compressed_model(
    reference: str,
    store: str | None = None,
    *,
    builder: str | None = None,
    upstream: Path | None = None,
    near: Path | None = None,
    device: str,
    compute: Compute = "float",
    accept: Callable[[nn.Module, str | None], object] | None = None,
) -> nn.Module:
    """Return a model in evaluation mode that computes on an artifact's compressed weights.

    Args:
        reference, store: As in `load_into`.
        builder: As described at the head of this file.
        upstream: As in `published.member`.
        near: A checkpoint of the same model. A configuration beside it is considered too.
        device: Where the weights go.
        compute: As in `load_into`.
        accept: Gets the model, and the adapter that the artifact names, once only headers were read. It may raise to
            refuse the model before its weights are fetched.

    Raises:
        BuilderError: Nothing here builds it, or `accept` refused it. The message gives the fetched bytes of its
            weights.
        ModelMismatchError: The model that was built does not have the artifact's tensors.
        ArtifactNotFoundError, IntegrityError, StoreError: As in `load_into`.
    """
    with open_artifact(reference, store) as artifact:
        shapes = {row.name: row.shape for row in inspect(artifact)}
        folder = folder_meant(reference, store)
        configs = [_carried(artifact), *(config_of(place) for place in (folder, near) if place is not None)]
        try:
            model = built(artifact.label, shapes, builder, configs, upstream)
            if accept is not None:
                accept(model, artifact.manifest.adapter)
        except BuilderError as error:
            whole = sum({shard.blob: shard.bytes for shard in artifact.manifest.shards}.values())
            raise BuilderError(f"{error}; {artifact.fetched} of {whole} bytes were fetched") from error
    load_into(model, reference, store, device=device, compute=compute)
    return model.to(device).eval()


def original_model(
    source: Path,
    *,
    builder: str | None = None,
    upstream: Path | None = None,
    reference: str | None = None,
    store: str | None = None,
    device: str,
) -> nn.Module:
    """Return a model in evaluation mode with the weights of a checkpoint file or a transformers folder.

    Args:
        source: The file or folder.
        builder: As described at the head of this file.
        upstream: As in `published.member`.
        reference, store: An artifact of the same model, whose configuration is used if none is beside the weights.
        device: Where the weights go.

    Raises:
        BuilderError: Nothing here builds it.
        ModelMismatchError: The model that was built does not have the checkpoint's tensors.
        SourceError: The checkpoint cannot be read.
        ArtifactNotFoundError, IntegrityError, StoreError: As in `load_into`.
    """
    checkpoint = open_checkpoint(weights_file(source), cache=source_cache())
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    configs = [config_of(source)]
    if builder is None and reference is not None:
        with open_artifact(reference, store) as artifact:
            configs.append(_carried(artifact))
    model = built(str(source), shapes, builder, configs, upstream)
    fill(model, str(checkpoint.path), tensors_of(checkpoint))
    return model.to(device).eval()


def weights_file(source: Path) -> Path:
    """Return the checkpoint file: `source` itself, or the weights in a transformers folder. Raises SourceError."""
    if not source.is_dir():
        return source
    for name in _WEIGHT_FILES:
        if (source / name).is_file():
            return source / name
    raise SourceError(f"{source}: a folder without {' or '.join(_WEIGHT_FILES)}; name the checkpoint's file")


Config = tuple[str, Settings]
"""Where a configuration was found, for messages, and its settings."""


def carried_settings(artifact: Artifact) -> Settings | None:
    """Return the transformers configuration that an artifact carries; None without one. Raises IntegrityError."""
    body = artifact.file(CONFIG_FILE)
    return None if body is None else settings_in(body)


def _carried(artifact: Artifact) -> Config | None:
    settings = carried_settings(artifact)
    return None if settings is None else (f"{CONFIG_FILE} of {artifact.label}", settings)


def config_of(place: Path) -> Config | None:
    """Return the transformers configuration beside a checkpoint or in a folder; None without one."""
    path = config_beside(place)
    settings = None if path is None else settings_of(path)
    return None if settings is None else (str(path), settings)


def built(
    label: str, shapes: Shapes, builder: str | None, configs: Sequence[Config | None], upstream: Path | None
) -> nn.Module:
    """Return an untrained model for some tensors. `label` is for messages. The first configuration is used.

    Raises:
        BuilderError: Nothing here builds it.
    """
    if builder is not None:
        return _named(builder)
    found = next(filter(None, configs), None)
    return known(label, shapes, upstream) if found is None else from_settings(*found)


def _named(builder: str) -> nn.Module:
    """Return the model that `--builder` names. Raises BuilderError."""
    path = Path(builder)
    if path.is_dir() or path.suffix == ".json":
        return from_config(path / CONFIG_FILE if path.is_dir() else path)
    build = user_function("--builder", builder, ", or a transformers configuration (.json)")
    try:
        model = build()
    except Exception as error:  # the user's code may raise anything
        raise BuilderError(f"--builder {builder}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BuilderError(f"--builder {builder}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def user_function(option: str, text: str, other: str = "") -> Callable[..., Any]:
    """Return a function of the user's own code, as an option or a key names it.

    `other` ends the message with what else the option accepts.

    Raises:
        BuilderError: There is no such function, or its module cannot be imported.
    """
    place, _, function = text.rpartition(":")
    if not place:
        raise BuilderError(f"{option} {text}: expected module:function, FILE.py:function{other}")
    found = getattr(_module(option, place), function, None)
    if not callable(found):
        raise BuilderError(f"{option} {text}: {place} has no function {function!r}")
    named: Callable[..., Any] = found
    return named


def _module(option: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise BuilderError(f"{option} {place}: no such file")
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:  # a script finds the files beside it
            sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module
    except BuilderError:
        raise
    except Exception as error:
        raise BuilderError(f"{option} {place}: cannot be imported: {type(error).__name__}: {error}") from error


def from_config(path: Path) -> nn.Module:
    """Return a model whose weights are to be loaded, from a transformers configuration file that the user named. Raises
    BuilderError."""
    settings = settings_of(path)
    if settings is None:
        raise BuilderError(f"{path}: expected a transformers configuration with a model_type")
    return _of_transformers(str(path), settings)


def stored_settings(label: str, settings: Settings) -> Settings:
    """Return the allowed part of a configuration that came with weights. `label` is for messages.

    Raises:
        BuilderError: As `stored_config.allowed`.
    """
    return allowed(label, settings, package("transformers", f"{label} describes a model of transformers"))


def from_settings(label: str, settings: Settings) -> nn.Module:
    """Return a model whose weights are to be loaded, from a configuration that came with them. `label` is for messages.

    Raises:
        BuilderError: transformers cannot build it.
    """
    own = stored_settings(label, settings)
    with hub_shut():
        return _of_transformers(label, own)


class _Undrawn(TorchFunctionMode):
    """Leave parameters as they are allocated, because weights are loaded over them: drawing SAM-H's takes six
    seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


_DRAWS = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
}  # fmt: skip
"""Functions that draw weights: of tensors, of `torch.nn.init`, and of transformers, which replaces the latter by its
own."""


def _of_transformers(label: str, settings: Settings) -> nn.Module:
    transformers = package("transformers", f"{label} describes a model of transformers")
    try:
        own = {key: value for key, value in settings.items() if key != "quantization_config"}  # the artifact has that
        with _Undrawn():
            model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**own))
    except Exception as error:  # each of its classes checks its settings in its own way
        raise BuilderError(f"{label}: transformers cannot build it: {' '.join(str(error).split())[:300]}") from error
    return model


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint by name, with one in memory at a time. Raises SourceError."""
    return ((tensor.name, read_tensor(tensor)) for tensor in checkpoint.tensors)


def fill(model: nn.Module, label: str, found: Iterable[tuple[str, Tensor]]) -> None:
    """Load dense tensors into a model, in place. Of names that the model ties, one is enough.

    Modules are told that their parameters changed. Each keeps its mode.

    Raises:
        ModelMismatchError: The tensors are not the model's. `label` is for the message.
    """
    stored = dict(found)
    rename = renaming(model.state_dict().keys(), stored)
    tensors: dict[str, Tensor] = {}
    for name in list(stored):
        tensors |= dict.fromkeys(rename(name), stored.pop(name))
    tensors = joined(tensors)
    for copy, kept in (getattr(model, "_tied_weights_keys", None) or {}).items():
        for absent, present in ((copy, kept), (kept, copy)):
            if absent not in tensors and present in tensors:
                tensors[absent] = tensors[present]
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelMismatchError(f"{label} does not fit the model: {' '.join(str(error).split())}") from None
    refresh(model)
