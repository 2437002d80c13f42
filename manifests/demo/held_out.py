"""Writes the held-out pictures as files, with annotations: what `birkhoff evaluate` reads.

    python manifests/demo/held_out.py DIR [--pictures 256]

DIR gets one PNG a picture and `annotations.json` in COCO's form: masks in run-length coding, boxes as x, y, width,
height, and the click inside each object as `point_coords`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from evaluate import held_out
from shapes import SIDE, Pictures


def write(folder: Path, pictures: Pictures) -> Path:
    """Write pictures and annotations into a folder; returns the annotations' file. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(len(pictures)):
        one = pictures.part(number, number + 1)
        images.append({"id": number, "file_name": f"{number:04}.png", "width": SIDE, "height": SIDE})
        Image.fromarray(one.pixels[0].permute(1, 2, 0).contiguous().numpy()).save(folder / f"{number:04}.png")
        for k in range(one.valid.shape[1]):
            if one.valid[0, k]:
                annotations.append(_annotation(one, k, image=number, number=len(annotations) + 1))
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "shape"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(document) + "\n")
    return path


def _annotation(picture: Pictures, k: int, *, image: int, number: int) -> dict[str, Any]:
    mask = picture.masks[0, k]
    runs = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    x1, y1, x2, y2 = picture.boxes[0, k].tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x1, y1, x2 - x1 + 1, y2 - y1 + 1],
        "point_coords": [picture.clicks[0, k, 0].tolist()],
        "segmentation": {"size": [SIDE, SIDE], "counts": runs["counts"].decode()},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the held-out pictures and their annotations as files.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--pictures", type=int, default=256, help="how many (default 256)")
    options = parser.parse_args(arguments)
    pictures = held_out(options.pictures)
    try:
        path = write(options.folder, pictures)
    except OSError as error:
        print(f"{options.folder}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{len(pictures)} pictures with {int(pictures.valid.sum())} objects: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
