"""The form in which linear layers of a loaded model hold their weights, and the arithmetic they use."""

import warnings
from collections.abc import Callable, Collection
from typing import Literal, get_args

import torch

from birkhoff.codec import packed
from birkhoff.codec.errors import BirkhoffWarning, CodecError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.packed import Bits
from birkhoff.codec.reference import extra_columns, plane_columns
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.kernels.int8.op import MOST_COLUMNS
from birkhoff.kernels.int8.plan import LEAST_ROWS

Memory = Literal["uint16", "packed12", "packed10"]
"""8 bits per weight, exactly as stored; or about 6.06 or 5.06, coded once more with loss."""

_PACKED: dict[str, tuple[Bits, float]] = {"packed12": (12, 24.0), "packed10": (10, 18.0)}
"""Bits per pair, and the SQNR in dB relative to the stored weights below which a layer is not packed.

Normally distributed weights keep 31.7 and 25.7 dB. Weights that keep 7 dB less have a tail that does not suit the form.
"""

Compute = Literal["float", "int8", "proven"]
"""In the dtype of the input; on int8 tensor cores, with the input rounded to int8 token by token; or on int8 only in
the layers whose outputs keep their accuracy by the version's proof."""

_MOST_EXTRA = 0.25
"""Further columns for outliers, as a share of a layer's own, above which int8 saves little."""

_FREE_EXTRA = 256
"""Further columns that do not matter, because launches dominate the time of small layers."""

_SHOWN = 5


class LayerMaker:
    """Makes the layers of one load. `report` then warns of those that keep the first form.

    `made` holds them by the name of their weight. Under int8, layers whose weights are in `in_float` compute in float.
    With `everywhere`, all others compute on int8, even those that it makes slower.

    Raises:
        CodecError: `memory` or `compute` is no valid form, or int8 is requested with a packed form.
    """

    def __init__(
        self,
        memory: Memory,
        compute: Literal["float", "int8"] = "float",
        *,
        in_float: Collection[str] = (),
        everywhere: bool = False,
    ) -> None:
        check_forms(memory, compute)
        self.made: dict[str, CompressedLinear] = {}
        self._memory, self._compute = memory, compute
        self._in_float, self._everywhere = frozenset(in_float), everywhere
        self._refused: list[str] = []

    def __call__(
        self, name: str, code: LatticeTensor, *, bias: torch.Tensor | None = None, dtype: torch.dtype
    ) -> CompressedLinear:
        """Return the layer for a coded matrix, on its device. `dtype` and `bias` are those of the linear layer."""
        make: Callable[..., CompressedLinear] = HyperLinear.from_lattice
        held: object = code
        if self._memory != "uint16":
            bits, floor = _PACKED[self._memory]
            code = code.to(code.i.device)
            form = packed.pack(code, bits)
            found = fidelity(code.decode(), form.decode()).sqnr_db
            size = 8 * form.nbytes / (code.i.shape[0] * code.columns)
            if found >= floor and size < 8:
                make, held = PackedHyperLinear.from_packed, form
            else:
                self._refused.append(f"{name} ({found:.1f} dB, {size:.2f} bits a weight)")
        elif self._compute == "int8" and name not in self._in_float and (self._everywhere or _pays(code)):
            if (reason := _obstacle(code)) is None:
                make = Int8HyperLinear.from_lattice
            else:
                self._refused.append(f"{name} ({reason})")
        self.made[name] = layer = make(held, bias=bias, dtype=dtype)
        return layer

    def report(self) -> None:
        """Issue one BirkhoffWarning that names the layers that do not suit the requested form, if any."""
        if not self._refused:
            return
        count, more = len(self._refused), ", ..." if len(self._refused) > _SHOWN else ""
        if self._compute == "int8":
            text = f"{count} layers compute in float, because int8 would be slower or overflow"
        else:
            _, floor = _PACKED[self._memory]
            text = f"{count} layers keep 16 bits a pair, because {self._memory} would hold them at less than "
            text += f"{floor:g} dB or save nothing"
        warnings.warn(f"{text}: {', '.join(self._refused[:_SHOWN])}{more}", BirkhoffWarning, stacklevel=3)


def check_forms(memory: str, compute: str) -> None:
    """Raise CodecError if a form is not valid, or if the two exclude each other."""
    for name, value, known in (("memory", memory, get_args(Memory)), ("compute", compute, get_args(Compute))):
        if value not in known:
            raise CodecError(f"{name} {value!r}: expected one of {', '.join(known)}")
    if compute != "float" and memory != "uint16":
        raise CodecError(f"compute {compute!r} multiplies coordinates as stored, and {memory} has others: use uint16")


def _pays(code: LatticeTensor) -> bool:
    return not code.i.is_cuda or code.i.shape[0] >= LEAST_ROWS


def _obstacle(code: LatticeTensor) -> str | None:
    """Return why a matrix is not multiplied on int8 tensor cores, or None."""
    extra = extra_columns(code)
    if plane_columns(code.columns, extra) > MOST_COLUMNS:
        return f"{code.columns} columns"
    return f"{extra} further columns for outliers" if extra > max(_FREE_EXTRA, _MOST_EXTRA * code.columns) else None
