"""The quantization method `birkhoff` of transformers, by which `from_pretrained` loads `transformers_folder`'s folders.

Importing this module registers the method, and `import birkhoff` arranges that (`transformers_hook`). It may be
imported in the middle of transformers, so it imports torch and the kernels only when a model is loaded.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from birkhoff.pipeline.errors import ModelMismatchError
from birkhoff.pipeline.load.transformers_method import FORM, METHOD

if TYPE_CHECKING:
    from torch import nn

    from birkhoff.kernels.hyperlinear import HyperLinear


@register_quantization_config(METHOD)
class BirkhoffConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a folder: for each linear layer on the trajectory, the number of its escaped weights.

    Raises:
        ModelMismatchError: The folder's form is unknown.
    """

    def __init__(self, layers: dict[str, int] | None = None, form: int = 1, **_: Any) -> None:
        if form not in (1, FORM):
            raise ModelMismatchError(f"the folder's layers have form {form}; this version reads up to {FORM}: upgrade")
        self.quant_method = METHOD
        self.form = form
        self.layers = dict(layers or {})


@register_quantizer(METHOD)
class BirkhoffQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts HyperLinear layers into the skeleton of a model; transformers then loads their buffers by name."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: "nn.Module", **_: Any) -> None:
        from torch import nn

        from birkhoff.kernels.hyperlinear import HyperLinear

        waiting: dict[str, HyperLinear] = {}
        for name, escapes in self.quantization_config.layers.items():
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise ModelMismatchError(
                    f"{name} of {type(model).__name__} is {type(linear).__name__}, but the folder's configuration says "
                    "that it is a linear layer; load it into the class that config.json names"
                )
            bias, kind = linear.bias is not None, linear.weight.dtype
            layer = HyperLinear(linear.in_features, linear.out_features, bias, device="meta", dtype=kind)
            layer.escape_index = layer.escape_index.new_empty(escapes)
            layer.escape_value = layer.escape_value.new_empty(escapes)
            if self.quantization_config.form == FORM:
                _put(model, name, layer)
            else:
                waiting[name] = layer
                _put(model, name, _first_form(layer))
        self._waiting = waiting

    def _process_model_after_weight_loading(self, model: "nn.Module", **_: Any) -> None:
        for name, layer in self._waiting.items():
            held = model.get_submodule(name)
            layer.load_state_dict(held.state_dict(), assign=True)
            layer._like = held.get_buffer("step").new_empty(0, dtype=layer._like.dtype)
            _put(model, name, layer.train(held.training))
        self.quantization_config.form = FORM  # the form that `save_pretrained` will write

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` can write such a folder again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are constant."""
        return False


def _put(model: "nn.Module", name: str, module: "nn.Module") -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _first_form(layer: "HyperLinear") -> "nn.Module":
    """Return a stand-in for a layer while its buffers are loaded from their first form."""
    from torch import nn

    held = nn.Module()
    for name in ("theta", "step", "escape_index", "escape_value"):
        held.register_buffer(name, getattr(layer, name))
    held.register_parameter("bias", layer.bias)
    return held
