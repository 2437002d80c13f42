"""Folders for `from_pretrained` of transformers: ordinary safetensors, linear layers on the trajectory.

    FOLDER/config.json                          the model's, with `quantization_config` of method `birkhoff`
    FOLDER/model-00001-of-00003.safetensors     a file for each shard, under the model's names
    FOLDER/model.safetensors.index.json         which tensor lies in which file

A linear layer `X` is stored as the buffers of its HyperLinear (`X.theta`, `X.step`, `X.escape_index`,
`X.escape_value`), 8 bits a weight; all else is dense. Importing this module makes the method known to transformers.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.tensor import decode_tensor, is_matrix, lattice_of
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifacts import Artifact
from birkhoff.pipeline.errors import ModelMismatchError, OutputError
from birkhoff.pipeline.files import write_whole

METHOD = "birkhoff"
INDEX_FILE = "model.safetensors.index.json"


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

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
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


def write_folder(artifact: Artifact, model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write an artifact as a folder for `type(model).from_pretrained`; one shard in memory at a time.

    Args:
        artifact: of a checkpoint in the names of `model`.
        model: the transformers model, on the meta device will do; it says which tensors are linear layers.
        config: what its `config.json` holds.
        folder: new or empty.

    Raises:
        OutputError: the folder holds something, or cannot be written.
        IntegrityError, ModelMismatchError: as in `load_into`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty; name a new folder")
        shards, places, layers = artifact.manifest.shards, dict[str, str](), dict[str, int]()
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for coded in artifact.coded_of(shard):
                tensors |= _stored(coded, model, layers)
            save_file(tensors, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, name)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    write_whole(folder / INDEX_FILE, json.dumps({"metadata": {}, "weight_map": places}, indent=1).encode())
    whole = {**config, "quantization_config": {"quant_method": METHOD, "layers": layers}}
    write_whole(folder / "config.json", json.dumps(whole, indent=1).encode())


def _stored(coded: CodedTensor, model: nn.Module, layers: dict[str, int]) -> dict[str, Tensor]:
    """The tensors that a coded one becomes; its layer is noted in `layers`."""
    owner, _, leaf = coded.name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise ModelMismatchError(f"{type(model).__name__} has no {owner}, which the artifact holds") from None
    if not (type(module) is nn.Linear and leaf == "weight" and is_matrix(coded)):
        return {coded.name: decode_tensor(coded).contiguous()}
    layer = HyperLinear.from_lattice(lattice_of(coded))
    layers[owner] = layer.escape_index.numel()
    return {f"{owner}.{name}": tensor for name, tensor in layer.state_dict().items()}
