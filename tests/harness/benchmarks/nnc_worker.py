"""MPEG NNC over a sweep of step sizes; runs in an environment of its own, for `nncodec` wants old versions of much.

    PYTHON nnc_worker.py TENSORS.npz LOW_DB HIGH_DB > SWEEP.json

Every float32 tensor is coded alone, by the reference software's defaults (dependent quantisation on), at every qp from
the last below LOW_DB to the first above HIGH_DB; each bitstream is decoded again and its error measured. Only numpy,
torch and nncodec are imported. Times are seconds of processor time, of one thread.
"""

import contextlib
import importlib.util
import io
import json
import math
import sys
import time
import types
from typing import Any

import numpy as np
import numpy.typing as npt

Weight = npt.NDArray[np.float32]
Point = dict[str, float]


def main(tensors: str, low_db: str, high_db: str) -> None:
    """Print {"version", "tensors": {name: [point, ...]}}, the points in order of falling qp."""
    import torch

    torch.set_num_threads(1)
    nnc = load()
    _code(nnc, np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64), -30)  # warm up
    archive = np.load(tensors)
    swept = {name: sweep(nnc, archive[name], float(low_db), float(high_db)) for name in archive.files}
    from importlib.metadata import version

    json.dump({"version": version("nncodec"), "tensors": swept}, sys.stdout)


def load() -> Any:
    """`nncodec.nnc` without `nncodec.framework`, which pulls image data sets and is needed for whole models only."""
    found = importlib.util.find_spec("nncodec")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("nncodec is not installed here: pip install nncodec")
    package = types.ModuleType("nncodec")
    package.__path__ = list(found.submodule_search_locations)
    framework = types.ModuleType("nncodec.framework")
    for name in ("pytorch_model", "tensorflow_model", "use_case_init"):
        setattr(framework, name, types.ModuleType(name))
    sys.modules.update({"nncodec": package, "nncodec.framework": framework})
    return importlib.import_module("nncodec.nnc")


def sweep(nnc: Any, weight: Weight, low_db: float, high_db: float) -> list[Point]:
    """Points of falling qp (rising SQNR) that span low_db..high_db."""
    qp = _qp_near(weight, low_db)
    points = [_code(nnc, weight, qp)]
    while points[0]["sqnr_db"] > low_db:
        points.insert(0, _code(nnc, weight, int(points[0]["qp"]) + 1))
    while points[-1]["sqnr_db"] < high_db:
        points.append(_code(nnc, weight, int(points[-1]["qp"]) - 1))
    return points


def _qp_near(weight: Weight, target_db: float) -> int:
    # Four qp to an octave of step size, qp 0 a step of 1; dependent quantisation errs by about half a step.
    error = float(np.sqrt(np.mean(np.square(weight, dtype=np.float64)))) * 10 ** (-target_db / 20)
    return round(4 * math.log2(2 * error))


def _code(nnc: Any, weight: Weight, qp: int) -> Point:
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        stream = nnc.compress({"w": weight}, bitstream_path=None, qp=qp, use_dq=True, return_bitstream=True)
        encoded = time.process_time()
        decoded = nnc.decompress(stream)["w"]
        end = time.process_time()
    if decoded.shape != weight.shape:
        raise SystemExit(f"nncodec gave shape {decoded.shape} for {weight.shape}")
    error = decoded.astype(np.float64) - weight
    energy, noise = float(np.square(weight, dtype=np.float64).sum()), float(np.square(error).sum())
    return {
        "qp": qp,
        "bytes": len(stream),
        "energy": energy,
        "error": noise,
        "sqnr_db": 10 * math.log10(energy / noise),
        "max_abs": float(np.abs(error).max()),
        "encode_s": encoded - start,
        "decode_s": end - encoded,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
