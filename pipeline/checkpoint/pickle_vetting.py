"""Inspect a checkpoint's pickle: its contents, and the location of its state dict.

No pickle is ever loaded. `pickle_reader` interprets the opcodes as data, in a process with limits on memory and time,
and calls nothing: tensors become notes, dicts tables, and other objects placeholders with their name. So objects that
trainers save beside the weights do no harm and are no obstacle, and a forged pickle costs its file, not the run. A file
that names a function which runs commands is refused, because it was made to attack others who load it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.pipeline import interrupt
from birkhoff.pipeline.checkpoint import pickle_reader
from birkhoff.pipeline.checkpoint.descriptors import check_tensor
from birkhoff.pipeline.errors import SourceError, UnsafeSourceError
from birkhoff.pipeline.text import shown

# SAM-H describes its 594 tensors in 0.1 MB. A pickle beyond this contains data, not descriptions.
MAX_PICKLE_BYTES = 16 << 20

MAX_TENSORS = 500_000
"""Most tensors of a state dict. A name costs a few bytes in a pickle and a kilobyte later."""

_WALL_SECONDS = 300.0
"""Beyond the reader's limit of processor time, for a loaded machine."""

_POLL_SECONDS = 0.2

_ENVIRONMENT = ("LD_LIBRARY_PATH",)
"""Variables that a Python may need to start."""

# Keys that a message lists.
_SHOWN_KEYS = 10

_REMEDY = "save model.state_dict() where you trust the file, best with safetensors.torch.save_file"

# The protocol that torch.save writes, and the next, which its unpickler still reads.
_PROTOCOLS = (2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageNote:
    """A storage that a pickle names, with its key in the file. `start`, in elements, is for a part of another
    storage."""

    key: str
    dtype: str
    """Type of its elements; empty for bytes."""
    count: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNote:
    """A tensor that a pickle describes: its storage, and its place there in elements. `flaw` says why it is not a
    weight."""

    flaw: str
    storage: StorageNote | None
    dtype: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Table:
    """A dict of a pickle. `others` are entries whose key is not text, under its text."""

    kind: str
    entries: dict[str, "Node"] = field(default_factory=dict)
    others: list[tuple[str, "Node"]] = field(default_factory=list)
    tensors: int = 0
    """Number of entries that are tensors."""

    def items(self) -> list[tuple[str, "Node"]]:
        """Return all entries."""
        return [*self.entries.items(), *self.others]


ELEMENT_BYTES = {
    "": 1,
    **ITEM_BYTES,
    **{"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4},
}
"""Bytes of a storage's element by the dtype that a pickle gives it, empty for bytes; also for types that weights
cannot have."""

Node = Table | TensorNote | str
"""A value in a pickle; the name of its kind if it is neither a dict nor a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The contents of one pickle."""

    root: Node
    texts: tuple[str, ...] | None
    """The root, if it is a list of texts."""
    end: int
    """Bytes from the start of the data to the end of this pickle."""
    foreign: tuple[str, str] | None
    """The first global that tensors and plain containers do not need, and the text before it."""
    storages: dict[str, tuple[str, int]]
    """dtype (empty for bytes) and number of elements of every storage, by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateDict:
    """The state dict of a checkpoint."""

    tensors: dict[str, TensorNote]
    nesting: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def read_pickles(path: Path, data: bytes, count: int = 1) -> tuple[Contents, ...]:
    """Return the contents of the first `count` pickles in `data`; `path` is for messages.

    Raises:
        UnsafeSourceError: One names a function that runs commands or code.
        SourceError: One is incomplete or inconsistent, or takes more memory or time than any checkpoint.
    """
    found = _isolated(path, data, count)
    for note in found["pickles"]:
        if note["command"]:
            raise _unsafe(path, note["command"])
    # After the first loop, so that a pickle which would run code is reported as that, whatever its protocol.
    for note in found["pickles"]:
        if note["protocol"] not in _PROTOCOLS:
            raise SourceError(
                f"{path}: pickle protocol {note['protocol']}, expected 2; load it and torch.save it by default"
            )
    if "corrupt" in found:
        raise SourceError(f"{path}: its pickle is cut short or corrupt ({found['corrupt']}); download it again")
    if "broken" in found:
        raise SourceError(
            f"{path}: its pickle cannot be rebuilt ({found['broken']}); the file is corrupt, download it again"
        )
    return tuple(_contents(note) for note in found["pickles"])


def _isolated(path: Path, data: bytes, count: int) -> dict[str, Any]:
    """Return the answer of `pickle_reader`, run as a process. Raises SourceError if a limit ends it."""
    with tempfile.TemporaryFile() as pickles:  # not a pipe, which would have to be fed while waiting for the answer
        pickles.write(data)
        pickles.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", pickle_reader.__file__, str(count)],
            stdin=pickles,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # It must not see the rest of the environment, least of all a store's keys.
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
    with process:
        try:
            said = _said(process)
        finally:
            process.kill()
    if not said or process.returncode != 0:
        raise SourceError(
            f"{path}: its pickle takes more than {pickle_reader.MEMORY_BYTES >> 20} MiB or"
            f" {pickle_reader.CPU_SECONDS} s to read, which no checkpoint's does; the file is forged or holds far more"
            " than weights, save model.state_dict() alone"
        )
    found: dict[str, Any] = json.loads(said)
    return found


def _said(process: subprocess.Popen[bytes]) -> bytes | None:
    """Return what the process printed before it ended; None if that took too long. Ctrl-C interrupts it."""
    for _ in range(int(_WALL_SECONDS / _POLL_SECONDS)):
        interrupt.check()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_POLL_SECONDS)[0]
    return None


def _contents(note: dict[str, Any]) -> Contents:
    tensors = [_tensor(*facts) for facts in note["tensors"]]
    tables = [Table(kind=table["kind"]) for table in note["tables"]]

    def node(place: Any) -> Node:
        if isinstance(place, str):
            return place
        kind, number = place[0], int(place[1])
        return tables[number] if kind == "table" else tensors[number]

    for table, facts in zip(tables, note["tables"], strict=True):
        table.entries = {key: node(place) for key, place in facts["entries"]}
        table.others = [(key, node(place)) for key, place in facts["others"]]
        table.tensors = sum(isinstance(value, TensorNote) for _, value in table.items())
    texts = None if note["texts"] is None else tuple(note["texts"])
    foreign = None if note["foreign"] is None else (note["foreign"][0], note["foreign"][1])
    storages = {key: (dtype, count) for key, dtype, count in note["storages"]}
    return Contents(root=node(note["root"]), texts=texts, end=note["end"], foreign=foreign, storages=storages)


def _tensor(
    flaw: str, place: list[Any] | None, dtype: str, start: int, shape: list[int], stride: list[int]
) -> TensorNote:
    storage = None
    if place is not None:
        key, kind, count, first = place
        storage = StorageNote(key=key, dtype=kind, count=count, start=first)
    return TensorNote(flaw=flaw, storage=storage, dtype=dtype, start=start, shape=tuple(shape), stride=tuple(stride))


def refuse_code(path: Path, contents: Contents) -> None:
    """Raise UnsafeSourceError if a pickle without weights names an object that only code could make."""
    if contents.foreign:
        raise _unsafe(path, contents.foreign)


def _unsafe(path: Path, wanted: Sequence[str]) -> UnsafeSourceError:
    name, near = wanted
    return UnsafeSourceError(
        f"{path}: its pickle wants to call {shown(name)} (near {shown(near)}), expected nothing but"
        f" tensors and plain containers; {_REMEDY}"
    )


def find_state_dict(path: Path, contents: Contents, under: str | None = None) -> StateDict:
    """Find the state dict in a checkpoint's pickle.

    With `under` it is the dict behind these dotted keys. Otherwise a top-level dict with tensors is the state dict;
    else the only value that is a dict of tensors, with "model" before "state_dict" if there are several.

    Raises:
        UnsafeSourceError: There is none, and an object that only code could make is in its place.
        SourceError: There is none or more than one, or it has tensors that are not dense weights.
    """
    loaded = contents.root
    if not isinstance(loaded, Table):
        if isinstance(loaded, str):
            refuse_code(path, contents)
        kind = "tensor" if isinstance(loaded, TensorNote) else loaded
        raise SourceError(f"{path}: holds a {kind}, expected a dict of tensors; {_REMEDY}")
    if under is not None:
        return _below(path, loaded, under)
    nested = [key for key, value in loaded.entries.items() if _count_tensors(value)]
    if not loaded.tensors:
        key = _choose(path, contents, loaded, nested)
        return _collect(path, loaded.entries[key], nesting=(key,), outer=loaded)
    if nested:
        raise SourceError(
            f"{path}: has tensors both at its top level and under {shown(nested)}; name one with `under` in the"
            " manifest"
        )
    return _collect(path, loaded, nesting=(), outer=Table(kind="dict"))


def _below(path: Path, loaded: Table, under: str) -> StateDict:
    """Return the state dict behind the keys of `under`; keys may contain dots."""
    table, rest = loaded, under
    nesting: list[str] = []
    skipped: list[tuple[str, str]] = []
    while rest:
        inner = {key: value for key, value in table.entries.items() if isinstance(value, Table)}
        found = [key for key in inner if rest == key or rest.startswith(f"{key}.")]
        if not found:
            where = shown(".".join(nesting)) if nesting else "the top"
            raise SourceError(
                f"{path}: has no dict under {shown(under)}; at {where} there {_dicts(table)}; correct `under`"
            )
        key = max(found, key=len)
        skipped += [(".".join([*nesting, k]), _type_name(value)) for k, value in table.items() if k != key]
        table, rest = inner[key], rest[len(key) + 1 :]
        nesting.append(key)
    if not table.tensors:
        raise SourceError(f"{path}: {shown(under)} holds no tensors; in it there {_dicts(table)}; correct `under`")
    state = _collect(path, table, nesting=tuple(nesting), outer=Table(kind="dict"))
    return StateDict(tensors=state.tensors, nesting=state.nesting, skipped=(*skipped, *state.skipped))


def _dicts(table: Table) -> str:
    """List the dicts among the values of a table with their number of tensors, for messages."""
    inner = [(key, value) for key, value in table.entries.items() if isinstance(value, Table)]
    shown_keys = [f"{shown(key)} ({value.tensors} tensors)" for key, value in inner[:_SHOWN_KEYS]]
    more = ", ..." if len(inner) > _SHOWN_KEYS else ""
    return f"is {', '.join(shown_keys)}{more}" if inner else f"is none among {len(table.items())} entries"


def _count_tensors(value: Node) -> int:
    return value.tensors if isinstance(value, Table) else 0


def _choose(path: Path, contents: Contents, loaded: Table, nested: list[str]) -> str:
    """Return the key of the state dict among those that lead to tensors."""
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
    for key, value in loaded.items():
        if isinstance(value, Table):
            _refuse_deeper(path, value, key)
    refuse_code(path, contents)
    keys = [key for key, _ in loaded.items()]
    raise SourceError(
        f"{path}: holds no tensors at its top or one level below (keys {shown(keys)}); save model.state_dict() into it"
    )


def _refuse_deeper(path: Path, table: Table, prefix: str) -> None:
    for key, value in table.items():
        if _count_tensors(value):
            raise SourceError(
                f"{path}: tensors lie as deep as {shown(f'{prefix}.{key}')}, expected them at the top or one"
                " level below; name the dict that holds them with `under` in the manifest"
            )


def _collect(path: Path, state: Node, *, nesting: tuple[str, ...], outer: Table) -> StateDict:
    """Separate the entries of the state dict, and of the dict around it, into weights and others."""
    assert isinstance(state, Table)  # it was chosen for its tensors
    prefix = ".".join(nesting)
    _refuse_deeper(path, state, prefix or "the top")
    skipped = [(key, _type_name(value)) for key, value in outer.items() if (key,) != nesting]
    if state.tensors > MAX_TENSORS:
        raise SourceError(
            f"{path}: a state dict of {state.tensors} tensors, at most {MAX_TENSORS} are allowed; the file is forged"
        )
    for key, value in state.others:
        if isinstance(value, TensorNote):
            raise SourceError(f"{path}: a tensor has the key {_shown_key(key)}, expected text; save model.state_dict()")
    tensors: dict[str, TensorNote] = {}
    for key, value in state.items():
        if not isinstance(value, TensorNote):
            skipped.append((f"{prefix}.{key}" if prefix else key, _type_name(value)))
            continue
        _check_dense(path, key, value)
        tensors[key] = value
    return StateDict(tensors=tensors, nesting=nesting, skipped=tuple(skipped))


def _shown_key(text: str) -> str:
    """Return a non-text key, which came as text, without the quotes of a text."""
    return shown(text)[1:-1]


def _type_name(value: Node) -> str:
    if isinstance(value, TensorNote):
        return "Tensor"
    if isinstance(value, Table):
        return f"dict of {value.tensors} tensors" if value.tensors else value.kind
    return value


def _check_dense(path: Path, name: str, tensor: TensorNote) -> None:
    if tensor.flaw:
        raise SourceError(
            f"{path}: tensor {shown(name)} is {tensor.flaw}, expected a dense one; convert it and save again"
        )
    check_tensor(path, name, tensor.dtype, tensor.shape, tensor.stride)
