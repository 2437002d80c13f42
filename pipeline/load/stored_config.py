"""Check transformers configurations from a store: allow hyperparameters of known architectures, and nothing else.

By a configuration, transformers chooses classes, backbones, kernels and weights, some of them on the Hugging Face Hub.
So before transformers sees a configuration that came with weights, we reduce it to settings that its own class
declares, for architectures whose settings are numbers. The Hub stays unreachable while it is used.
"""

import contextlib
import inspect
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from birkhoff.pipeline.errors import BuilderError

Settings = dict[str, Any]
"""The content of a transformers configuration."""

MINIMUM = (5, 3)
"""The oldest transformers that is allowed. Older ones take the name of a kernel to download from more keys than these
rules know (`_attn_implementation_internal`)."""

ARCHITECTURES = frozenset(
    {
        *("sam", "sam_vision_model", "sam_hq", "sam_hq_vision_model"),
        *("sam2", "sam2_vision_model", "sam2_hiera_det_model", "sam2_video"),
        *("sam3_tracker", "sam3_vision_model", "sam3_vit_model"),
        *("vit", "vitdet", "deit", "beit", "dinov2", "dinov3_vit", "hiera", "swin", "convnext", "resnet", "segformer"),
        *("mobilevit", "mobilenet_v2", "clip", "siglip", "bert", "roberta", "distilbert", "mpnet"),
    }
)
"""`model_type` of the architectures that are built. None of their classes takes the name of a backbone, a kernel, a
file or a repository; `tests/pipeline/load/test_stored_config.py` checks this for the installed transformers."""

_COMMON = frozenset(
    {"architectures", "dtype", "id2label", "image_mean", "image_std", "is_encoder_decoder", "label2id", "torch_dtype"}
)
"""Settings of every class that describe weights, pictures or outputs; `torch_dtype` is an older name of `dtype`."""

_BASE = frozenset(
    {"self", "args", "kwargs", "transformers_version", "output_hidden_states", "return_dict", "chunk_size_feed_forward"}
)
"""Parameters of every class that say nothing about an architecture."""

_MAX_DEPTH = 6

_lock = threading.Lock()


def allowed(label: str, settings: Settings, transformers: ModuleType) -> Settings:
    """Return the part of a configuration that transformers may see. `label` is for messages.

    Raises:
        BuilderError: The architecture is not among `ARCHITECTURES`, a value is not a setting, or transformers is older
            than `MINIMUM`.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        raise BuilderError(
            f"{label}: a configuration that came with weights needs transformers {'.'.join(map(str, MINIMUM))} or "
            f"newer, {transformers.__version__} is installed: pip install -U transformers"
        )
    return _of_model(label, settings, transformers)


@contextlib.contextmanager
def hub_shut() -> Iterator[None]:
    """Keep everything inside the block from reaching the Hugging Face Hub, as HF_HUB_OFFLINE=1 does."""
    from huggingface_hub import constants

    with _lock:
        before, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before
            if variable is None:
                del os.environ["HF_HUB_OFFLINE"]
            else:
                os.environ["HF_HUB_OFFLINE"] = variable


def _of_model(label: str, settings: Settings, transformers: ModuleType, depth: int = 0) -> Settings:
    """Return the allowed settings of a configuration that names its architecture."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise BuilderError(
            f"{label}: model_type {str(kind)[:60]!r} is not built from a configuration that came with weights, only "
            f"{', '.join(sorted(ARCHITECTURES))}; name what builds it: --builder module:function, or your own "
            "configuration (.json)"
        )
    return {"model_type": kind, **_of_class(label, settings, transformers.CONFIG_MAPPING[kind], transformers, depth)}


def _of_class(label: str, settings: Settings, kind: type, transformers: ModuleType, depth: int) -> Settings:
    """Return the settings that a configuration class declares, without the others."""
    if depth > _MAX_DEPTH:
        raise BuilderError(f"{label}: nested more than {_MAX_DEPTH} deep: no configuration of a known architecture")
    declared = _COMMON | (inspect.signature(kind.__init__).parameters.keys() - _BASE)  # type: ignore[misc]
    inner = getattr(kind, "sub_configs", None) or {}
    found: Settings = {}
    for key in settings.keys() & declared:
        value = settings[key]
        if key in inner and isinstance(value, dict):
            part = f"{label}: {key}"
            if issubclass(inner[key], transformers.PreTrainedConfig):
                found[key] = _of_class(part, value, inner[key], transformers, depth + 1)
            else:  # AutoConfig: any allowed architecture
                found[key] = _of_model(part, value, transformers, depth + 1)
        elif key not in inner and _plain(value, _MAX_DEPTH):
            found[key] = value
        elif value is not None:
            raise BuilderError(f"{label}: {key} is {type(value).__name__}, expected a setting of {kind.__name__}")
    return {key: found[key] for key in settings if key in found}


def _plain(value: object, depth: int) -> bool:
    """Return whether a value consists of numbers, texts, and lists and tables of them."""
    if isinstance(value, list):
        return depth > 0 and all(_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return depth > 0 and all(_plain(item, depth - 1) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str)
