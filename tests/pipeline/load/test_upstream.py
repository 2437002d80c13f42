"""Published packages and transformers on artifacts of their own checkpoints: loaded, exported, run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifact.export import export
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.load.upstream import drawn, upstream
from tests.pipeline.publishing import publish_tensors

SMALL = {"depth": 2, "width": 64, "heads": 2, "image": 128}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("upstream")
    with pytest.MonkeyPatch.context() as patch, open_store((folder / "store").as_uri()) as opened:
        patch.setenv("BIRKHOFF_HOME", str(folder / "home"))
        patch.setenv("BIRKHOFF_STORE", opened.url)
        yield opened


def small_sam() -> nn.Module:
    """The published architecture at a size for tests."""
    package = upstream("segment_anything.modeling")
    grid = SMALL["image"] // 16
    return package.Sam(  # type: ignore[no-any-return]
        image_encoder=package.ImageEncoderViT(
            img_size=SMALL["image"],
            depth=SMALL["depth"],
            embed_dim=SMALL["width"],
            num_heads=SMALL["heads"],
            mlp_ratio=4,
            out_chans=256,
            qkv_bias=True,
            use_rel_pos=True,
            rel_pos_zero_init=True,
            window_size=3,
            global_attn_indexes=[1],
            norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        ),
        prompt_encoder=package.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(grid, grid),
            input_image_size=(SMALL["image"], SMALL["image"]),
            mask_in_chans=16,
        ),
        mask_decoder=package.MaskDecoder(
            num_multimask_outputs=3,
            transformer=package.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    ).eval()


def small_config() -> Any:
    """The same for `SamModel`."""
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "hidden_size": SMALL["width"],
            "num_hidden_layers": SMALL["depth"],
            "num_attention_heads": SMALL["heads"],
            "image_size": SMALL["image"],
            "mlp_dim": 4 * SMALL["width"],
            "window_size": 3,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={"image_size": SMALL["image"], "image_embedding_size": SMALL["image"] // 16},
    )


@torch.inference_mode()
def published_masks(sam: Any, image: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """(low-resolution masks, predicted IoU) of the published model for one foreground point."""
    sparse, dense = sam.prompt_encoder(points=(point[None, None], torch.ones(1, 1)), boxes=None, masks=None)
    return sam.mask_decoder(  # type: ignore[no-any-return]
        image_embeddings=sam.image_encoder(image),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )


@torch.inference_mode()
def transformers_masks(sam: Any, image: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """The same of `SamModel`."""
    found = sam(pixel_values=image, input_points=point[None, None, None], input_labels=torch.ones(1, 1, 1).long())
    return found.pred_masks[0], found.iou_scores[0]


def test_a_published_sam_loads_into_its_package_and_into_transformers_alike(store: Store) -> None:
    from transformers import SamModel

    original = drawn(small_sam())
    publish_tensors(store, "small", original.state_dict(), profile="fine")
    ours, theirs = small_sam(), SamModel(small_config()).eval()
    layers = birkhoff.load_into(ours, "small")
    assert len(layers) == len(birkhoff.load_into(theirs, "small")) > 40
    assert isinstance(theirs.vision_encoder.layers[1].attn.qkv, HyperLinear)
    torch.manual_seed(1)
    image, point = torch.randn(1, 3, SMALL["image"], SMALL["image"]), torch.tensor([50.0, 70.0])
    masks, scores = published_masks(ours, image, point)
    same, same_scores = transformers_masks(theirs, image, point)
    assert torch.allclose(masks[0], same[0], rtol=1e-3, atol=1e-3 * float(masks.std()))
    assert torch.allclose(scores[0], same_scores[0], atol=1e-4)
    wanted, _ = published_masks(original, image, point)
    assert float((masks - wanted).norm() / wanted.norm()) < 0.1


@pytest.fixture(scope="module")
def sam_b(store: Store) -> nn.Module:
    """The published SAM-B at full size, and its artifact under `sam-b`."""
    model = drawn(upstream("segment_anything").sam_model_registry["vit_b"]())
    publish_tensors(store, "sam-b", model.state_dict())
    return model


@pytest.mark.slow
def test_sam_b_at_full_size_exports_for_its_builder_and_runs(sam_b: nn.Module, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "sam_b.pth"
    with open_artifact("sam-b", store.url, cached=True) as artifact:
        export(artifact, path)
    dense = upstream("segment_anything").sam_model_registry["vit_b"](checkpoint=str(path))  # strict by itself
    model = upstream("segment_anything").sam_model_registry["vit_b"]()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.numel() >= 1024]
    assert len(birkhoff.load_into(model, "sam-b")) == len(linear)
    stored, source = dense.state_dict(), sam_b.state_dict()
    assert list(stored) == list(source)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HyperLinear)}
    assert len(layers) == len(linear)
    assert all(torch.equal(layer.dense_weight(), stored[f"{name}.weight"]) for name, layer in layers.items())
    torch.manual_seed(1)
    # A block with windows and one without, each of all shapes: all twelve take 20 s.
    model.image_encoder.blocks = model.image_encoder.blocks[1:3]
    assert [block.window_size for block in model.image_encoder.blocks] == [14, 0]
    masks, scores = published_masks(model.eval(), torch.randn(1, 3, 1024, 1024), torch.tensor([500.0, 300.0]))
    assert (masks.shape, scores.shape) == ((1, 3, 256, 256), (1, 3))
    assert bool(masks.isfinite().all())
    assert float(masks.std()) > 0


@pytest.mark.slow
def test_sam2_at_full_size_exports_for_its_builder_and_runs(store: Store, tmp_path: Path) -> None:
    build = upstream("sam2.build_sam").build_sam2
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    original = drawn(build(config, None, device="cpu"))
    publish_tensors(store, "sam2-t", original.state_dict(), nesting=("model",))
    path = tmp_path / "sam2.pt"
    with open_artifact("sam2-t", store.url, cached=True) as artifact:
        export(artifact, path)
    dense = build(config, str(path), device="cpu")  # refuses missing and unexpected tensors by itself
    model = build(config, None, device="cpu")
    layers = birkhoff.load_into(model, "sam2-t")
    assert len(layers) > 60
    assert torch.equal(model.get_submodule(layers[0]).dense_weight(), dense.get_submodule(layers[0]).weight)
    with torch.inference_mode():
        found = model.eval().forward_image(torch.randn(1, 3, 1024, 1024))
    assert found["vision_features"].shape == (1, 256, 64, 64)
    assert bool(found["vision_features"].isfinite().all())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exports_are_the_same_bytes_on_every_run(store: Store, tmp_path: Path, suffix: str) -> None:
    tensors = {"a.weight": torch.randn(64, 128), "a.bias": torch.randn(64).bfloat16(), "n": torch.tensor(3)}
    publish_tensors(store, "net", tensors, shard_weights=100, nesting=("model",))
    paths = [tmp_path / f"first{suffix}", tmp_path / f"second-name{suffix}"]
    for path in paths:
        with open_artifact("net", store.url, cached=True) as artifact:
            export(artifact, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
