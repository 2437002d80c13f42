"""SamModel -> compress -> folder -> from_pretrained: the masks of load_into."""

from pathlib import Path

import pytest
import torch

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifacts import open_artifact
from birkhoff.pipeline.errors import OutputError
from birkhoff.pipeline.store import Store
from tests.pipeline.publishing import publish_tensors
from tests.pipeline.test_upstream import drawn, small_config, transformers_masks


def test_from_pretrained_gives_the_masks_of_load_into(
    directory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from transformers import SamModel

    from birkhoff.pipeline.transformers_folder import write_folder

    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    drawn(SamModel(small_config())).save_pretrained(tmp_path / "source")
    source = load_file(tmp_path / "source" / "model.safetensors")
    publish_tensors(directory_store, "sam", source, shard_weights=1 << 20)
    loaded = SamModel(small_config()).eval()
    layers = birkhoff.load_into(loaded, "sam", directory_store.url)
    folder = tmp_path / "folder"
    with open_artifact("sam", directory_store.url, cached=True) as artifact:
        write_folder(artifact, SamModel(small_config()), small_config().to_dict(), folder)
        with pytest.raises(OutputError, match="not empty"):
            write_folder(artifact, loaded, {}, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = SamModel.from_pretrained(folder).eval()
    swapped = [name for name, module in model.named_modules() if isinstance(module, HyperLinear)]
    assert sorted(swapped) == sorted(layers)
    torch.manual_seed(1)
    image, point = torch.randn(1, 3, 128, 128), torch.tensor([50.0, 70.0])
    for ours, theirs in zip(
        transformers_masks(loaded, image, point), transformers_masks(model, image, point), strict=True
    ):
        assert torch.equal(ours, theirs)
