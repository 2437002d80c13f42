"""Names of element types: torch's (`float32`) in code and manifests, safetensors' (`F32`) in files."""

import torch

from birkhoff.codec.dtype_names import CODED_NAMES
from birkhoff.codec.errors import FormatError

SAFETENSORS_TO_TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
TORCH_TO_SAFETENSORS: dict[torch.dtype, str] = {dtype: code for code, dtype in SAFETENSORS_TO_TORCH.items()}

CODED_DTYPES = tuple(getattr(torch, name) for name in CODED_NAMES)
"""Types that the lossy codecs take; all others are stored lossless."""


def dtype_from_code(code: str) -> torch.dtype:
    """torch dtype of a safetensors code; FormatError for an unknown one."""
    try:
        return SAFETENSORS_TO_TORCH[code]
    except KeyError:
        raise FormatError(f"unknown element type {code!r}; known: {', '.join(SAFETENSORS_TO_TORCH)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
