"""LoRA of peft around compressed layers: `get_peft_model(model, birkhoff.peft.register(LoraConfig(...)))`.

peft looks for the kinds of layers it knows. This tells one configuration of the compressed ones; the adapters train,
the compressed weights stay as they are.
"""

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from birkhoff.kernels.compressed_linear import CompressedLinear

__all__ = ["register"]


def register(config: LoraConfig) -> LoraConfig:
    """The same configuration, told how to adapt HyperLinear and PackedHyperLinear.

    peft does not save what it is told: a saved adapter loads with
    `PeftModel.from_pretrained(model, FOLDER, config=register(LoraConfig.from_pretrained(FOLDER)))`.
    """
    config._register_custom_module({CompressedLinear: _Adapted})
    return config


class _Adapted(Linear):  # type: ignore[misc]
    """An adapter beside a compressed layer, whose weight nothing can be merged into."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # it takes the right sizes, of a layer whose kind it says it does not know
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **kwargs)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "a compressed layer's weight cannot take an adapter in: keep the adapter beside it, or merge it into the "
            "dense model of birkhoff.load_state_dict"
        )
