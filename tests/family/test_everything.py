"""TinySAM's hierarchical mask generator and ours: the same weights, the same masks.

The generators of SAM-HQ, MobileSAM and EdgeSAM are segment-anything's, word for word but for how they call the decoder;
`tests/pipeline/segment/test_everything.py` compares with that one.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from birkhoff.pipeline.segment.adapters.families import segmenter_of
from birkhoff.pipeline.segment.everything import SURE, everything, published
from tests.family.conftest import cloned, package

SIDE = 64


def tiny(parts: Any, encoder: Any) -> nn.Module:
    """TinySAM's decoder at a size for tests, random, behind a small ViT."""
    torch.manual_seed(0)
    vit = encoder(img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16,
                  use_rel_pos=True, window_size=4, global_attn_indexes=(1,))  # fmt: skip
    prompts = parts.PromptEncoder(
        embed_dim=16, image_embedding_size=(8, 8), input_image_size=(SIDE, SIDE), mask_in_chans=4
    )
    transformer = parts.TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=2)
    decoder = parts.MaskDecoder(transformer_dim=16, transformer=transformer)
    for module in (vit, prompts, decoder):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return parts.Sam(vit, prompts, decoder).eval()  # type: ignore[no-any-return]


def test_tiny_sam_s_masks_are_those_of_its_hierarchical_generator() -> None:
    encoder = package("segment_anything.modeling").ImageEncoderViT
    package("timm")
    image = np.random.default_rng(1).integers(0, 60, (96, 128, 3), dtype=np.uint8)
    image[10:40, 20:60] += 120
    image[50:90, 70:110, 1] += 190
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    with cloned("TinySAM"):
        model = tiny(package("tinysam.modeling"), encoder)
        segmenter = segmenter_of(model)
        assert segmenter.family == "tiny_sam"
        points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([128.0, 96.0])
        logits, quality = segmenter.logits(segmenter.look(pixels[None]), "point", points, multimask=True)
        # Random logits are small; scaled, about a tenth of the pixels are sure.
        model.mask_decoder.register_forward_hook(
            lambda _module, _inputs, found: (found[0] * (SURE / float(logits.quantile(0.9))), found[1])
        )
        # Neighbouring points find nearly the same: rounding would decide which one stays, so all of them do.
        how = published("tiny_sam", across=16, predicted_iou=float(quality.quantile(0.6)), stability=0.6, same_box=1.0)
        theirs = package("tinysam").SamHierarchicalMaskGenerator(
            model,
            points_per_side=how.across,
            pred_iou_thresh=how.predicted_iou,
            stability_score_thresh=how.stability,
            box_nms_thresh=how.same_box,
        )
        expected = [record["segmentation"] for record in theirs.hierarchical_generate(image)]
    asked: list[int] = []
    found = everything(segmenter, pixels, how, asked.append)
    assert len(expected) > 50
    assert sorted(mask.numpy().tobytes() for mask in found.masks) == sorted(mask.tobytes() for mask in expected)
    assert len(asked) >= 3
    assert asked[1] > 0, "some points were spared"
