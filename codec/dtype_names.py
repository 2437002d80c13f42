"""Names of element types, without torch: what headers and manifests are judged by."""

CODED_NAMES = ("float16", "bfloat16", "float32", "float64")
"""Types that the lossy codecs take; all others are stored lossless."""


def is_float(name: str) -> bool:
    """Whether a torch dtype name is one that the lossy codecs take."""
    return name in CODED_NAMES
