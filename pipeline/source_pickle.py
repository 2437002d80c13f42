"""What a checkpoint's pickle may contain, and where in it the state dict lies.

Two locks guard every pickle. Its opcodes are first read as data, never run, and every global they name must be
one that dense tensors and plain containers need. Only then does `torch.load(weights_only=True)` rebuild it.
The second lock alone would let a forged file exhaust memory: it allows `bytearray(n)` and chains of
`_codecs.encode`, which no state dict needs.
"""

import pickletools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from birkhoff.pipeline.errors import SourceError, UnsafeSourceError
from birkhoff.pipeline.source_types import DTYPES, check_tensor, first_line, shown

# SAM-H describes its 594 tensors in 0.1 MB; beyond this the pickle holds data, not descriptions.
MAX_PICKLE_BYTES = 16 << 20

# Keys that a message lists.
_SHOWN_KEYS = 10

_REMEDY = "save model.state_dict() where you trust the file, best with safetensors.torch.save_file"

_SAFE_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        *(f"torch.{dtype}" for dtype in DTYPES),
        *(f"torch.{kind}Storage" for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long")),
        *(f"torch.{kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double")),
        # Rebuilt so that the refusal can name the tensor.
        "torch.ComplexFloatStorage",
        "torch.ComplexDoubleStorage",
    }
)
_UNSUPPORTED_GLOBALS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch.serialization._get_layout": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    **dict.fromkeys((f"torch.Q{kind}Storage" for kind in ("Int8", "UInt8", "Int32")), "quantized"),
    "torch.per_tensor_affine": "quantized",
    "torch.per_channel_affine": "quantized",
    "torch.per_channel_affine_float_qparams": "quantized",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device, without data",
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "of a device without storages",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of a device without storages",
}
# What torch.save writes, and the next, which its unpickler still reads.
_PROTOCOLS = (2, 3)
_TEXT_OPS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"})
_PUT_OPS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET_OPS = frozenset({"GET", "BINGET", "LONG_BINGET"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """The state dict of an unpickled checkpoint."""

    tensors: dict[str, torch.Tensor]
    nesting: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def vet_pickle(path: Path, stream: BinaryIO) -> None:
    """Read one pickle from `stream` as data and refuse it unless it only describes tensors and containers.

    Leaves `stream` behind the pickle's end.

    Raises:
        UnsafeSourceError: it names a global that would run code, or more code than tensors need.
        SourceError: it is no complete pickle, or rebuilds a kind of tensor that is no dense weight.
    """
    unsupported: tuple[str, str] | None = None
    for wanted, key in _globals_of(path, stream):
        if wanted in _UNSUPPORTED_GLOBALS:
            unsupported = unsupported or (_UNSUPPORTED_GLOBALS[wanted], key)
        elif wanted not in _SAFE_GLOBALS:
            raise UnsafeSourceError(
                f"{path}: its pickle wants to call {shown(wanted)} (near {shown(key)}), expected nothing but"
                f" tensors and plain containers; {_REMEDY}"
            )
    if unsupported:
        kind, key = unsupported
        raise SourceError(f"{path}: tensor {shown(key)} is {kind}, expected a dense one; convert it and save again")


def _globals_of(path: Path, stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """(module.name, last text before it) of every global; the text is the dict key that leads to it."""
    texts = deque(["", "", ""], maxlen=3)
    memo: dict[object, str | None] = {}
    text: str | None = None
    protocol: object = 2
    for op, arg in _operations(path, stream):
        if op in _PUT_OPS:
            memo[len(memo) if arg is None else arg] = text
            continue
        text = f"{arg}" if op in _TEXT_OPS else memo.get(arg) if op in _GET_OPS else None
        if text is not None:
            texts.append(text)
        elif op in {"GLOBAL", "INST"}:
            yield f"{arg}".replace(" ", ".", 1), texts[2]
        elif op == "STACK_GLOBAL":
            # Only as good as its texts are plain, but weights_only refuses this opcode whatever it names.
            yield f"{texts[1]}.{texts[2]}", texts[0]
        elif op.startswith("EXT"):
            yield f"copyreg extension {arg}", texts[2]
        elif op == "PROTO":
            protocol = arg
    # Last, so that a pickle that would run code is called that, whatever its protocol.
    if protocol not in _PROTOCOLS:
        raise SourceError(f"{path}: pickle protocol {protocol}, expected 2; load it and torch.save it by default")


def _operations(path: Path, stream: BinaryIO) -> Iterator[tuple[str, object]]:
    try:
        for op, arg, _ in pickletools.genops(stream):
            yield op.name, arg
    # A forged pickle can trip the reader anywhere: bad opcode, short argument, absurd length, broken text.
    except (ValueError, EOFError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise SourceError(
            f"{path}: its pickle is cut short or corrupt ({first_line(error)}); download it again"
        ) from error


def find_state_dict(path: Path, loaded: object, under: str | None = None) -> StateDict:
    """Find the state dict in an unpickled checkpoint.

    With `under` it is the dict behind these keys, joined by dots. Else a top-level dict that holds tensors is the state
    dict; otherwise the one value that is a dict of tensors, with "model" before "state_dict" where there are several.

    Raises:
        SourceError: none or no single state dict, or one that holds tensors which are no dense weights.
    """
    if not isinstance(loaded, dict):
        kind = "tensor" if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise SourceError(f"{path}: holds a {kind}, expected a dict of tensors; {_REMEDY}")
    if under is not None:
        return _below(path, loaded, under)
    nested = [key for key, value in _items(loaded) if isinstance(key, str) and _count_tensors(value)]
    if not _count_tensors(loaded):
        key = _choose(path, loaded, nested)
        return _collect(path, loaded[key], nesting=(key,), outer=loaded)
    if nested:
        raise SourceError(
            f"{path}: has tensors both at its top level and under {shown(nested)}; name one with `under` in the"
            " manifest"
        )
    return _collect(path, loaded, nesting=(), outer={})


def _below(path: Path, loaded: dict[Any, Any], under: str) -> StateDict:
    """The state dict behind the keys of `under`; a key may hold dots itself."""
    table, rest = loaded, under
    nesting: list[str] = []
    skipped: list[tuple[str, str]] = []
    while rest:
        keys = [key for key, value in _items(table) if isinstance(key, str) and isinstance(value, dict)]
        found = [key for key in keys if rest == key or rest.startswith(f"{key}.")]
        if not found:
            where = shown(".".join(nesting)) if nesting else "the top"
            raise SourceError(
                f"{path}: has no dict under {shown(under)}; at {where} there {_dicts(table, keys)}; correct `under`"
            )
        key = max(found, key=len)
        skipped += [(".".join([*nesting, f"{k}"]), _type_name(value)) for k, value in _items(table) if k != key]
        table, rest = table[key], rest[len(key) + 1 :]
        nesting.append(key)
    if not _count_tensors(table):
        keys = [key for key, value in _items(table) if isinstance(key, str) and isinstance(value, dict)]
        raise SourceError(
            f"{path}: {shown(under)} holds no tensors; in it there {_dicts(table, keys)}; correct `under`"
        )
    state = _collect(path, table, nesting=tuple(nesting), outer={})
    return StateDict(tensors=state.tensors, nesting=state.nesting, skipped=(*skipped, *state.skipped))


def _dicts(table: dict[Any, Any], keys: list[str]) -> str:
    """For messages: the dicts among the values of a table, and how many tensors each holds."""
    shown_keys = [f"{shown(key)} ({_count_tensors(table[key])} tensors)" for key in keys[:_SHOWN_KEYS]]
    more = ", ..." if len(keys) > _SHOWN_KEYS else ""
    return f"is {', '.join(shown_keys)}{more}" if keys else f"is none among {len(table)} entries"


def _items(table: dict[Any, Any]) -> list[tuple[Any, Any]]:
    # Not table.items(): a pickle can give an OrderedDict an attribute of that name.
    return [(key, table[key]) for key in table]


def _count_tensors(value: object) -> int:
    if not isinstance(value, dict):
        return 0
    return sum(isinstance(value[key], torch.Tensor) for key in value)


def _choose(path: Path, loaded: dict[Any, Any], nested: list[str]) -> str:
    """The key of the state dict among those `nested` keys that lead to tensors."""
    if len(nested) == 1:
        return nested[0]
    for preferred in ("model", "state_dict"):
        if preferred in nested:
            return preferred
    if nested:
        raise SourceError(
            f"{path}: {len(nested)} state dicts, under {shown(nested)}, and none is called 'model' or"
            " 'state_dict'; name the wanted one with `under` in the manifest"
        )
    for key, value in _items(loaded):
        if isinstance(value, dict):
            _refuse_deeper(path, value, f"{key}")
    keys = [key for key, _ in _items(loaded)]
    raise SourceError(
        f"{path}: holds no tensors at its top or one level below (keys {shown(keys)}); save model.state_dict() into it"
    )


def _refuse_deeper(path: Path, table: dict[Any, Any], prefix: str) -> None:
    for key, value in _items(table):
        if _count_tensors(value):
            raise SourceError(
                f"{path}: tensors lie as deep as {shown(f'{prefix}.{key}')}, expected them at the top or one"
                " level below; name the dict that holds them with `under` in the manifest"
            )


def _collect(path: Path, state: dict[Any, Any], *, nesting: tuple[str, ...], outer: dict[Any, Any]) -> StateDict:
    """Sort the entries of the state dict, and of the dict around it, into weights and the rest."""
    prefix = ".".join(nesting)
    _refuse_deeper(path, state, prefix or "the top")
    skipped = [(f"{key}", _type_name(value)) for key, value in _items(outer) if (key,) != nesting]
    tensors: dict[str, torch.Tensor] = {}
    for key, value in _items(state):
        if not isinstance(value, torch.Tensor):
            skipped.append((f"{prefix}.{key}" if prefix else f"{key}", _type_name(value)))
            continue
        if not isinstance(key, str):
            raise SourceError(f"{path}: a tensor has the key {shown(key)}, expected text; save model.state_dict()")
        _check_dense(path, key, value)
        tensors[key] = value
    return StateDict(tensors=tensors, nesting=nesting, skipped=tuple(skipped))


def _type_name(value: object) -> str:
    count = _count_tensors(value)
    return f"dict of {count} tensors" if count else type(value).__name__


def _check_dense(path: Path, name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
        raise SourceError(
            f"{path}: tensor {shown(name)} is sparse or a lazily negated view, expected a dense one;"
            " save a contiguous copy of it"
        )
    check_tensor(path, name, dtype, tensor.shape, tensor.stride())
