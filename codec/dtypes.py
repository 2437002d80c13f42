"""Names of element types: torch's (`float32`) in code and manifests, safetensors' (`F32`) in files."""

import torch

from birkhoff.codec.dtype_names import CODED_NAMES, NAMES, OUTSIDE_CONTAINERS, name_of_code

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES.values()}
"""By torch's name: the dense, real types that a weight can have."""
SAFETENSORS_TO_TORCH: dict[str, torch.dtype] = {
    code: DTYPES[name] for code, name in NAMES.items() if code not in OUTSIDE_CONTAINERS
}
"""By safetensors code, for the codes that a container can hold."""
TORCH_TO_SAFETENSORS: dict[torch.dtype, str] = {dtype: code for code, dtype in SAFETENSORS_TO_TORCH.items()}

CODED_DTYPES = tuple(DTYPES[name] for name in CODED_NAMES)
"""Types that the lossy codecs accept. All others are stored lossless."""


def dtype_from_code(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code. Raises FormatError if it is unknown."""
    return DTYPES[name_of_code(code)]


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
