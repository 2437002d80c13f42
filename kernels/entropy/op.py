"""Decode stored lattice tensors to coordinates or weights on a device, and encode them: many at once on a GPU.

Importing this module registers the kernels for packing CUDA tensors: `codec.planes.pack_all` then runs `pack`.

Reference: `birkhoff.codec.tensor.lattice_of`.

The reference decodes on the CPU if Triton does not support the device. The CPU also reads tensors of format version 1,
which is no longer written, and levels and escapes, which are few. A GPU makes the same coordinates and refuses the same
bytes. Checks that need no decoding run before any byte is copied. The kernel checks each block's end.

Shapes: R = rows, P = pairs per row, T = tensors.
"""

import itertools
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import contexts, planes, rest
from birkhoff.codec.container import FORMAT_VERSION, CodedTensor, DifferenceParams, LatticeParams
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor, combine, escaped_weights_joined
from birkhoff.codec.native.library import native, pointer
from birkhoff.codec.planes import Item, Packed
from birkhoff.codec.reference import put_escapes
from birkhoff.codec.tensor import base_of, decode_plain, float_dtype, own_lattice
from birkhoff.codec.trajectory import Escapes, theta_from_coordinates
from birkhoff.kernels.decode.op import decode_lattice
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.entropy.plan import ALIGNED, Integers, Placed, Plan, bytes_of, plan
from birkhoff.kernels.entropy.staging import Upload, send, send_into
from birkhoff.kernels.runtime.device import HAS_TRITON, indexed

if HAS_TRITON:
    from birkhoff.kernels.entropy import pack as gpu_pack
    from birkhoff.kernels.entropy import triton as entropy_triton

_ROOM = 1 << 20
"""Coordinates outside -128..127 that the first listing has room for, 24 bytes each on the device. If there are more,
they are listed again."""

_APART = 16
"""Numbers of a multiple of which a report's parts begin and are long."""


def warm_up(device: torch.device | str) -> None:
    """Start what each process starts once for kernels on a device: Triton, a trial of its code there, and each kernel.

    This takes 0.1 s, half of it without the interpreter's lock. Otherwise the first decoding would wait for it.
    """
    _warm_up(indexed(torch.device(device)))


@cache
def _warm_up(device: torch.device) -> None:
    with ThreadPoolExecutor(1, "warm-up") as beside:
        operations = beside.submit(_start_operations, device)
        if triton_serves(device):
            upload = Upload(ALIGNED, device)
            upload.send()
            begin(_SMALLEST, frozenset(), device, upload)()
        operations.result()


def _start_operations(device: torch.device) -> None:
    """Let torch load what a load of a model runs besides our kernels. Most of that time is the driver's."""
    plane = torch.zeros(1, 2, dtype=torch.int8, device=device)
    theta_from_coordinates(plane, plane)
    weights = torch.zeros(2, device=device)
    put_escapes(weights, *(torch.ones(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32)))
    for dtype in (torch.uint8, torch.int64, torch.float32):
        _parts(torch.zeros(2, dtype=dtype, device=device), [1, 1])


_SMALLEST = (
    CodedTensor(
        name="smallest",
        codec="lattice",
        dtype="F32",
        shape=(1, 4),
        params=LatticeParams(path=0, columns=4, step=1.0, escapes=1),
        parts=(
            bytes((rest.RAW, contexts.LEAST_BITS[0], 0, 1, 0, 0, 0)),
            bytes((rest.RAW, *[128] * 4)),
            bytes((rest.RAW, 1, 200, 0, *[0] * 9)),
        ),
    ),
    CodedTensor(name="plain", codec="raw", dtype="F32", shape=(1,), parts=(bytes(4),)),
)
"""Four weights in one group, of which one is an escape, and one more. Decoding them starts every kernel."""


def lattices_of(coded: Sequence[CodedTensor], device: torch.device | str) -> list[LatticeTensor]:
    """Return the coordinates of lattice tensors on `device`, in order: `tensor.lattice_of` of each.

    On a GPU the planes are views of one piece of memory, except those of differences, which are sums. Waits for the
    device.

    Raises:
        FormatError: A tensor's streams do not match its entry. The error names the tensor.
        BaseError: A tensor is a difference whose base is missing.
    """
    return [code.to(device) for code in _begin_lattices(coded, torch.device(device), None)()]


def _begin_lattices(
    coded: Sequence[CodedTensor], device: torch.device, upload: Upload | None
) -> Callable[[], list[LatticeTensor]]:
    """Begin `lattices_of`; the result, when called, ends it. The few escapes stay on the CPU, except those of
    differences: on a GPU each operation on them is a launch that waits."""
    bases = [base_of(one) for one in coded if isinstance(one.params, DifferenceParams)]
    every = [*coded, *bases]
    # Whether Triton serves a GPU may be on trial still, and a plan does not need to know.
    plans = HAS_TRITON if device.type == "cuda" else triton_serves(device)
    fast = [plans and one.version == FORMAT_VERSION for one in every]
    made = _planned([one for one, planned in zip(every, fast, strict=True) if planned], upload) if any(fast) else None
    queued = _start(made, device, upload) if made is not None and triton_serves(device) else None

    def result() -> list[LatticeTensor]:
        codes = iter(finish(queued) if queued is not None else ())
        own = [
            next(codes) if queued is not None and planned else _on_cpu(one, device)
            for one, planned in zip(every, fast, strict=True)
        ]
        their = iter(own[len(coded) :])
        return [
            _sum(one.name, one.params, next(their).to(device), code.to(device))
            if isinstance(one.params, DifferenceParams)
            else code
            for one, code in zip(coded, own, strict=False)
        ]

    return result


def _sum(name: str, params: DifferenceParams, base: LatticeTensor, own: LatticeTensor) -> LatticeTensor:
    try:
        return combine(base, own, times=params.times, stride=params.stride, step=params.step)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from None


def decode_tensors(coded: Sequence[CodedTensor], device: torch.device | str) -> list[Tensor]:
    """Decode stored tensors of any codec on `device`, with original dtypes and shapes: `tensor.decode_tensor` of each.

    Raises:
        FormatError: A tensor's streams do not match its entry. The error names the tensor.
    """
    return [found for found in begin(coded, frozenset(), device)() if isinstance(found, Tensor)]


def begin(
    coded: Sequence[CodedTensor],
    as_lattices: Container[str],
    device: torch.device | str,
    upload: Upload | None = None,
) -> Callable[[], list[LatticeTensor | Tensor]]:
    """Begin `decode_tensors`, but for the coordinates of the lattice tensors that are named.

    All tensors are one batch. A GPU decodes it while the caller goes on. The result, when called, waits for it, and may
    leave escapes on the CPU. Streams in the containers of `upload` are on the device already.

    Raises:
        FormatError: As `decode_tensors`, now or when the result is called.
    """
    device = torch.device(device)
    lattices = _begin_lattices([one for one in coded if _is_lattice(one)], device, upload)
    dense = decode_plain(one for one in coded if not _is_lattice(one))  # meanwhile a GPU decodes the others

    def result() -> list[LatticeTensor | Tensor]:
        codes, others = iter(lattices()), iter(_moved(dense, device))
        found: list[LatticeTensor | Tensor] = []
        for one in coded:
            if not _is_lattice(one):
                found.append(next(others))
            else:
                code = next(codes)
                found.append(code if one.name in as_lattices else _dense(one, code))
        return found

    return result


def _is_lattice(coded: CodedTensor) -> bool:
    return isinstance(coded.params, LatticeParams)


def _dense(coded: CodedTensor, code: LatticeTensor) -> Tensor:
    try:
        dtype = float_dtype(coded)
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None
    return decode_lattice(code, dtype).view(coded.shape)


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors of the CPU to a device, each into its own memory. A GPU gets one copy, because each copy waits."""
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    sizes = [tensor.nbytes for tensor in tensors]
    places = list(accumulate(sizes, initial=0))
    flat = (tensor.reshape(-1).view(torch.uint8) for tensor in tensors)
    own = _parts(send(list(zip(places, flat, strict=False)), places[-1], device), sizes)
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(own, tensors, strict=True)]


def _parts(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return consecutive parts of a tensor, each in its own memory."""
    return torch.split_with_sizes_copy(tensor, sizes)  # type: ignore[func-returns-value,return-value]


@planes.pack_all.register("cuda")
def pack(items: Sequence[Item]) -> list[Packed]:
    """Run `planes.pack_all` on a GPU, except for matrices for which more groupings are tried."""
    large = [
        item
        for item in items
        if not planes.tries_more(2 * item[0].i.shape[1], 2 * item[0].i.numel()) and triton_serves(item[0].i.device)
    ]
    made = iter(gpu_pack.pack(large) if large else ())
    chosen = {id(item) for item in large}
    return [next(made) if id(item) in chosen else planes.reference_pack(item[0], path=item[1]) for item in items]


def _on_cpu(coded: CodedTensor, device: torch.device) -> LatticeTensor:
    try:
        code = own_lattice(coded)
        return replace(code, i=code.i.to(device), j=code.j.to(device))
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Tensors being decoded: the planes, and what the kernels report at the end."""

    plan: Plan
    planes: Tensor
    symbols: Tensor
    numbers: Tensor
    report: "_Report"
    upload: Upload | None
    done: torch.cuda.Event | None
    """Occurs when all is decoded and `report` is in host memory."""


class _Report:
    """What kernels report on T tensors, on the device.

    These are the number of coordinates outside -128..127 (int32 [1]), whether each tensor is damaged (int32 [T]), and
    for each coordinate outside a key (int64 [`room`]) and its pair (int32 [`room`, 2]), see
    `entropy_triton.place_symbols`. The first two are in one piece of memory, so that one copy brings them to the host.
    """

    def __init__(self, tensors: int, room: int, device: torch.device) -> None:
        # Triton would compile the kernels once more for other alignments.
        self._first = torch.zeros(_APART + tensors, dtype=torch.int32, device=device)
        self._host = self._first
        if device.type == "cuda":
            self._host = torch.empty_like(self._first, device="cpu", pin_memory=True)
        self.count: Tensor = self._first[:1]
        self.damaged: Tensor = self._first[_APART:]
        self.key: Tensor = torch.empty(-(-room // _APART) * _APART, dtype=torch.int64, device=device)
        self.value: Tensor = torch.empty(len(self.key), 2, dtype=torch.int32, device=device)

    def bring(self) -> None:
        """Queue the copy of both numbers to host memory."""
        if self._host is not self._first:
            self._host.copy_(self._first, non_blocking=True)

    def brought(self) -> tuple[int, list[int]]:
        """Return (count, damaged). The copy must have ended."""
        return int(self._host[0]), self._host[_APART:].tolist()

    def outside(self, count: int) -> "_Outside":
        """Return the keys and the pairs of coordinates outside, in host memory."""
        return self.key[:count].cpu().numpy(), self.value[:count].cpu().numpy()


def start(coded: Sequence[CodedTensor], device: torch.device) -> Queued:
    """Queue the decoding of tensors of the present version on a GPU. `finish` waits for it. Raises FormatError."""
    return _start(_planned(coded, None), device, None)


def _planned(coded: Sequence[CodedTensor], upload: Upload | None) -> Plan:
    if upload is None:
        return plan(coded, entropy_triton.LANES_A_PROGRAM)
    return plan(coded, entropy_triton.LANES_A_PROGRAM, upload.runs, upload.host.nbytes)


def _start(made: Plan, device: torch.device, upload: Upload | None) -> Queued:
    with upload.decoding() if upload is not None else nullcontext():
        return _queue(made, device, upload)


def _queue(made: Plan, device: torch.device, upload: Upload | None) -> Queued:
    data = _streams_of(made, device, upload)
    numbers = _sent(made, device)
    report = _Report(len(made.tensors), _ROOM, device)
    symbols = torch.empty(made.symbols, dtype=torch.uint8, device=device)
    planes_of_all = torch.empty(made.coordinates, dtype=torch.int8, device=device)
    frequency = numbers[made.frequencies].view(torch.int16).view(-1, 256)
    rows = numbers[made.blocks].view(-1, entropy_triton.ROW)
    entropy_triton.decode_blocks(data, frequency, rows, symbols, report.damaged)
    done = torch.cuda.Event() if device.type == "cuda" else None
    queued = Queued(
        plan=made,
        planes=planes_of_all,
        symbols=symbols,
        numbers=numbers,
        report=report,
        upload=upload,
        done=done,
    )
    _place(queued, report)
    if done is not None:
        done.record()
    return queued


def _streams_of(made: Plan, device: torch.device, upload: Upload | None) -> Tensor:
    """Return the streams on the device: those of an upload, and all others."""
    runs = [(run.to, torch.from_numpy(bytes_of(run))) for run in made.runs]
    if upload is None:
        return send(runs, made.bytes, device)
    if not runs:
        return upload.data
    data = torch.empty(made.bytes, dtype=torch.uint8, device=device)
    data[: upload.data.numel()] = upload.data
    first = made.runs[0].to
    send_into(data[first:], [(to - first, part) for to, part in runs])
    return data


def _sent(made: Plan, device: torch.device) -> Tensor:
    """Return the numbers of the plan on the device."""
    parts = [(8 * begin, torch.from_numpy(part).view(torch.uint8)) for begin, part in made.numbers.parts]
    return send(parts, 8 * made.numbers.size, device, kept=True).view(torch.int64)  # by `Queued.plan`


def _place(queued: Queued, report: _Report) -> None:
    described = queued.numbers[queued.plan.descriptions].view(-1, entropy_triton.PLACE)
    programs = queued.numbers[queued.plan.programs].view(-1, 3)
    entropy_triton.place_symbols(
        queued.symbols,
        queued.numbers[queued.plan.entries],
        queued.numbers,
        described,
        programs,
        queued.planes,
        queued.numbers[queued.plan.told],
        report.count,
        report.key,
        report.value,
    )
    report.bring()


def finish(queued: Queued) -> list[LatticeTensor]:
    """Wait, and take over what was decoded. Raises FormatError."""
    tensors = queued.plan.tensors
    if queued.done is not None:
        queued.done.synchronize()
        queued.planes.record_stream(torch.cuda.current_stream(queued.planes.device))  # used there from now on
    report = queued.report
    count, damaged = report.brought()
    for tensor, bad in zip(tensors, damaged, strict=True):
        if bad:
            raise FormatError(f"tensor {tensor.coded.name!r}: coded stream is corrupt: code by a table is damaged")
    if count < 0:
        raise FormatError(f"{count % (1 << 32)} coordinates are outside int8; fewer than 2^31 are allowed")
    if count > len(report.key):
        report = _listed_again(queued, count)
    every, ends = _escapes(queued.plan, report.outside(count))
    own = [
        Escapes(pair=every.pair[low:high], i=every.i[low:high], j=every.j[low:high])
        for low, high in itertools.pairwise([0, *ends])
    ]
    codes = [_lattice(queued.planes, *one) for one in zip(tensors, own, strict=True)]
    return codes if queued.done is None else _with_weights(codes, every, queued.planes.device)


def _with_weights(codes: Sequence[LatticeTensor], every: Escapes, device: torch.device) -> list[LatticeTensor]:
    """Return the codes with the weights of their escapes, which go to a GPU together: each copy waits for it.

    `every` holds all escapes.
    """
    if not len(every):
        return list(codes)
    index, value, counts = escaped_weights_joined(codes, every)
    joined = [send([(0, part.view(torch.uint8))], part.nbytes, device).view(part.dtype) for part in (index, value)]
    weights = zip(*(_parts(part, counts) for part in joined), strict=True)
    return [
        replace(code, escapes=replace(code.escapes, weights=own)) if len(code.escapes) else code
        for code, own in zip(codes, weights, strict=True)
    ]


def _listed_again(queued: Queued, count: int) -> _Report:
    """Return a report of all coordinates outside -128..127, for which there was no room at first."""
    device = queued.planes.device
    with queued.upload.decoding() if queued.upload is not None else nullcontext():
        report = _Report(len(queued.plan.tensors), count, device)
        _place(queued, report)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return report


_Told = tuple[Integers, npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Escapes that are stored: the places of I in the planes, increasing, I and J."""

_Outside = tuple[Integers, npt.NDArray[np.int32]]
"""Coordinates outside int8, in any order: keys, and pairs, as in `entropy_triton.place_symbols`."""

_Merged = tuple[Integers, npt.NDArray[np.int32], npt.NDArray[np.int32], list[int]]
"""Pairs in their tensors; I; J; how many there are up to each tensor's end."""


def _escapes(made: Plan, outside: _Outside) -> tuple[Escapes, list[int]]:
    """Return the escapes of all tensors in memory, on the CPU: those that are stored, and those outside int8.

    Also return how many there are up to each tensor's end.
    """
    begins = np.array([*(tensor.begin for tensor in made.tensors), made.coordinates], dtype=np.int64)
    merge = _native_merge if native() is not None else _merge
    pair, i, j, ends = merge(begins, (made.stored.pair, made.stored.i, made.stored.j), outside)
    return Escapes(pair=torch.from_numpy(pair), i=torch.from_numpy(i), j=torch.from_numpy(j)), ends


def _native_merge(begins: Integers, told: _Told, outside: _Outside) -> _Merged:
    """`_merge` by the native library."""
    library, count = native(), len(outside[0])
    assert library is not None
    key, value = np.empty((2, 2, count), dtype=np.int64)
    key[0], value[0] = outside[0], outside[1].view(np.int64)[:, 0]
    room = len(told[0]) + count
    pair, ends = np.empty(room, dtype=np.int64), np.empty(len(begins) - 1, dtype=np.int64)
    i, j = np.empty((2, room), dtype=np.int32)
    arrays = key, value, pair, i, j, ends
    own = pointer(begins), len(told[0]), *map(pointer, told)
    found = library.birkhoff_merge_escapes(len(ends), *own, count, *map(pointer, arrays))
    return pair[:found], i[:found], j[:found], ends.tolist()


def _merge(begins: Integers, told: _Told, outside: _Outside) -> _Merged:
    """Merge escapes that are stored with the pairs that have a coordinate outside int8, of which they override some.

    `begins` are the begins of all tensors' planes, and the end of the last.
    """
    order = outside[0].argsort()
    place, both = outside[0][order] // 2, outside[1][order]
    # If both coordinates of a pair are outside, its first entry has the right I and its last the right J.
    first, last = (np.diff(place, **end) != 0 for end in ({"prepend": -1}, {"append": -1}))
    own, i, j = place[first], both[first, 0], both[last, 1]
    other = np.isin(own, told[0], assume_unique=True, invert=True)
    every = np.concatenate((told[0], own[other]))
    order = np.argsort(every)
    every = every[order]
    of = np.searchsorted(begins, every, side="right") - 1
    i, j = (np.concatenate((held, own[other]))[order] for held, own in ((told[1], i), (told[2], j)))
    ends = np.searchsorted(every, begins[1:]).tolist()
    return every - begins[of], i, j, ends


def _bounds(tensor: Placed) -> tuple[int, int, int]:
    """Return where the planes of a tensor begin, and where the second one ends."""
    return tensor.begin, tensor.begin + tensor.stride, tensor.begin + 2 * tensor.stride


def _lattice(planes_of_all: Tensor, tensor: Placed, escapes: Escapes) -> LatticeTensor:
    size = tensor.shape[0] * tensor.shape[1]
    i, j = (planes_of_all[begin : begin + size].view(tensor.shape) for begin in _bounds(tensor)[:2])
    return LatticeTensor(i=i, j=j, escapes=escapes, step=tensor.params.step, columns=tensor.params.columns)
