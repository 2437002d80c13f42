"""Commands that run models: segment, evaluate. Registered on the app of `cli`."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birkhoff.pipeline.cli import JsonOption, ReferenceArgument, StoreOption, app, notes, output
from birkhoff.pipeline.tables import Column, fixed

if TYPE_CHECKING:
    from birkhoff.pipeline.segment import Masks
    from birkhoff.pipeline.segmenters import Segmenter

BuilderOption = Annotated[
    str | None,
    typer.Option(
        metavar="B",
        help="What builds the model: module:function, FILE.py:function or a transformers configuration (.json or its "
        "folder). Left out: the configuration that goes with the weights, or the architecture of the tensors.",
    ),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1; the GPU where there is one.")]

SEGMENT_COLUMNS = (
    Column(title="prompt", key="prompt"),
    Column(title="pixels", key="pixels", right=True),
    Column(title="original's", key="pixels_original", right=True),
    Column(title="IoU", key="iou", form=fixed(4), right=True),
)


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", show_default=False)],
    model: Annotated[str, typer.Option("--model", metavar="MODEL[@REF]", help="Or a folder of `pull`.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.png", help="The picture to write.")],
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A pixel of an object; each one asks for an object.")
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="An object's box; each one asks for an object.")
    ] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All objects, found by a grid of points.")] = False,
    grid: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="--everything asks at N x N points.")] = 16,
    against: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Draw this checkpoint's masks beside, and print the IoU.")
    ] = None,
    builder: BuilderOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment a picture with a compressed model and draw the masks."""
    from birkhoff.pipeline import segment as masks
    from birkhoff.pipeline import segment_draw as draw
    from birkhoff.pipeline.builders import compressed_model, original_model
    from birkhoff.pipeline.segment_input import Prompts, parse_prompts, read_picture
    from birkhoff.pipeline.segmenters import segmenter_of
    from birkhoff.pipeline.tables import show

    if everything == bool(point or box):
        raise typer.BadParameter("expected prompts (--point, --box), or --everything", param_hint="--point")
    draw.check_writable(out)
    pixels = read_picture(image)
    size = int(pixels.shape[1]), int(pixels.shape[2])
    asked: list[Prompts] = [
        *([parse_prompts("point", point, size)] if point else []),
        *([parse_prompts("box", box, size)] if box else []),
    ]

    def find(segmenter: "Segmenter") -> "Masks":
        view = segmenter.look(pixels[None])
        return masks.everything(segmenter, view, grid) if everything else masks.prompted(segmenter, view, asked)

    place = chosen_device(device)
    found = find(segmenter_of(compressed_model(model, store, builder=builder, near=against, device=place)))
    original: Masks | None = None
    if against is not None:
        theirs = original_model(against, builder=builder, reference=model, store=store, device=place)
        original = find(segmenter_of(theirs))
        found = masks.pair_up(original, found) if everything else found
    rows = masks.rows(found, original)
    draw.save(draw.picture(pixels, asked, found, original), out)
    show(output(), [c for c in SEGMENT_COLUMNS if original or c.key in ("prompt", "pixels")], rows, as_json=as_json)
    if not as_json:
        notes().print(f"drawn: {out}", highlight=False, markup=False, soft_wrap=True)


KIND_COLUMNS = (
    Column(title="prompt", key="kind"),
    Column(title="prompts", key="prompts", right=True),
    *(
        Column(title=f"{title}, {which}", key=f"{key}_{which}", form=fixed(4), right=True)
        for title, key in (("agreement", "agreement"), ("original IoU", "original_iou"), ("ours", "compressed_iou"))
        for which in ("mean", "worst")
    ),
)
PICTURE_COLUMN = Column(title="picture", key="image")
BLOCK_COLUMNS = (
    Column(title="block", key="block"),
    Column(title="output SQNR dB", key="sqnr_db", form=fixed(2), right=True),
)
_SHOWN_IMAGES = 10


@app.command()
def evaluate(
    reference: ReferenceArgument,
    against: Annotated[Path, typer.Option(metavar="SOURCE", help="The original checkpoint, or its folder.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="A folder of pictures.")],
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="COCO annotations, or the folder of SA-1B's; without, prompts from a grid."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N pictures only.")] = None,
    grid: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Without annotations: N x N points and N x N boxes.")
    ] = 4,
    out: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON here.")] = None,
    builder: BuilderOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a compressed model's masks with the original's: same pictures, same prompts; mean and worst."""
    from birkhoff.pipeline import evaluate as job
    from birkhoff.pipeline.evaluate_data import open_dataset
    from birkhoff.pipeline.files import write_whole
    from birkhoff.pipeline.tables import show

    data = open_dataset(images, annotations, limit=limit, grid=grid)
    place = chosen_device(device)
    with counting(len(data.pictures), "pictures", quiet=as_json) as advanced:
        found = job.evaluate(
            reference, against, data, store=store, builder=builder, device=place, advanced=advanced
        ).document()
    text = json.dumps(found, indent=1)
    if out is not None:
        write_whole(out, (text + "\n").encode())
    if as_json:
        typer.echo(text)
        return
    columns = [c for c in KIND_COLUMNS if annotations is not None or "_iou_" not in c.key]
    worst = job.worst_first(found)[:_SHOWN_IMAGES]
    title = f"{found['model']} ({found['profile']}) and {against}: {found['images']} pictures"
    show(output(), columns, job.kind_rows(found), as_json=False, title=title)
    show(output(), BLOCK_COLUMNS, found["blocks"], as_json=False)
    show(output(), (PICTURE_COLUMN, *columns), worst, as_json=False, title=f"The worst {len(worst)}")


@contextlib.contextmanager
def counting(total: int, what: str, *, quiet: bool) -> Iterator[Callable[[], object]]:
    """A progress bar on a terminal's standard error; what it gives is called after each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = notes()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def chosen_device(device: str | None) -> str:
    """The device meant: the one named, else the GPU where there is one. Raises typer.BadParameter."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = " ".join(str(error).split())[:200]
        raise typer.BadParameter(f"{device}: {reason}", param_hint="--device") from None
    return device
