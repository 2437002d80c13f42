"""The SAM family as published: models, files, and every tensor of each file, read from `layouts/`.

`family.json` lists models and files; the other files one layout each, like blocks folded into one line. A tensor is
written `NAME KIND SHAPE`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

LAYOUTS = Path(__file__).parent / "layouts"

Kind = Literal["linear", "parameter", "buffer", "counter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a layout. `counter` is an int64 buffer, every other kind is float32."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * (8 if self.kind == "counter" else 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """One published file.

    `modules` are the name prefixes that it holds of its layout, all where empty; `nesting` maps keys of the saved dict
    to the prefix of the names below them (which they lose), a flat state dict where empty; `frozen` is the file whose
    weights it repeats wherever names and shapes agree.
    """

    file: str
    layout: str
    modules: tuple[str, ...] = ()
    nesting: dict[str, str] = field(default_factory=dict)
    frozen: str | None = None

    @property
    def packed(self) -> bool:
        """Whether the checkpoint lies in a zip file."""
        return self.file.endswith(".zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A model of the family, and its published size in MiB where there is one."""

    name: str
    files: tuple[str, ...]
    original_mib: float | None = None


@cache
def members() -> tuple[Member, ...]:
    """The family in the order of the published table, MedSAM last."""
    models = json.loads((LAYOUTS / "family.json").read_text())["models"]
    return tuple(Member(**{**model, "files": tuple(model["files"])}) for model in models)


@cache
def files() -> dict[str, FileSpec]:
    """Every file of the family by its name."""
    found = json.loads((LAYOUTS / "family.json").read_text())["files"]
    specs = (FileSpec(**{**spec, "modules": tuple(spec.get("modules", ()))}) for spec in found)
    return {spec.file: spec for spec in specs}


@cache
def layout(name: str, scale: float = 1.0) -> tuple[TensorSpec, ...]:
    """Tensors of a layout in the order of its state dict, dimensions of 16 and more times `scale`."""
    return tuple(
        TensorSpec(name=head + suffix, kind=kind, shape=_shape(dims, scale))
        for run in json.loads((LAYOUTS / f"{name}.json").read_text())
        for head in _heads(run)
        for suffix, kind, dims in (line.split(" ") for line in run["tensors"])
    )


def tensors_of(spec: FileSpec, scale: float = 1.0) -> tuple[tuple[str, TensorSpec], ...]:
    """(owner, tensor) of everything in a file; the owner is the file that the weights are drawn for."""
    frozen = frozenset(layout(files()[spec.frozen].layout, scale)) if spec.frozen else frozenset()
    return tuple(
        (spec.frozen if spec.frozen and tensor in frozen else spec.file, tensor)
        for tensor in layout(spec.layout, scale)
        if not spec.modules or tensor.name.startswith(spec.modules)
    )


def wanted_files(only: Sequence[str] = ()) -> list[FileSpec]:
    """Files of the models of these names, all where empty, largest first. Raises ValueError."""
    known = {member.name: member for member in members()}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no model {unknown[0]!r} in the family; it has {', '.join(known)}")
    names = dict.fromkeys(file for name in (only or known) for file in known[name].files)
    return sorted((files()[name] for name in names), key=lambda spec: -sum(t.nbytes for t in layout(spec.layout)))


def _heads(run: dict[str, Any]) -> list[str]:
    """Name prefixes of the like blocks of one line."""
    if "from" not in run:
        return [run["block"]]
    return [f"{run['block']}{index}." for index in range(run["from"], run["to"] + 1)]


def _shape(dims: str, scale: float) -> tuple[int, ...]:
    full = () if dims == "scalar" else tuple(map(int, dims.split("x")))
    return tuple(n if n < 16 or scale == 1 else max(8, round(n * scale / 8) * 8) for n in full)
