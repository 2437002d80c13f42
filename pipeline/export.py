"""Back to a dense checkpoint that unmodified upstream code loads: original names, dtypes and nesting."""

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from birkhoff.pipeline.artifacts import Artifact, write_whole
from birkhoff.pipeline.errors import SourceError

_TORCH = (".pth", ".pt")
SUFFIXES = (".safetensors", *_TORCH)


def export(artifact: Artifact, path: Path) -> int:
    """Write a dense checkpoint, the same bytes every time; returns its size.

    `.safetensors` holds the flat state dict; `.pth` and `.pt` restore the nesting of the source (`{"model": ...}`).

    Raises:
        SourceError: the suffix names no format, or the folder does not exist.
        IntegrityError: the artifact is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise SourceError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise SourceError(f"{path}: the folder {path.parent} does not exist")
    tensors = {name: tensor.contiguous() for name, tensor in artifact.tensors()}
    if path.suffix in _TORCH:
        nested: dict[str, Any] = tensors
        for key in reversed(artifact.manifest.source.nesting):
            nested = {key: nested}
        buffer = io.BytesIO()  # a file's name would become part of the bytes
        torch.save(nested, buffer)
        body = buffer.getvalue()
    else:
        body = save(tensors)
    write_whole(path, body)
    return len(body)
