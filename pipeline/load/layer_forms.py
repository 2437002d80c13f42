"""In which form the linear layers of a loaded model hold their weights."""

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch

from birkhoff.codec import packed
from birkhoff.codec.errors import BirkhoffWarning, CodecError
from birkhoff.codec.lattice import LatticeTensor
from birkhoff.codec.metrics import fidelity
from birkhoff.codec.packed import Bits
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear

Memory = Literal["uint16", "packed12", "packed10"]
"""8 bits a weight, exactly what is stored; or about 6.06 or 5.06, coded once more with loss."""

_PACKED: dict[str, tuple[Bits, float]] = {"packed12": (12, 24.0), "packed10": (10, 18.0)}
"""Bits a pair, and the SQNR in dB against the stored weights below which a layer is not packed.

Normally distributed weights keep 31.7 and 25.7 dB; what lies 7 dB below has a tail that the form does not suit.
"""

_SHOWN = 5


class LayerMaker:
    """Makes the layers of one load; `report` then warns of those that keep the uint16 form.

    Raises:
        CodecError: `memory` is no form.
    """

    def __init__(self, memory: Memory) -> None:
        if memory not in get_args(Memory):
            raise CodecError(f"memory {memory!r}: one of {', '.join(get_args(Memory))} was expected")
        self._memory = memory
        self._refused: list[str] = []

    def __call__(
        self, name: str, code: LatticeTensor, *, bias: torch.Tensor | None = None, dtype: torch.dtype
    ) -> CompressedLinear:
        """The layer of a coded matrix, on its device; `dtype` and `bias` are those of the linear layer."""
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
        return make(held, bias=bias, dtype=dtype)

    def report(self) -> None:
        """One BirkhoffWarning that names the layers that the packed form does not suit, if there are any."""
        if not self._refused:
            return
        _, floor = _PACKED[self._memory]
        more = ", ..." if len(self._refused) > _SHOWN else ""
        warnings.warn(
            f"{len(self._refused)} layers keep 16 bits a pair, because {self._memory} would hold them at less than "
            f"{floor:g} dB or save nothing: {', '.join(self._refused[:_SHOWN])}{more}",
            BirkhoffWarning,
            stacklevel=3,
        )
