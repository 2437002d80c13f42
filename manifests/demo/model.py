"""The demo model: transformers' SamModel, scaled down to 1.48 M parameters.

The parts of Segment Anything under their usual names (windowed and global attention, neck, prompt encoder, two-way mask
decoder with four masks), only smaller: 128-pixel pictures in patches of 8, six layers of width 128, a decoder of width
64 that gives masks of 64 x 64. Left out are relative positions in attention (absolute ones suffice on a 16 x 16 grid)
and the biases of qkv. Trained for boxes and clicks; mask prompts are not trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from birkhoff.pipeline.errors import SourceError

HERE = Path(__file__).parent
CONFIG = HERE / "demo_sam.json"
WEIGHTS = HERE / "demo_sam.safetensors"


def config(path: Path = CONFIG) -> SamConfig:
    """The configuration in the JSON file `path`, as transformers reads it."""
    return SamConfig(**json.loads(path.read_text()))


def build(*, seed: int = 0) -> SamModel:
    """A model to train from scratch; float32, in training mode.

    Layers start as torch initialises them by default: transformers' own start (standard deviation 1e-10 in the image
    encoder) is meant for loading checkpoints. The Fourier features of positions get unit scale, as in the published
    models; transformers' default grows with the width, and at this size neighbouring positions then look unrelated.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(config())
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm | nn.Embedding):
                module.reset_parameters()
        nn.init.normal_(model.shared_image_embedding.positional_embedding)
        nn.init.normal_(model.vision_encoder.pos_embed, std=0.02)
    return model.train()


def load(path: Path = WEIGHTS) -> SamModel:
    """The model with the weights of a `.safetensors` file; float32, in evaluation mode.

    Raises:
        SourceError: the file is missing, is no safetensors file, or does not hold exactly this model's tensors.
    """
    try:
        return from_state(load_file(path))
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path}: expected a .safetensors file of the demo model, got {error}; `git checkout` restores the original"
        ) from error
    except RuntimeError as error:  # load_state_dict lists what is missing, unexpected or misshapen
        problem = " ".join(str(error).split())
        raise SourceError(
            f"{path}: expected the tensors of {CONFIG.name}, got {problem}; choose weights that train.py wrote"
        ) from error


def from_state(tensors: Mapping[str, Tensor]) -> SamModel:
    """The model with these weights (names and shapes of SamModel's state dict, strictly), in evaluation mode.

    Raises:
        RuntimeError: names or shapes differ, as torch's `load_state_dict` says.
    """
    model = SamModel(config())
    model.load_state_dict(dict(tensors), strict=True)
    return model.eval()


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a SamModel state dict as float32 safetensors; the tied position table is written under both its names."""
    whole = {name: t.detach().to("cpu", torch.float32).clone().contiguous() for name, t in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def pixel_values(pixels: Tensor) -> Tensor:
    """RGB bytes as the model takes them: uint8 [B, 3, 128, 128] -> float32 of the same shape, about -2 to 2."""
    return pixels.to(torch.float32) * (4 / 255) - 2
