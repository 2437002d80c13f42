"""segment-anything's own `Sam` at a size for tests."""

import torch
from torch import nn


def tiny_official():
    """segment-anything's own `Sam`, small and random."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    encoder = ImageEncoderViT(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16,
                              use_rel_pos=True, window_size=4, global_attn_indexes=(1,))  # fmt: skip
    prompts = PromptEncoder(embed_dim=16, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_chans=4)
    transformer = TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(transformer_dim=16, transformer=transformer)
    for module in (encoder, prompts, decoder):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return Sam(encoder, prompts, decoder).eval()
