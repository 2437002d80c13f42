"""Train peft's LoRA adapters on compressed layers: `get_peft_model(model, birkhoff.peft.register(LoraConfig(...)))`.

peft adapts the layer types that it knows. `register` adds the compressed ones to a configuration. The compressed
weights do not change.
"""

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from birkhoff.kernels.compressed_linear import CompressedLinear

__all__ = ["register"]


def register(config: LoraConfig) -> LoraConfig:
    """Make a configuration adapt HyperLinear and PackedHyperLinear, and return it.

    peft does not save this. Load a saved adapter with `PeftModel.from_pretrained(model, FOLDER,
    config=register(LoraConfig.from_pretrained(FOLDER)))`.
    """
    config._register_custom_module({CompressedLinear: _Adapted})
    return config


class _Adapted(Linear):  # type: ignore[misc]
    """An adapter on a compressed layer. It cannot be merged into the weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # it warns about the type, but uses the right sizes
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **kwargs)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "an adapter cannot be merged into a compressed weight: keep the adapter beside it, or merge it into the "
            "dense model of birkhoff.load_state_dict"
        )
