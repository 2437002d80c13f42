"""The commands that run models: `segment` and `evaluate`."""

import contextlib
import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from birkhoff.pipeline.cli.app import (
    JsonOption,
    ReferenceArgument,
    StoreOption,
    app,
    complain,
    is_quiet,
    notes,
    output,
    print_json,
    remark,
    warn,
)
from birkhoff.pipeline.cli.tables import Column
from birkhoff.pipeline.errors import EXIT_CODES, ValidationError
from birkhoff.pipeline.text import fixed

BuilderOption = Annotated[
    str | None,
    typer.Option(
        metavar="B",
        help="Code that builds the model: module:function, FILE.py:function, or a transformers configuration (.json or "
        "its folder). Default: the configuration beside the weights, or the architecture the tensors imply.",
    ),
]
UpstreamOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Clone of the publishers' repository, if their code is not a package."),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(metavar="A", help="Member of the family (med_sam, sam, ...), instead of the artifact's."),
]
ComputeOption = Annotated[
    Literal["float", "int8", "proven"],
    typer.Option(
        help="What the compressed model's linear layers compute on; int8 rounds their inputs, token by token, proven "
        "does so where the version's proof found that it keeps their outputs."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1. Default: the GPU, if there is one.")
]

PICTURE_COLUMN = Column(title="picture", key="image")
SEGMENT_COLUMNS = (
    PICTURE_COLUMN,
    Column(title="prompt", key="prompt"),
    Column(title="pixels", key="pixels", right=True),
    Column(title="original's", key="pixels_original", right=True),
    Column(title="IoU", key="iou", form=fixed(4), right=True),
)


@app.command()
def segment(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A picture or a folder of pictures.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL[@REF]", help="The model, or a pulled folder.")],
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE.png", help="The picture to write, or the folder for a folder of pictures."
        ),
    ],
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A pixel of an object. Repeatable: one object each.")
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="The box of an object. Repeatable: one object each.")
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Find all objects by a grid of points, as the publishers' generators do."),
    ] = False,
    grid: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="With --everything: prompt with N x N points. Published: 32."),
    ] = None,
    predicted_iou: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="IOU", help="With --everything: least IoU that the model predicts. Published: 0.88."
        ),
    ] = None,
    stability: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="IOU", help="With --everything: least stability under the threshold. Published: 0.95."
        ),
    ] = None,
    crop_layers: Annotated[
        int | None,
        typer.Option(min=0, max=4, metavar="N", help="With --everything: repeat on 4, 16, ... crops. Published: 0."),
    ] = None,
    min_region: Annotated[
        int | None,
        typer.Option(min=0, metavar="PIXELS", help="With --everything: fill holes and remove islands below this size."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="SOURCE", help="Draw this checkpoint's masks too, and print the IoU with them."),
    ] = None,
    builder: BuilderOption = None,
    upstream: UpstreamOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment a picture, or each picture of a folder, with a compressed model, and draw the masks.

    Pictures of a folder that cannot be read are skipped and counted.
    """
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.errors import PictureError
    from birkhoff.pipeline.load.builders import original_model
    from birkhoff.pipeline.segment import draw
    from birkhoff.pipeline.segment.adapters.families import segmenter_of
    from birkhoff.pipeline.segment.compressed import compressed_segmenter
    from birkhoff.pipeline.segment.everything import points_asked, published
    from birkhoff.pipeline.segment.pictures import Asked, outputs_of, read_asked, segmented

    if everything == bool(point or box):
        raise typer.BadParameter("expected prompts (--point, --box), or --everything", param_hint="--point")
    of_folder = image.is_dir()
    places = outputs_of(image, out)
    for place in places.values():
        draw.check_writable(place)
    first: Asked | None = None if of_folder else read_asked(image, point, box)
    on = chosen_device(device)
    models = [
        compressed_segmenter(model, store, builder=builder, upstream=upstream, near=against, adapter=adapter, device=on)
    ]
    if against is not None:
        theirs = original_model(against, builder=builder, upstream=upstream, reference=model, store=store, device=on)
        models.append(segmenter_of(theirs, models[0].family))
    settings = {"across": grid, "predicted_iou": predicted_iou, "stability": stability}
    settings |= {"crop_layers": crop_layers, "smallest": min_region}
    how = published(models[0].family, **settings) if everything else None
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    points = 0 if how is None else points_asked(how) * len(models)
    with counting(
        *((len(places), "pictures") if of_folder else (points, "points")), quiet=as_json or is_quiet()
    ) as done:
        for path, place in places.items():
            try:
                asked = first or read_asked(path, point, box)
                found = segmented(models, asked, how, (lambda _: None) if of_folder else done)
            except PictureError as error:
                if not of_folder:
                    raise
                skipped.append(str(error))
            else:
                draw.save(draw.picture(asked.pixels, asked.prompts, found.masks, found.original), place)
                rows += [{"image": path.name, **row} for row in found.rows()]
            if of_folder:
                done(1)
    if len(skipped) == len(places):
        raise PictureError(f"{image}: none of its {len(places)} pictures can be segmented: {skipped[0]}")
    shown = {"prompt", "pixels", *(["image"] if of_folder else []), *(["pixels_original", "iou"] if against else [])}
    columns = [column for column in SEGMENT_COLUMNS if column.key in shown]
    show(output(), columns, [{key: row[key] for key in row if key in shown} for row in rows], as_json=as_json)
    if skipped:
        more = "" if len(skipped) == 1 else f", and {len(skipped) - 1} more"
        warn(f"{len(skipped)} of {len(places)} pictures skipped: {skipped[0]}{more}")
    if not as_json:
        remark(f"drawn: {len(places) - len(skipped)} pictures in {out}" if of_folder else f"drawn: {out}")


KIND_COLUMNS = (
    Column(title="prompt", key="kind"),
    Column(title="prompts", key="prompts", right=True),
    *(
        Column(title=f"{title}, {which}", key=f"{key}_{which}", form=fixed(4), right=True)
        for title, key in (("agreement", "agreement"), ("original IoU", "original_iou"), ("ours", "compressed_iou"))
        for which in ("mean", "worst")
    ),
)
BLOCK_COLUMNS = (
    Column(title="block", key="block"),
    Column(title="output SQNR dB", key="sqnr_db", form=fixed(2), right=True),
)
SCORE_COLUMNS = (
    Column(title="measure", key="measure"),
    *(Column(title=key, key=key, form=fixed(4), right=True) for key in ("original", "compressed")),
    Column(title="difference", key="difference", form="{:+.4f}".format, right=True),
)
SKIPPED_COLUMNS = (
    Column(title="what", key="what"),
    Column(title="why", key="reason"),
    Column(title="how many", key="count", right=True),
    Column(title="the first of them", key="first", form=", ".join, rank=1),
)
_SHOWN_IMAGES = 10
_OF_MASKS = "--annotations, --boxes, --random, --fail-below, --adapter"


class Truth(StrEnum):
    """The masks to compare with."""

    annotations = "annotations"
    results = "results"


class Multimask(StrEnum):
    """The mask to take from a model that returns several."""

    single = "single"
    best = "best"


class Metric(StrEnum):
    """The measure for comparing masks with the truth."""

    iou = "iou"
    ap = "ap"


@app.command()
def evaluate(
    reference: ReferenceArgument,
    against: Annotated[Path, typer.Option(metavar="SOURCE", help="The original checkpoint, or its folder.")],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of pictures.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="F", help="FILE.py:function or module:function that gives batches, to compare any module."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="COCO or LVIS annotations, or a folder of SA-1B's. Default: prompts on a grid."
        ),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(metavar="RESULTS", help="A detector's results in COCO's form, whose boxes become the prompts."),
    ] = None,
    truth: Annotated[
        Truth, typer.Option(help="With --boxes and --metric iou: the masks to compare with.")
    ] = Truth.annotations,
    multimask: Annotated[
        Multimask, typer.Option(help="The model's single mask, or its best by predicted IoU.")
    ] = Multimask.single,
    metric: Annotated[
        str,
        typer.Option(
            metavar="M",
            help="iou: IoU with the truth. ap: average precision as COCO and LVIS define it, with --boxes. With "
            "--inputs: FILE.py:function or module:function of both models' outputs for all batches.",
        ),
    ] = Metric.iou.value,
    random: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Prompt for N annotated objects per picture, by box and pixel, drawn by --seed."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of --random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N pictures.")] = None,
    grid: Annotated[
        int,
        typer.Option(min=1, max=64, metavar="N", help="Without annotations: prompt with N x N points and N x N boxes."),
    ] = 4,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            min=0.0,
            max=1.0,
            metavar="IOU",
            help="Exit with code 12 if the mean agreement of any kind of prompt is lower.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write a JSON file, or a page if it ends in .html."),
    ] = None,
    builder: BuilderOption = None,
    upstream: UpstreamOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    compute: ComputeOption = "float",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a compressed model's masks with the original's on the same pictures and prompts: mean and worst.

    With annotations, both are also compared with these. Unusable pictures, annotations and results are skipped, counted
    and listed. With --inputs, the outputs of any module are compared instead.
    """
    from birkhoff.pipeline.files import atomic_write
    from birkhoff.pipeline.report.evaluation import page
    from birkhoff.pipeline.segment import evaluate as job
    from birkhoff.pipeline.segment.dataset import Protocol, open_dataset

    if (images is None) == (inputs is None):
        raise typer.BadParameter("expected pictures for masks (--images), or batches (--inputs)", param_hint="--images")
    if inputs is not None:
        if annotations or boxes or random or fail_below is not None or adapter:
            raise typer.BadParameter("goes with masks, not with --inputs", param_hint=_OF_MASKS)
        where: dict[str, Any] = {
            "store": store,
            "builder": builder,
            "upstream": upstream,
            "device": chosen_device(device),
            "compute": compute,
        }
        own = None if metric == Metric.iou.value else metric
        _evaluate_outputs(reference, against, inputs, own, **where, out=out, as_json=as_json)
        return
    assert images is not None
    if metric not in set(Metric):
        expected = "expected iou or ap, or with --inputs a function"
        raise typer.BadParameter(f"{expected}, got {metric!r}", param_hint="--metric")
    by_precision = metric == Metric.ap.value
    for option, given, wrong, needs in (
        ("--boxes", boxes, annotations is None, "--annotations: the pictures and objects that its rows are about"),
        ("--truth", truth is Truth.results, boxes is None or by_precision, "--boxes, and --metric iou"),
        ("--metric", by_precision, boxes is None, "--boxes: the detector's rows have the scores and categories"),
        ("--metric", by_precision, annotations and annotations.is_dir(), "a file of COCO's or LVIS' annotations"),
        ("--random", random, annotations is None or boxes, "--annotations, and no --boxes"),
    ):
        if given and wrong:
            raise typer.BadParameter(f"expected with it {needs}", param_hint=option)
    protocol = Protocol(
        boxes=boxes, truth=truth.value, multimask=multimask.value, metric=Metric(metric).value, random=random, seed=seed
    )
    data = open_dataset(images, annotations, limit=limit, grid=grid, protocol=protocol)
    place = chosen_device(device)
    with counting(len(data.pictures), "pictures", quiet=as_json or is_quiet()) as advanced:
        found = job.evaluate(
            reference,
            against,
            data,
            store=store,
            builder=builder,
            upstream=upstream,
            adapter=adapter,
            device=place,
            compute=compute,
            advanced=lambda: advanced(1),
        ).document()
    if out is not None:
        as_page = out.suffix.lower() == ".html"
        atomic_write(out, (page(found) if as_page else json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        print_json(found)
    else:
        _show_evaluation(found, job, against)
    low = {kind: scores["agreement_mean"] for kind, scores in found["prompts"].items()}
    low = {kind: mean for kind, mean in low.items() if fail_below is not None and mean < fail_below}
    if low:
        means = ", ".join(f"{mean:.4f} by {kind}" for kind, mean in low.items())
        complain(f"{reference}: mean agreement {means}, expected {fail_below:g}; raise its dB in the manifest")
        raise typer.Exit(EXIT_CODES[ValidationError])


OUTPUT_COLUMNS = (
    Column(title="output", key="output"),
    Column(title="SQNR dB", key="sqnr_db", form=fixed(1), right=True),
    Column(title="cosine", key="cosine", form=fixed(4), right=True),
)


def _evaluate_outputs(
    reference: str,
    against: Path,
    inputs: str,
    metric: str | None,
    *,
    store: str | None,
    builder: str | None,
    upstream: Path | None,
    device: str,
    compute: Literal["float", "int8", "proven"],
    out: Path | None,
    as_json: bool,
) -> None:
    """Run `evaluate --inputs`: compare the outputs of any module, with one model in memory at a time."""
    from birkhoff.pipeline.artifact.readers import open_artifact
    from birkhoff.pipeline.cli.tables import show
    from birkhoff.pipeline.files import atomic_write
    from birkhoff.pipeline.load.builders import compressed_model, original_model
    from birkhoff.pipeline.proof import outputs as job

    with open_artifact(reference, store) as artifact:
        manifest = artifact.manifest
    batches = job.batches_of(inputs)
    code = {"builder": builder, "upstream": upstream, "device": device}
    original = job.outputs_of(original_model(against, reference=reference, store=store, **code), batches)  # type: ignore[arg-type]
    compressed = job.outputs_of(compressed_model(reference, store, near=against, compute=compute, **code), batches)  # type: ignore[arg-type]
    rows = [score.row(name) for name, score in job.scores(original, compressed).items()]
    metrics = job.metrics_of(metric, original, compressed) or {}
    found = {
        **{"model": manifest.model, "digest": manifest.digest, "profile": manifest.profile, "compute": compute},
        "source": str(against),
        "batches": len(batches),
        "outputs": rows,
        "metrics": metrics,
    }
    if out is not None:
        atomic_write(out, (json.dumps(found, indent=1) + "\n").encode())
    if as_json:
        print_json(found)
        return
    title = f"{found['model']} ({found['profile']}) and {against}: {len(batches)} batches"
    show(output(), OUTPUT_COLUMNS, rows, as_json=False, title=title)
    for name, value in metrics.items():
        remark(f"{name}: {value:g}")


def _show_evaluation(found: dict[str, Any], job: ModuleType, against: Path) -> None:
    from birkhoff.pipeline.cli.tables import show

    kinds = job.kind_rows(found)
    columns = [c for c in KIND_COLUMNS if "_iou_" not in c.key or any(row[c.key] is not None for row in kinds)]
    worst = job.worst_first(found)[:_SHOWN_IMAGES]
    title = f"{found['model']} ({found['profile']}) and {against}: {found['images']} pictures"
    show(output(), columns, kinds, as_json=False, title=title)
    if found["scores"]:
        show(output(), SCORE_COLUMNS, found["scores"], as_json=False, title="Compared with the truth")
    if found["skipped"]:
        show(output(), SKIPPED_COLUMNS, found["skipped"], as_json=False, title="Skipped")
    show(output(), BLOCK_COLUMNS, found["blocks"], as_json=False)
    show(output(), (PICTURE_COLUMN, *columns), worst, as_json=False, title=f"The worst {len(worst)}")


@contextlib.contextmanager
def counting(total: int, what: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on a terminal's standard error; yield a function that is told how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = notes()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def chosen_device(device: str | None) -> str:
    """Return the named device, else the GPU if there is one. Raises typer.BadParameter."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that does not exist
        reason = " ".join(str(error).split())[:200]
        raise typer.BadParameter(f"{device}: {reason}", param_hint="--device") from None
    return device
