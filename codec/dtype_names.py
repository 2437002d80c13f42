"""Names of element types, without torch, for headers and manifests."""

import re

from birkhoff.codec.errors import FormatError

NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""torch's names of the safetensors codes for dense real types, those that weights can have."""

OUTSIDE_CONTAINERS = ("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
"""Codes that the container's format version 1 does not list."""

CODED_NAMES = ("float16", "bfloat16", "float32", "float64")
"""Types that the lossy codecs accept. All others are stored lossless."""


def is_float(name: str) -> bool:
    """Return whether the lossy codecs accept a torch dtype name."""
    return name in CODED_NAMES


def name_of_code(code: str) -> str:
    """Return `float32` for `F32`. Raises FormatError for a code that no container can hold."""
    if code not in NAMES or code in OUTSIDE_CONTAINERS:
        known = ", ".join(known for known in NAMES if known not in OUTSIDE_CONTAINERS)
        raise FormatError(f"unknown element type {code!r}; known: {known}")
    return NAMES[code]


def width_of_code(code: str) -> int:
    """Return the bytes per element: 4 for `F32`. Raises FormatError for a code that no container can hold."""
    name_of_code(code)
    return _WIDTHS[code]


def _width(code: str) -> int:
    bits = re.search("[0-9]+", code)  # the first number is the width; BOOL has none
    return 1 if bits is None else int(bits[0]) // 8


_WIDTHS = {code: _width(code) for code in NAMES}

ITEM_BYTES: dict[str, int] = {name: _WIDTHS[code] for code, name in NAMES.items()}
"""Bytes per element, by torch's names."""
