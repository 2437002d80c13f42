"""Find the native library beside this file, if it was built, load it once, and check its version.

`make setup` (or any installation of the package) compiles it with the system's C compiler. Without the library, or with
`BIRKHOFF_NATIVE=0`, the references in Python run instead. They make the same bytes about ten times more slowly. This
logs a warning once, and `birkhoff doctor` shows it.
"""

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np

log: logging.Logger = logging.getLogger("birkhoff.native")

VERSION = 16
"""Version of the functions' meaning. `native.c` returns the same number."""

VARIABLE = "BIRKHOFF_NATIVE"


class Missing(Exception):  # noqa: N818  never leaves this file
    """Says why there is no native library."""


@cache
def native() -> ctypes.CDLL | None:
    """Return the library. Without one, log a warning the first time and return None."""
    try:
        return _load()
    except Missing as reason:
        log.warning("native codec library not in use (%s): its references in Python run instead, slower", reason)
        return None


def describe() -> tuple[bool, str]:
    """Return whether the library is in use, and one line about it."""
    try:
        library = _load()
    except Missing as reason:
        return False, f"not in use: {reason}"
    return True, f"version {VERSION}, {'AVX2' if library.birkhoff_native_vectors(1) else 'base instructions'}"


@cache
def _load() -> ctypes.CDLL:
    if os.environ.get(VARIABLE) == "0":
        raise Missing(f"{VARIABLE}=0")
    if sys.byteorder != "little":
        raise Missing("this machine is not little-endian")
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        raise Missing("it was not built: check for a C compiler and run make setup again")
    try:
        library = ctypes.CDLL(str(built[0]), use_errno=True)
        found = library.birkhoff_native_version()
    except (OSError, AttributeError) as error:
        raise Missing(f"{built[0].name} does not load: {error}") from None
    if found != VERSION:
        raise Missing(f"{built[0].name} has version {found}, expected {VERSION}: run make setup again")
    for name, result, arguments in _FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def pointer(array: object) -> int:
    """Return the address of a contiguous array's elements."""
    assert isinstance(array, np.ndarray)
    assert array.flags.c_contiguous
    if array.flags.writeable and array.size:
        return ctypes.addressof(_BYTE.from_buffer(array.data))  # twice as fast as the next line
    return int(array.__array_interface__["data"][0])  # several times as fast as array.ctypes


_BYTE = ctypes.c_char

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

_FUNCTIONS = (
    ("birkhoff_native_vectors", _INT, (_INT,)),
    ("birkhoff_histograms", None, (_POINTER, _LONG, _POINTER, _POINTER)),
    ("birkhoff_symbols", None, (_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER)),
    ("birkhoff_table_parse", _INT, (_POINTER, _LONG, _POINTER)),
    ("birkhoff_rans_encode", None, (_POINTER, _LONG, *[_POINTER] * 6)),
    ("birkhoff_rans_decode", _INT, (_POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER)),
    ("birkhoff_group_symbols", _LONG, (_LONG, *[_POINTER] * 4)),
    ("birkhoff_rans_plan", _LONG, (_LONG, *[_POINTER] * 7)),
    ("birkhoff_viterbi", None, (_POINTER, _LONG, _LONG, _POINTER)),
    ("birkhoff_round_rows", _INT, (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER)),
    (
        "birkhoff_path_numbers",
        _LONG,
        (_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _LONG),
    ),
    ("birkhoff_positions", None, (_POINTER, _POINTER, _LONG, _LONG, _FLOAT, _LONG, *[_POINTER] * 4)),
    ("birkhoff_thetas", None, (_POINTER, _LONG, _LONG, _FLOAT, _POINTER)),
    ("birkhoff_pack_thetas", None, (_POINTER, _POINTER, _LONG, _POINTER)),
    ("birkhoff_narrow", _LONG, (_POINTER, _LONG, _POINTER, _POINTER, _LONG)),
    ("birkhoff_paths", _LONG, (_POINTER, _LONG, _LONG, _FLOAT, _LONG, *[_POINTER] * 5, _LONG)),
    ("birkhoff_compare", None, (_POINTER, _POINTER, _LONG, _LONG, _POINTER)),
    ("birkhoff_survey", None, (_POINTER, _LONG, _LONG, _FLOAT, _POINTER)),
    (
        "birkhoff_coded_errors",
        None,
        (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _FLOAT, _LONG, _POINTER, _POINTER, _POINTER, _POINTER),
    ),
    ("birkhoff_node_errors", None, (_POINTER, _LONG, _LONG, _FLOAT, _FLOAT, _POINTER)),
    ("birkhoff_nodes", _LONG, (_POINTER, _POINTER, _LONG, _LONG, _FLOAT, _FLOAT, *[_POINTER] * 4, _LONG)),
    ("birkhoff_addresses", _INT, (_POINTER, _LONG, _POINTER, _LONG, _LONG, _INT, *[_POINTER] * 5)),
    (
        "birkhoff_add",
        _LONG,
        (*(_POINTER,) * 4, _LONG, _INT, _INT, *(_POINTER,) * 4, _LONG),
    ),
    ("birkhoff_squares", None, (_POINTER, _LONG, _LONG, _POINTER, _POINTER)),
    ("birkhoff_regroup", None, (_POINTER, _LONG, _LONG, *[_POINTER] * 7, _INT)),
    ("birkhoff_groupings", None, (_LONG, *[_POINTER] * 8)),
    ("birkhoff_table_fits", None, (_LONG, *[_POINTER] * 5)),
    ("birkhoff_unpack_escapes", _LONG, (_LONG, *[_POINTER] * 7)),
    ("birkhoff_escaped_weights", None, (_LONG, *[_POINTER] * 9)),
    ("birkhoff_merge_escapes", _LONG, (_LONG, _POINTER, _LONG, *[_POINTER] * 3, _LONG, *[_POINTER] * 6)),
    ("birkhoff_sample", _LONG, (_INT, *[_LONG] * 5, _POINTER)),
    ("birkhoff_stream_heads", _LONG, (_LONG, *[_POINTER] * 6)),
)
