"""Stored tensors on the lattice to coordinates on a device, to weights, and back: on a GPU many at once.

Importing this module gives the codec's packing its kernels for CUDA tensors: `codec.planes.pack_all` then runs `pack`.

Reference: `birkhoff.codec.tensor.lattice_of`.

Where Triton does not serve the device the reference decodes on the CPU. Tensors of version 1 of the format, which is
written no more, and levels and escapes, which are few, are always read there. A GPU makes the same coordinates and
refuses the same bytes: what can be told without decoding is checked before a byte is copied, a block that does not end
as it should is found at its end.

Shapes: R = rows, P = pairs a row, T = tensors.
"""

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from birkhoff.codec import planes
from birkhoff.codec.container import FORMAT_VERSION, CodedTensor, DifferenceParams, LatticeParams
from birkhoff.codec.contexts import LEVELS
from birkhoff.codec.errors import FormatError
from birkhoff.codec.lattice import LatticeTensor, combine
from birkhoff.codec.planes import Item, Packed
from birkhoff.codec.tensor import base_of, decode_tensor, float_dtype, own_lattice
from birkhoff.codec.trajectory import Escapes
from birkhoff.kernels.decode.op import decode_lattice
from birkhoff.kernels.decode.serving import triton_serves
from birkhoff.kernels.entropy.plan import ALIGNED, Integers, Placed, Plan, bytes_of, plan
from birkhoff.kernels.entropy.staging import send
from birkhoff.kernels.runtime.device import HAS_TRITON

if HAS_TRITON:
    from birkhoff.kernels.entropy import pack as gpu_pack
    from birkhoff.kernels.entropy import triton as entropy_triton

_ROOM = 1 << 16
"""Coordinates outside -128..127 that are listed at first; where there are more, they are listed again."""


def warm_up(device: torch.device | str) -> None:
    """Start what a process starts once for kernels on a device: Triton, and the trial of its code there.

    Half a second, most of it without the interpreter's lock; whatever decodes there first would wait for it.
    """
    triton_serves(torch.device(device))


def lattices_of(coded: Sequence[CodedTensor], device: torch.device | str) -> list[LatticeTensor]:
    """The coordinates of some tensors on the lattice on `device`, in their order; `tensor.lattice_of` of each.

    On a GPU their planes are views of one piece of memory, but for those of differences, which are the sum of two.
    Waits for the device.

    Raises:
        FormatError: a tensor's streams are not what its entry declares; the tensor is named.
        BaseError: a tensor is a difference, and its base is not at hand.
    """
    return [code.to(device) for code in _lattices(coded, torch.device(device))]


def _lattices(coded: Sequence[CodedTensor], device: torch.device) -> list[LatticeTensor]:
    """`lattices_of`, the few escapes of what is no difference still on the CPU: on a GPU all that is computed of them
    is launches that wait."""
    bases = [base_of(one) for one in coded if isinstance(one.params, DifferenceParams)]
    own = _own_lattices([*coded, *bases], device)
    their = iter(own[len(coded) :])
    return [
        _sum(one.name, one.params, next(their).to(device), code.to(device))
        if isinstance(one.params, DifferenceParams)
        else code
        for one, code in zip(coded, own, strict=False)
    ]


def _sum(name: str, params: DifferenceParams, base: LatticeTensor, own: LatticeTensor) -> LatticeTensor:
    try:
        return combine(base, own, times=params.times, stride=params.stride, step=params.step)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from None


def _own_lattices(coded: Sequence[CodedTensor], device: torch.device) -> list[LatticeTensor]:
    """`tensor.own_lattice` of each, the escapes on the CPU."""
    fast = [one for one in coded if one.version == FORMAT_VERSION] if triton_serves(device) else []
    made = iter(_on_gpu(fast, device) if fast else ())
    return [next(made) if fast and one.version == FORMAT_VERSION else _on_cpu(one, device) for one in coded]


def decode_tensors(coded: Sequence[CodedTensor], device: torch.device | str) -> list[Tensor]:
    """Some stored tensors of any codec, dense on `device`, original dtypes and shapes; `tensor.decode_tensor` of each.

    Raises:
        FormatError: a tensor's streams are not what its entry declares; the tensor is named.
    """
    return [found for found in decode(coded, frozenset(), device) if isinstance(found, Tensor)]


def decode(
    coded: Sequence[CodedTensor], as_lattices: Container[str], device: torch.device | str
) -> list[LatticeTensor | Tensor]:
    """The same, but the coordinates of those tensors on the lattice that are named, all in one batch.

    Their escapes may still be on the CPU.
    """
    device = torch.device(device)
    codes = iter(_lattices([one for one in coded if _is_lattice(one)], device))
    others = iter(_moved([decode_tensor(one) for one in coded if not _is_lattice(one)], device))
    found: list[LatticeTensor | Tensor] = []
    for one in coded:
        if not _is_lattice(one):
            found.append(next(others))
        else:
            code = next(codes)
            found.append(code if one.name in as_lattices else _dense(one, code))
    return found


def _is_lattice(coded: CodedTensor) -> bool:
    return isinstance(coded.params, LatticeParams)


def _dense(coded: CodedTensor, code: LatticeTensor) -> Tensor:
    try:
        dtype = float_dtype(coded)
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None
    return decode_lattice(code, dtype).view(coded.shape)


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on a device, each in memory of its own. To a GPU they go as one: each copy would wait."""
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    places = list(accumulate((-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors), initial=0))
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    sent = send(list(zip(places, flat, strict=False)), places[-1], device)
    return [
        sent[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).clone()
        for tensor, place in zip(tensors, places, strict=False)
    ]


def pack(items: Sequence[Item]) -> list[Packed]:
    """`planes.pack_all` of coordinates on a GPU: there, but for matrices of which more groupings are tried."""
    large = [
        item
        for item in items
        if not planes.tries_more(2 * item[0].i.shape[1], 2 * item[0].i.numel()) and triton_serves(item[0].i.device)
    ]
    made = iter(gpu_pack.pack(large) if large else ())
    chosen = {id(item) for item in large}
    return [next(made) if id(item) in chosen else planes.reference_pack(item[0], path=item[1]) for item in items]


planes.register_packer("cuda", pack)


def _on_cpu(coded: CodedTensor, device: torch.device) -> LatticeTensor:
    try:
        code = own_lattice(coded)
        return replace(code, i=code.i.to(device), j=code.j.to(device))
    except FormatError as error:
        raise FormatError(f"tensor {coded.name!r}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """What is being decoded: the planes, and what the kernels report once they are done."""

    plan: Plan
    planes: Tensor
    symbols: Tensor
    numbers: Tensor
    entries: Tensor
    report: Tensor
    """int32 [1 + T]: coordinates outside -128..127, and whether each tensor is damaged."""
    index: Tensor
    value: Tensor


def _on_gpu(coded: Sequence[CodedTensor], device: torch.device) -> list[LatticeTensor]:
    return finish(start(coded, device))


def start(coded: Sequence[CodedTensor], device: torch.device) -> Queued:
    """Queue the decoding of tensors of the present version on a GPU; `finish` waits for it. Raises FormatError."""
    made = plan(coded, entropy_triton.LANES_A_PROGRAM)
    data, numbers, entries = _sent(made, device)
    symbols = torch.empty(made.symbols, dtype=torch.uint8, device=device)
    queued = Queued(
        plan=made,
        planes=torch.empty(made.coordinates, dtype=torch.int8, device=device),
        symbols=symbols,
        numbers=numbers,
        entries=entries,
        report=torch.zeros(1 + len(coded), dtype=torch.int32, device=device),
        index=torch.empty(_ROOM, dtype=torch.int64, device=device),
        value=torch.empty(_ROOM, dtype=torch.int32, device=device),
    )
    frequency = numbers[made.frequencies].view(torch.int16).view(-1, 256)
    rows = numbers[made.blocks].view(-1, entropy_triton.ROW)
    entropy_triton.decode_blocks(data, frequency, rows, symbols, queued.report[1:])
    _place(queued, queued.index, queued.value)
    return queued


def _sent(made: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(streams, numbers of the plan, entries of rows and columns) on the device."""
    begin = -(-made.bytes // ALIGNED) * ALIGNED
    middle = begin + made.numbers.nbytes
    parts = [(run.to, torch.from_numpy(bytes_of(run))) for run in made.runs]
    parts.append((begin, torch.from_numpy(made.numbers).view(torch.uint8)))
    if len(made.levels):
        parts.append((middle, torch.from_numpy(made.levels)))
    sent = send(parts, middle + len(made.levels), device)
    numbers = sent[begin:middle].view(torch.int64)
    return sent, numbers, _entries(sent[middle:], numbers[made.ends])


def _entries(levels: Tensor, ends: Tensor) -> Tensor:
    """64 * rank + level of rows and columns, each part's ranks for itself; `contexts.Addresses` of all tensors."""
    if not len(levels):
        return ends
    lengths = ends.diff(prepend=ends.new_zeros(1))
    part = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), lengths, output_size=len(levels))
    ordered, order = (part * LEVELS + levels).sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(len(ends) * LEVELS, device=ends.device))
    rank = torch.arange(len(levels), device=ends.device) - begins[ordered]
    return torch.empty_like(ordered).index_copy_(0, order, rank * LEVELS + ordered % LEVELS)


def _place(queued: Queued, index: Tensor, value: Tensor) -> None:
    described = queued.numbers[queued.plan.descriptions].view(-1, entropy_triton.PLACE)
    programs = queued.numbers[queued.plan.programs].view(-1, 3)
    entropy_triton.place_symbols(
        queued.symbols,
        queued.entries,
        queued.numbers,
        described,
        programs,
        queued.planes,
        queued.report[:1],
        index,
        value,
    )


def finish(queued: Queued) -> list[LatticeTensor]:
    """Wait, and take over what was decoded. Raises FormatError."""
    outside, *damaged = queued.report.tolist()
    for tensor, bad in zip(queued.plan.tensors, damaged, strict=True):
        if bad:
            raise FormatError(f"tensor {tensor.coded.name!r}: coded stream is corrupt: code by a table is damaged")
    index, value = queued.index, queued.value
    if outside > len(index):
        index, value = index.new_empty(outside), value.new_empty(outside)
        queued.report[:1] = 0
        _place(queued, index, value)
    order = index[:outside].cpu().sort()
    listed = order.values.numpy(), value[:outside].cpu()[order.indices].numpy()
    escapes = _escapes(queued, *listed)
    return [_lattice(queued.planes, *one) for one in zip(queued.plan.tensors, escapes, strict=True)]


def _escapes(queued: Queued, index: Integers, value: npt.NDArray[np.int32]) -> list[Escapes]:
    """The escapes of each tensor in memory, on the CPU; their places in the planes become 0.

    `index` are the places of coordinates outside int8, increasing, `value` they. Where one of a pair is, the other is
    asked for: all of them at once, and all become 0 at once. Here a pair is named by the place of its I in the planes.
    """
    tensors = queued.plan.tensors
    begins = np.array([tensor.begin for tensor in tensors], dtype=np.int64)
    strides = np.array([tensor.stride for tensor in tensors], dtype=np.int64)
    stored = [(number, tensor.stored) for number, tensor in enumerate(tensors) if len(tensor.stored)]
    told = np.concatenate([held.pair.numpy() + begins[number] for number, held in stored] or [np.empty(0, np.int64)])
    of = np.searchsorted(begins, index, side="right") - 1
    first = np.unique(np.where(index >= begins[of] + strides[of], index - strides[of], index))
    first = first[np.isin(first, told, assume_unique=True, invert=True)]
    exact = np.empty((2, 0), dtype=np.int32)
    if len(first):
        both = np.concatenate((first, first + strides[np.searchsorted(begins, first, side="right") - 1]))
        found = queued.planes[torch.from_numpy(both).to(queued.planes.device)].to(torch.int32).cpu().numpy()
        at = np.minimum(np.searchsorted(index, both), len(index) - 1)
        exact = np.where(index[at] == both, value[at], found).reshape(2, -1)
    every = np.concatenate((told, first))
    if not len(every):
        return [Escapes.none()] * len(tensors)
    order = np.argsort(every)
    every = every[order]
    of = np.searchsorted(begins, every, side="right") - 1
    zeros = torch.from_numpy(np.concatenate((every, every + strides[of])))
    queued.planes[zeros.to(queued.planes.device)] = 0
    pair = torch.from_numpy(every - begins[of])
    i, j = (
        torch.from_numpy(np.concatenate((*(getattr(held, name).numpy() for _, held in stored), own))[order])
        for name, own in zip("ij", exact, strict=True)
    )
    ends = np.searchsorted(every, [*begins, np.iinfo(np.int64).max]).tolist()
    return [Escapes(pair=pair[low:high], i=i[low:high], j=j[low:high]) for low, high in itertools.pairwise(ends)]


def _bounds(tensor: Placed) -> tuple[int, int, int]:
    """Where the planes of a tensor begin, and where the second ends."""
    return tensor.begin, tensor.begin + tensor.stride, tensor.begin + 2 * tensor.stride


def _lattice(planes_of_all: Tensor, tensor: Placed, escapes: Escapes) -> LatticeTensor:
    size = tensor.shape[0] * tensor.shape[1]
    i, j = (planes_of_all[begin : begin + size].view(tensor.shape) for begin in _bounds(tensor)[:2])
    return LatticeTensor(i=i, j=j, escapes=escapes, step=tensor.params.step, columns=tensor.params.columns)
