"""The quantization method `birkhoff` of transformers: folders of `transformers_folder` load by `from_pretrained`.

Importing this module makes the method known; `import birkhoff` sees to that (`transformers_hook`). As it may be
imported while transformers is, it imports neither torch nor the kernels before a model is loaded.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.transformers_hook import METHOD

if TYPE_CHECKING:
    from torch import nn


@register_quantization_config(METHOD)
class BirkhoffConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a folder: for each linear layer on the trajectory, the number of its escaped weights."""

    def __init__(self, layers: dict[str, int] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.layers = dict(layers or {})


@register_quantizer(METHOD)
class BirkhoffQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts HyperLinear layers into the skeleton of a model; transformers then loads their buffers by name."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: "nn.Module", **_: Any) -> None:
        from torch import nn

        from birkhoff.kernels.hyperlinear import HyperLinear

        for name, escapes in self.quantization_config.layers.items():
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise ModelMismatchError(
                    f"{name} of {type(model).__name__} is {type(linear).__name__}, the folder's configuration says "
                    "that it is a linear layer; load it into the class that config.json names"
                )
            parent, _, leaf = name.rpartition(".")
            bias, kind = linear.bias is not None, linear.weight.dtype
            layer = HyperLinear(linear.in_features, linear.out_features, bias, device="meta", dtype=kind)
            layer.escape_index = layer.escape_index.new_empty(escapes)
            layer.escape_value = layer.escape_value.new_empty(escapes)
            setattr(model.get_submodule(parent), leaf, layer)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes such a folder again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are constant."""
        return False
