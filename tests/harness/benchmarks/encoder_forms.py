"""One image encoder in many forms: dense, ours, and as other packages quantise it; each can be stored and loaded.

A baseline replaces every `nn.Linear` by a layer of its own, made from the float32 weight, and keeps the rest in the
run's dtype. What it stores is what its own layer gives to be stored, in one `torch.save` file.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from birkhoff.codec.profiles import PROFILES
from birkhoff.pipeline.load.layer_forms import Compute, Memory
from birkhoff.pipeline.load.load import load_into
from birkhoff.pipeline.plan.manifest import Manifest
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.open import open_store
from tests.harness.benchmarks.publishing import compress_here

_PACKED: tuple[Memory, ...] = ("packed12", "packed10")
_MODEL = "encoder"
_REFERENCE = f"{_MODEL}@latest"

State = dict[str, Tensor]
Skeleton = Callable[[], nn.Module]
"""Makes the encoder without weights, on the meta device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A way to hold the weights.

    `store(state, folder)` writes them from the float32 state dict and returns the bytes that lie on disk; `load` makes
    the model that runs, on a device. `least_db` is the output SQNR below which a result is taken for wrong: a model of
    that form that computes the right thing is well above. `captured`: whether its call fits a CUDA graph.
    """

    name: str
    about: str
    dtype: torch.dtype
    store: Callable[[State, Path], int]
    load: Callable[[Path, Skeleton, str], nn.Module]
    least_db: float
    captured: bool = True
    foreign: bool = False
    """Whether another package computes: where that fails it is left out, and the page says why."""
    shares: str | None = None
    """The form, earlier in the list, whose folder this one takes, and loads what lies there."""


def forms(device: str, skeleton: Skeleton, profiles: Sequence[str]) -> list[Form]:
    """Every form that this machine can run on `device`, the float32 original first."""
    half = torch.bfloat16
    run = half if device.startswith("cuda") else torch.float32
    found = [_dense("original float32", torch.float32, 80.0), _dense("original bfloat16", half, 15.0)]
    ours = [_ours(name, run) for name in profiles]
    found += ours
    for form in ours[:1]:
        found.append(_again(form, "int8", compute="int8"))
        found += [_again(form, memory, memory=memory) for memory in _PACKED]
    for baseline in (_torchao(), _hqq(), _bnb_int8(), _bnb_nf4()):
        if baseline is not None:
            found.append(_peer(baseline, run, device, skeleton))
    return found


def _dense(name: str, dtype: torch.dtype, least_db: float) -> Form:
    def store(state: State, folder: Path) -> int:
        save_file({key: tensor.to(dtype) for key, tensor in state.items()}, folder / "model.safetensors")
        return _size(folder)

    def load(folder: Path, skeleton: Skeleton, device: str) -> nn.Module:
        model = skeleton()
        model.load_state_dict(load_file(folder / "model.safetensors", device=device), assign=True)
        return model

    return Form(name=name, about="safetensors", dtype=dtype, store=store, load=load, least_db=least_db)


def _ours(profile: str, dtype: torch.dtype) -> Form:
    """A published artifact in a directory store; every tensor checked while it was made."""

    def store(state: State, folder: Path) -> int:
        source = folder / "source.safetensors"
        save_file(state, source)
        manifest = Manifest.model_validate({"profile": profile, "models": [{"name": _MODEL, "source": str(source)}]})
        run = compress_here(manifest, _url(folder))
        source.unlink()
        if run.version is None:
            raise SystemExit(f"inference: {run.error}")
        return run.version.stored_bytes

    about = f"{PROFILES[profile].summary}; artifact in a store"
    load = partial(_load_ours, dtype, "uint16", "float")
    return Form(name=f"ours, {profile}", about=about, dtype=dtype, store=store, load=load, least_db=15.0)


def _again(form: Form, label: str, *, memory: Memory = "uint16", compute: Compute = "float") -> Form:
    """What one of ours has stored, loaded in another way."""

    def stored(_state: State, folder: Path) -> int:
        with open_store(_url(folder)) as opened:
            return resolve(opened, _REFERENCE).stored_bytes

    return replace(
        form,
        name=f"{form.name}, {label}",
        about=f"{form.about}, loaded as {label}",
        store=stored,
        load=partial(_load_ours, form.dtype, memory, compute),
        least_db=10.0,
        shares=form.name,
    )


def _load_ours(
    dtype: torch.dtype, memory: Memory, compute: Compute, folder: Path, skeleton: Skeleton, device: str
) -> nn.Module:
    model = skeleton()
    load_into(model, _REFERENCE, _url(folder), device=device, memory=memory, compute=compute)
    return model.to(dtype)


def _url(folder: Path) -> str:
    return (folder / "store").absolute().as_uri()


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Another package's layer.

    `quantise` makes it from an `nn.Linear` on the device, `pack` what is stored of it, `unpack` the layer again from
    that and the `nn.Linear` on the meta device that it stands for.
    """

    name: str
    about: str
    quantise: Callable[[nn.Linear, torch.dtype, str], nn.Module]
    pack: Callable[[Any], Mapping[str, Any]]
    unpack: Callable[[Mapping[str, Any], nn.Linear, torch.dtype, str], nn.Module]
    captured: bool = True


def _peer(baseline: Baseline, dtype: torch.dtype, device: str, skeleton: Skeleton) -> Form:
    def store(state: State, folder: Path) -> int:
        model = skeleton()
        model.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, assign=True)
        packed = {
            name: dict(baseline.pack(baseline.quantise(linear, dtype, device))) for name, linear in linears(model)
        }
        inside = {f"{name}.{leaf}" for name in packed for leaf in ("weight", "bias")}
        rest = {key: tensor.to(dtype) for key, tensor in state.items() if key not in inside}
        torch.save({"layers": packed, "rest": rest}, folder / "model.pt")
        return _size(folder)

    def load(folder: Path, skeleton: Skeleton, device: str) -> nn.Module:
        model = skeleton()
        stored = torch.load(folder / "model.pt", map_location=device, weights_only=True, mmap=device == "cpu")
        for name, linear in list(linears(model)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, baseline.unpack(stored["layers"][name], linear, dtype, device))
        model.load_state_dict(stored["rest"], assign=True, strict=False)
        return model.eval()

    about = f"{baseline.about}; torch.save"
    return Form(
        name=baseline.name,
        about=about,
        dtype=dtype,
        store=store,
        load=load,
        least_db=3.0,
        captured=baseline.captured,
        foreign=True,
    )


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every `nn.Linear` of a model and its name."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module


def _torchao() -> Baseline | None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None

    def quantise(linear: nn.Linear, dtype: torch.dtype, _device: str) -> nn.Module:
        layer = linear.to(dtype)
        quantize_(layer, Int8WeightOnlyConfig(version=2))
        return layer

    def unpack(stored: Mapping[str, Any], linear: nn.Linear, _dtype: torch.dtype, _device: str) -> nn.Module:
        for leaf, tensor in stored.items():
            linear.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        return linear

    return Baseline(name="torchao int8", about="weight only, a scale per row; eager", quantise=quantise,
                pack=lambda layer: layer.state_dict(), unpack=unpack)  # fmt: skip


def _hqq() -> Baseline | None:
    try:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError:
        return None

    def quantise(linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
        config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        layer: nn.Module = HQQLinear(linear, config, compute_dtype=dtype, device=device, del_orig=False)
        return layer

    def unpack(stored: Mapping[str, Any], _linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
        layer = HQQLinear(None, None, compute_dtype=dtype, device=device)
        layer.load_state_dict(dict(stored))
        return layer  # type: ignore[no-any-return]

    return Baseline(name="hqq 4 bit", about="groups of 64; PyTorch backend", quantise=quantise,
                pack=lambda layer: layer.state_dict(), unpack=unpack, captured=False)  # fmt: skip


class Flat(nn.Module):
    """A layer that wants its tokens in one dimension: bitsandbytes' int8 refuses the encoder's [B, H, W, K]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        y: Tensor = self.layer(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], -1)


def _bnb() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        return None


def _bnb_int8() -> Baseline | None:
    bnb = _bnb()
    if bnb is None:
        return None

    def empty(linear: nn.Linear, device: str) -> Any:
        return bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device=device
        )

    def quantise(linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
        layer: nn.Module = empty(linear, "cpu")
        layer.load_state_dict({key: tensor.cpu().to(dtype) for key, tensor in linear.state_dict().items()})
        return layer.to(device)

    def unpack(stored: Mapping[str, Any], linear: nn.Linear, _dtype: torch.dtype, _device: str) -> nn.Module:
        layer = empty(linear, "meta")
        codes, scale = stored["weight"], stored["SCB"]
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
        layer.bias = nn.Parameter(stored["bias"], requires_grad=False) if "bias" in stored else None
        return Flat(layer)

    return Baseline(name="bitsandbytes int8", about="LLM.int8(), no outlier columns", quantise=quantise,
                pack=lambda layer: layer.state_dict(), unpack=unpack, captured=False)  # fmt: skip


def _bnb_nf4() -> Baseline | None:
    bnb = _bnb()
    if bnb is None:
        return None

    def empty(linear: nn.Linear, dtype: torch.dtype, device: str) -> Any:
        return bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4",
                                 compute_dtype=dtype, device=device)  # fmt: skip

    def quantise(linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
        layer: nn.Module = empty(linear, dtype, "cpu")
        layer.load_state_dict({key: tensor.cpu().to(dtype) for key, tensor in linear.state_dict().items()})
        return layer.to(device)

    def unpack(stored: Mapping[str, Any], linear: nn.Linear, dtype: torch.dtype, device: str) -> nn.Module:
        layer = empty(linear, dtype, "meta")
        statistics = {key.removeprefix("weight."): v for key, v in stored.items() if key.startswith("weight.")}
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            stored["weight"], statistics, requires_grad=False, device=device, module=layer
        )
        layer.bias = nn.Parameter(stored["bias"], requires_grad=False) if "bias" in stored else None
        return layer  # type: ignore[no-any-return]

    return Baseline(name="bitsandbytes NF4", about="blocks of 64, absmax quantised too", quantise=quantise,
                pack=lambda layer: layer.state_dict(), unpack=unpack, captured=False)  # fmt: skip


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
