"""Names of the Segment Anything family's members for `adapter:` (`segment.adapters` runs them), and of the files
beside a transformers model."""

ADAPTERS = (
    "sam",
    "med_sam",
    "lite_med_sam",
    "sam_hq",
    "mobile_sam",
    "mobile_sam_v2",
    "tiny_sam",
    "edge_sam",
    "efficient_vit_sam",
    "efficient_sam",
    "sam2",
    "sam_hq2",
    "med_sam2",
    "efficient_tam",
    "edge_tam",
    "sam3",
)

CONFIG_FILE = "config.json"
"""Name of a transformers configuration."""

BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files that transformers reads and writes beside weights, besides the configuration."""

CARD_FILE = "README.md"
"""The model card of a repository on the Hugging Face Hub."""

HUB_FILES = (CONFIG_FILE, *BESIDE, CARD_FILE, "LICENSE.md", "LICENSE.txt")
"""Files of a model's Hub repository besides the weights."""

TRANSFORMERS = ("sam", "sam_hq", "sam2", "edgetam", "sam3_tracker")
"""Values of `model_type` in a transformers configuration whose models an adapter runs."""
