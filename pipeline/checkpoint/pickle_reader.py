"""Read pickles as data: the tensors they describe, with their keys, and the names of everything else. Calls nothing.

This is an interpreter of pickle opcodes that builds no object of any class. A dict becomes a table, a call that
`torch.save` makes for a tensor becomes a description of that tensor, and every other call, class or extension becomes a
placeholder with its name. Keys that are not text are kept as text beside the table, so that only strings from the file
are hashed.

Run as a script it is a process with limits on memory and processor time. It reads pickles from standard input and
prints their contents as JSON, so a forged file costs no more than that process. It uses the standard library only, so
it starts in 20 ms, and under `python -I -S`.

    stdin                the pickles, one after the other
    argv                 their number
    stdout               what `answer` returns; nothing if a limit was exceeded
"""

import gc
import io
import json
import os
import pickletools
import re
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 60

_MAX_RESULT_CHARACTERS = 48 << 20
"""Limit of the result. References can repeat keys: a pickle of 16 MiB could spell out terabytes."""

_NAME_CHARACTERS = 200
_MAX_INTEGER = 1 << 63

_STORAGES = {
    **{f"torch.{kind}Storage": kind.lower() for kind in ("Bool", "BFloat16")},
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.QInt8Storage": "qint8",
    "torch.QUInt8Storage": "quint8",
    "torch.QInt32Storage": "qint32",
    "torch.storage.UntypedStorage": "",
    "torch.UntypedStorage": "",
}
"""Classes of storages, and the dtype of their elements; empty if the tensor states it."""

_UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device, without data",
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "of a device without storages",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of a device without storages",
}
"""Calls that rebuild a tensor which is not a dense weight, and what it is."""

_TABLES = {
    "collections.OrderedDict": "OrderedDict",
    "collections.Counter": "Counter",
    "collections.defaultdict": "defaultdict",
    "builtins.dict": "dict",
    "__builtin__.dict": "dict",
}
_RECONSTRUCTORS = {"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__"}
"""Calls whose first argument is the class of the object."""

# Needed for dense tensors and plain containers, so that messages name what is beyond them.
_PLAIN = {
    *_TABLES,
    *_STORAGES,
    *_UNSUPPORTED,
    "builtins.set",
    "__builtin__.set",
    "builtins.frozenset",
    "__builtin__.frozenset",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.storage.TypedStorage",
    "torch.serialization._get_layout",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}

_DTYPE = re.compile(r"torch\.(bool|[buq]*(int|float|complex|bits)[0-9]\w*|per_(tensor|channel)_affine\w*)")

_COMMAND_MODULES = {
    *("os", "posix", "nt", "subprocess", "pty", "commands", "popen2", "sys", "ctypes", "socket", "shutil", "importlib"),
    *(
        "imp",
        "pkgutil",
        "runpy",
        "code",
        "codeop",
        "marshal",
        "webbrowser",
        "bdb",
        "pdb",
        "timeit",
        "profile",
        "cProfile",
    ),
    *(
        "trace",
        "doctest",
        "pip",
        "urllib.request",
        "urllib2",
        "http.client",
        "httplib",
        "ftplib",
        "smtplib",
        "requests",
    ),
}
_COMMANDS = {
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("eval", "exec", "execfile", "compile")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("open", "__import__", "input")),
    *("io.open", "io.open_code", "io.FileIO", "types.FunctionType", "types.CodeType"),
}
"""Functions that run commands or code, or access files and network. No trainer saves them. Nothing is called either
way, but a file that names one was made to attack others who load it."""

_TEXT_OPS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8"})
_TEXT_OPS_OF_PYTHON_2 = frozenset({"BINSTRING", "SHORT_BINSTRING", "STRING"})
_NUMBER_OPS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_BYTES_OPS = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
_PUT_OPS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET_OPS = frozenset({"GET", "BINGET", "LONG_BINGET"})


class _Mark:
    """Marks where the arguments of an opcode begin on the stack."""


_MARK = _Mark()


@dataclass(frozen=True, slots=True)
class Other:
    """An object that is not a tensor and leads to none, with its name."""

    kind: str


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    name: str


@dataclass(slots=True, eq=False)
class Table:
    """A dict. `others` are entries whose key is not text: the key as text, and the value."""

    kind: str = "dict"
    entries: dict[str, Any] = field(default_factory=dict)
    others: list[tuple[str, Any]] = field(default_factory=list)

    def set(self, key: object, value: object) -> None:
        """Set an entry; a later one with the same text replaces it."""
        if isinstance(key, str):
            self.entries[key] = value
        else:
            self.others.append((_key_text(key), value))


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of the file. `dtype` is empty for bytes; `count` and `start` are in elements."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor. `flaw` says why it is not a dense weight; then the other fields are empty."""

    flaw: str = ""
    storage: Storage | None = None
    dtype: str = ""
    start: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass(slots=True)
class Pickle:
    """The contents of one pickle. `foreign` and `command` are (name, last text before it) of the first such global."""

    root: Any
    end: int
    storages: list[Storage]
    protocol: int
    foreign: tuple[str, str] | None
    command: tuple[str, str] | None


class CorruptError(Exception):
    """The opcodes end too early or are invalid."""


def read(stream: io.BytesIO) -> Pickle:
    """Interpret one pickle; `stream` is then behind its end.

    Raises:
        CorruptError: It is not a complete pickle.
        Exception: Of any kind, for opcodes that do not fit each other.
    """
    machine = _Machine()
    for op, arg in _operations(stream):
        if op == "STOP":
            break
        machine.step(op, arg)
    storages = list(machine.storages.values())
    return Pickle(machine.stack.pop(), stream.tell(), storages, machine.protocol, machine.foreign, machine.command)


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    try:
        for op, arg, _ in pickletools.genops(stream):
            yield op.name, arg
    # A forged pickle can fail anywhere: bad opcode, short argument, absurd length, broken text.
    except (ValueError, EOFError, IndexError, KeyError, OverflowError) as error:
        raise CorruptError(_line(error)) from error


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.protocol = 2
        self.foreign: tuple[str, str] | None = None
        self.command: tuple[str, str] | None = None
        self._texts = deque(["", "", ""], maxlen=3)

    def step(self, op: str, arg: Any) -> None:
        """Execute one opcode."""
        if op in _TEXT_OPS or op in _TEXT_OPS_OF_PYTHON_2:
            self._texts.append(arg)
            self.stack.append(arg)
        elif op in _NUMBER_OPS:
            self.stack.append(arg)
        elif op in _PUT_OPS:
            self.memo[len(self.memo) if arg is None else int(arg)] = self.stack[-1]
        elif op in _GET_OPS:
            found = self.memo[int(arg)]
            if isinstance(found, str):
                self._texts.append(found)
            self.stack.append(found)
        elif op in _BYTES_OPS or op == "BYTEARRAY8":
            self.stack.append(Other("bytes"))
        elif op in _STEPS:
            _STEPS[op](self, arg)
        elif op.startswith("EXT"):
            self._see(f"copyreg extension {arg}", self._texts[2], command=True)
            self.stack.append(Other("copyreg extension"))
        elif op not in ("FRAME", "READONLY_BUFFER"):
            raise ValueError(f"opcode {op} has no place in a checkpoint")

    def marked(self) -> list[Any]:
        """Remove the items above the last mark from the stack, and the mark."""
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        items.reverse()
        return items

    def name(self, name: str, near: str) -> Global:
        """Return a class or function that the pickle names."""
        name = name[:_NAME_CHARACTERS]
        parts = name.split(".")
        modules = {".".join(parts[:depth]) for depth in (1, 2)}
        command = name in _COMMANDS or not modules.isdisjoint(_COMMAND_MODULES)
        if command or not (name in _PLAIN or _DTYPE.fullmatch(name)):
            self._see(name, near, command=command)
        return Global(name)

    def _see(self, name: str, near: str, *, command: bool) -> None:
        found = (name, near[:_NAME_CHARACTERS])
        self.foreign = self.foreign or found
        if command:
            self.command = self.command or found

    def proto(self, version: int) -> None:
        self.protocol = version

    def global_(self, arg: str) -> None:
        # pickletools joins module and name with a blank; nested names contain dots.
        self.stack.append(self.name(arg.replace(" ", ".", 1), self._texts[2]))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a global whose name is no text")
        self.stack.append(self.name(f"{module}.{name}", self._texts[0]))

    def inst(self, arg: str) -> None:
        args = self.marked()
        self.stack.append(_called(self.name(arg.replace(" ", ".", 1), self._texts[2]), tuple(args)))

    def obj(self, _: Any) -> None:
        target, *args = self.marked()
        self.stack.append(_called(target, tuple(args)))

    def reduce(self, _: Any) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        self.stack.append(_called(target, args))

    def newobj_ex(self, _: Any) -> None:
        _keywords, args, target = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(_called(target, args))

    def persistent(self, _: Any) -> None:
        found = _storage(self.stack.pop())
        if isinstance(found, Storage):
            known = self.storages.setdefault(found.key, found)
            if (known.dtype, known.count) != (found.dtype, found.count):
                raise ValueError("a storage of two sizes")
        self.stack.append(found)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def drop_marked(self, _: Any) -> None:
        self.marked()

    def dict_(self, _: Any) -> None:
        table, items = Table(), self.marked()
        _set_all(table, items)
        self.stack.append(table)

    def list_(self, _: Any) -> None:
        self.stack.append(self.marked())

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a tuple of more than there is")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def frozenset_(self, _: Any) -> None:
        self.marked()
        self.stack.append(Other("frozenset"))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(item)

    def appends(self, _: Any) -> None:
        items = self.marked()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_all(self.stack[-1], [key, value])

    def set_items(self, _: Any) -> None:
        items = self.marked()
        _set_all(self.stack[-1], items)

    def build(self, _: Any) -> None:
        """Drop the state: attributes of an object are not weights."""
        self.stack.pop()
        _ = self.stack[-1]

    def push(self, value: object) -> None:
        self.stack.append(value)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.proto,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BINPERSID": _Machine.persistent,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.drop_marked,
    "DUP": _Machine.dup,
    "DICT": _Machine.dict_,
    "LIST": _Machine.list_,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push(Table()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push(Other("set")),
    "FROZENSET": _Machine.frozenset_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BUILD": _Machine.build,
    "MARK": lambda machine, _: machine.push(_MARK),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
}


def _set_all(table: object, items: list[Any]) -> None:
    """Put alternating keys and values into a table; other objects that take items are placeholders anyway."""
    if len(items) % 2:
        raise ValueError("a key without a value")
    if isinstance(table, Table):
        for place in range(0, len(items), 2):
            table.set(items[place], items[place + 1])


def _called(target: object, args: object) -> object:
    """Return the stand-in for a call."""
    if not isinstance(args, tuple):
        raise ValueError("a call whose arguments are no tuple")
    if not isinstance(target, Global):
        return Other("object")
    name = target.name
    if build := _REBUILD.get(name):
        return build(*args)
    if name in _UNSUPPORTED:
        return Tensor(flaw=_UNSUPPORTED[name])
    if name in _TABLES:
        return _table(_TABLES[name], args)
    if name in _RECONSTRUCTORS and args and isinstance(args[0], Global):
        name = args[0].name
    if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
        return args[0]
    return Other({"_codecs.encode": "bytes"}.get(name, name.removeprefix("builtins.").removeprefix("__builtin__.")))


def _table(kind: str, args: tuple[Any, ...]) -> Table:
    """Return a dict, empty or, as Python 2 wrote it, from a list of pairs."""
    table = Table(kind)
    if len(args) == 1 and isinstance(args[0], list):
        for pair in args[0]:
            key, value = pair
            table.set(key, value)
    return table


def _storage(place: object) -> object:
    """Return the storage of a torch.save persistent id: ("storage", class, key, location, elements[, view])."""
    if not (isinstance(place, tuple) and place and isinstance(place[0], str)):
        raise ValueError("a persistent id that torch.save does not write")
    if place[0] == "module" and len(place) > 1 and isinstance(place[1], Global):  # a class with its source
        return place[1]
    kind, key, _location, count, *view = place[1:]
    if place[0] != "storage" or not (isinstance(kind, Global) and isinstance(key, str)):
        raise ValueError("a persistent id that torch.save does not write")
    start = 0
    if view and view[0] is not None:  # (key, start, elements) of a part of a storage, before torch 0.4
        _, start, _ = view[0]
    if kind.name not in _STORAGES:
        return Other(kind.name)
    return Storage(key, _STORAGES[kind.name], _integer(count), _integer(start))


def _tensor(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    _grad: object = None,
    _hooks: object = None,
    *more: Any,
) -> object:
    """Handle `_rebuild_tensor` and `_rebuild_tensor_v2`."""
    return _dense(storage, start, shape, stride, None, more[0] if more else None)


def _tensor_v3(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    *more: Any,
) -> object:
    if not isinstance(dtype, Global):
        raise ValueError("a tensor whose dtype is none")
    return _dense(storage, start, shape, stride, dtype.name.removeprefix("torch."), more[0] if more else None)


def _dense(storage: object, start: object, shape: object, stride: object, dtype: str | None, marks: object) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    if isinstance(marks, Table) and any(marks.entries.get(name) for name in ("neg", "conj")):
        return Tensor(flaw="sparse or a lazily negated view")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        raise ValueError("a tensor whose shape and stride do not fit each other")
    return Tensor(
        storage=storage,
        dtype=storage.dtype if dtype is None else dtype,
        start=_integer(start),
        shape=tuple(map(_integer, shape)),
        stride=tuple(map(_integer, stride)),
    )


def _parameter(data: object, *_: Any) -> object:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without a tensor")
    return data


def _of_type(function: object, kind: object, args: object, *_: Any) -> object:
    """Handle `_rebuild_from_type_v2`: a tensor of another Python class or with attributes, which are dropped."""
    found = _called(function, args)
    plain = isinstance(kind, Global) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    return found if plain or not isinstance(found, Tensor) else Tensor(flaw="of a tensor subclass")


_REBUILD: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INTEGER:
        raise ValueError("a size, stride or offset that is no number of elements")
    return value


def _key_text(key: object) -> str:
    """Return a key that is not text, for messages. A container is given by its kind, because its parts may be shared
    endlessly."""
    if key is None or isinstance(key, bool | float) or (isinstance(key, int) and abs(key) < _MAX_INTEGER):
        return str(key)
    return f"<{_kind(key)}>"


def _kind(value: object) -> str:
    if isinstance(value, Table):
        return value.kind
    if isinstance(value, Other):
        return value.kind
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Storage):
        return "storage"
    if isinstance(value, Global):
        return value.name
    return type(value).__name__


def _line(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


class _Printer:
    """Numbers the tables and tensors that are reachable from a root through dicts; each is written once."""

    def __init__(self) -> None:
        self.tables: list[dict[str, Any]] = []
        self.tensors: list[list[Any]] = []
        self._known: dict[int, list[Any]] = {}
        self._left = _MAX_RESULT_CHARACTERS
        self._queue: list[tuple[dict[str, Any], Table]] = []

    def place(self, value: Any) -> Any:
        """Return ["table", number], ["tensor", number], or the name of another object's kind."""
        if not isinstance(value, Table | Tensor):
            return self._charged(_kind(value))
        if id(value) not in self._known:
            if isinstance(value, Table):
                self._known[id(value)] = ["table", len(self.tables)]
                self.tables.append({"kind": value.kind, "entries": [], "others": []})
                self._queue.append((self.tables[-1], value))
            else:
                self._known[id(value)] = ["tensor", len(self.tensors)]
                storage = value.storage
                place = None if storage is None else [storage.key, storage.dtype, storage.count, storage.start]
                self._left -= 64 + 20 * len(value.shape)
                self.tensors.append([value.flaw, place, value.dtype, value.start, value.shape, value.stride])
        return self._known[id(value)]

    def walk(self) -> None:
        """Number everything below the placed objects."""
        while self._queue:
            note, table = self._queue.pop()
            for name, items in (("entries", table.entries.items()), ("others", table.others)):
                note[name] = [[self._charged(key), self.place(value)] for key, value in items]

    def _charged(self, text: str) -> str:
        self._left -= len(text) + 8
        if self._left < 0:
            raise MemoryError
        return text


def described(pickle: Pickle) -> dict[str, Any]:
    """Return a pickle in JSON's types. Raises MemoryError if the result exceeds its limit."""
    printer = _Printer()
    root = printer.place(pickle.root)
    printer.walk()
    texts = isinstance(pickle.root, list) and all(isinstance(item, str) for item in pickle.root)
    return {
        "root": root,
        "storages": [[storage.key, storage.dtype, storage.count] for storage in pickle.storages],
        "tables": printer.tables,
        "tensors": printer.tensors,
        "texts": pickle.root if texts and sum(map(len, pickle.root)) < _MAX_RESULT_CHARACTERS else None,
        "end": pickle.end,
        "protocol": pickle.protocol,
        "foreign": pickle.foreign,
        "command": pickle.command,
    }


def answer(data: bytes, count: int) -> dict[str, Any]:
    """Return what `main` prints: {"pickles": [...]}, with {"corrupt": why} for bad opcodes, or {"broken": why} for
    opcodes that do not fit, after the pickles before them. Raises MemoryError."""
    stream, found = io.BytesIO(data), list[dict[str, Any]]()
    try:
        for _ in range(count):
            found.append(described(read(stream)))
    except CorruptError as error:
        return {"pickles": found, "corrupt": str(error)}
    except MemoryError:
        raise
    # Opcodes of a forged pickle can fail to fit in any way.
    except Exception as error:
        return {"pickles": found, "broken": _line(error)}
    return {"pickles": found}


def main() -> None:
    """Read pickles from standard input, under limits."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, without a traceback
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.disable()  # collections would cost time, and this process ends soon
    try:
        json.dump(answer(sys.stdin.buffer.read(), int(sys.argv[1])), sys.stdout)
    except MemoryError:
        os._exit(1)  # an orderly exit would need memory
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
