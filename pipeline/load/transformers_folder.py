"""Folders for transformers' `from_pretrained`: ordinary safetensors with compressed linear layers.

    FOLDER/config.json                          the model's, with `quantization_config` of method `birkhoff`
    FOLDER/model-00001-of-00003.safetensors     a file for each shard, under the model's names
    FOLDER/model.safetensors.index.json         which file holds which tensor
    FOLDER/preprocessor_config.json, ...        other files that belong to the weights
    FOLDER/README.md                            the model card, with the hub's metadata: `hf upload` takes the folder

A linear layer `X` is stored as the buffers of its HyperLinear (`X.theta_bytes`, `X.step_bits`, `X.escape_index`,
`X.escape_bits`), 8 bits per weight. All other tensors are dense.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from birkhoff.codec.container import CodedTensor
from birkhoff.codec.tensor import decode_tensor, is_matrix, lattice_of
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import blobs_of, bring
from birkhoff.pipeline.artifact.readers import Artifact, CachedArtifact
from birkhoff.pipeline.artifact.references import Found
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError
from birkhoff.pipeline.families import CARD_FILE, CONFIG_FILE
from birkhoff.pipeline.files import atomic_folder, check_new_folder
from birkhoff.pipeline.load.builders import carried_settings, from_settings, stored_settings
from birkhoff.pipeline.load.model_card import card_facts, model_card
from birkhoff.pipeline.load.transformers_method import FORM, METHOD
from birkhoff.pipeline.registry.labels import read_labels
from birkhoff.pipeline.store.base import Store

INDEX_FILE = "model.safetensors.index.json"


def pull_folder(
    found: Found,
    store: Store | None,
    folder: Path,
    cache: BlobCache,
    *,
    report: Callable[[int], None] = lambda _: None,
    card: Path | None = None,
) -> int:
    """Write a version that carries its configuration into a folder for `from_pretrained`. Return the bytes fetched.

    Memory holds one shard at a time. The model is built on the meta device, only to find its linear layers.

    Args:
        found, store, cache, report: As in `pull`.
        folder: New or empty.
        card: Jinja template of the model card. Default: the built-in one.

    Raises:
        BuilderError: The version carries no configuration of transformers, or one that it cannot build.
        OutputError: The folder is not empty or cannot be written, or the template cannot be used.
        ModelMismatchError: The artifact's tensors are not those of the model.
        ArtifactNotFoundError, IntegrityError, StoreError: As in `pull`.
    """
    check_new_folder(folder)
    artifact, blobs = CachedArtifact(found, store, cache), blobs_of(found.manifest)
    files = {record.blob for record in found.manifest.files or ()}
    fetched = bring(blobs, found, store, cache, only=files, report=report)
    settings = carried_settings(artifact)
    if settings is None:
        raise BuilderError(
            f"{found.label} carries no {CONFIG_FILE} of transformers; compress a folder that `save_pretrained` wrote, "
            f"or name the file in the manifest, `files: [{CONFIG_FILE}]`, and compress again"
        )
    settings = stored_settings(f"{CONFIG_FILE} of {found.label}", settings)
    with torch.device("meta"):
        model = from_settings(f"{CONFIG_FILE} of {found.label}", settings)
    fetched += bring(blobs, found, store, cache, only={blob.digest for blob in blobs} - files, report=report)
    facts = card_facts(
        found.manifest,
        version=found.name,
        architecture=type(model).__name__,
        settings=settings,
        source_card=artifact.file(CARD_FILE),
        labels={} if store is None else read_labels(store, found.model, found.digest),
    )
    write_folder(artifact, model, settings, folder, card=model_card(facts, card))
    return fetched


def write_folder(
    artifact: Artifact, model: nn.Module, config: dict[str, Any], folder: Path, card: str | None = None
) -> None:
    """Write an artifact as a folder for `type(model).from_pretrained`, with one shard in memory at a time.

    Args:
        artifact: Of a checkpoint with the names of `model`.
        model: The transformers model, which may be on the meta device. It shows which tensors are linear layers.
        config: The content of the folder's `config.json`.
        folder: New or empty.
        card: Its README.md. Default: the one in the artifact.

    Raises:
        OutputError: The folder is not empty or cannot be written.
        IntegrityError, ModelMismatchError: As in `load_into`.
    """
    with atomic_folder(folder) as part:
        shards, places, layers = artifact.manifest.shards, dict[str, str](), dict[str, int]()
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for coded in artifact.coded_of(shard):
                tensors |= _stored(coded, model, layers)
            save_file(tensors, part / name, metadata={"format": "pt"})
            (part / name).chmod(0o644)  # safetensors creates files that only their owner can read
            places |= dict.fromkeys(tensors, name)
        for record in artifact.manifest.files or ():
            (part / record.name).write_bytes(artifact.blob(record))
        whole = {**config, "quantization_config": {"quant_method": METHOD, "form": FORM, "layers": layers}}
        (part / CONFIG_FILE).write_text(json.dumps(whole, indent=1))
        if card is not None:
            (part / CARD_FILE).write_text(card, encoding="utf-8")
        (part / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1))


def _stored(coded: CodedTensor, model: nn.Module, layers: dict[str, int]) -> dict[str, Tensor]:
    """Return the tensors that a coded one becomes. Record its layer in `layers`."""
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
