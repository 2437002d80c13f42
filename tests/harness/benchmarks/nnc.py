"""MPEG NNC as a baseline: its sweep, run or read, and what it says between two step sizes."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from birkhoff.codec.errors import BirkhoffError

WORKER = Path(__file__).with_name("nnc_worker.py")
RANGE_DB = (14.0, 40.0)


class WorkerFailedError(BirkhoffError):
    """The environment of NNC cannot run its sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Points of every tensor by rising SQNR: qp, bytes, energy, error, sqnr_db, max_abs, encode_s, decode_s."""

    version: str
    tensors: Mapping[str, list[dict[str, float]]]

    def at(self, name: str, sqnr_db: float, key: str) -> float:
        """A quantity of one tensor at any SQNR in the sweep, linear between its points.

        Bits rise by 1/6.02 a dB from point to point, 1.5 dB apart: what the line hides is below 0.003 bits.
        """
        points = self.tensors[name]
        sqnr = [point["sqnr_db"] for point in points]
        if not sqnr[0] <= sqnr_db <= sqnr[-1]:
            raise WorkerFailedError(f"{name}: {sqnr_db:.2f} dB is outside the sweep, {sqnr[0]:.2f}..{sqnr[-1]:.2f} dB")
        return float(np.interp(sqnr_db, sqnr, [point[key] for point in points]))

    def uniform(self, qp: int) -> dict[str, dict[str, float]] | None:
        """The point of every tensor at one qp; None where a sweep does not reach it."""
        found = {name: next((p for p in points if p["qp"] == qp), None) for name, points in self.tensors.items()}
        return None if None in found.values() else {name: p for name, p in found.items() if p is not None}


def sweep(tensors: Mapping[str, Tensor], python: Path) -> Sweep:
    """Run the worker under another Python, one that has nncodec.

    Raises:
        WorkerFailedError: it cannot be run, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tensors.npz"
        np.savez(archive, allow_pickle=False, **{name: tensor.numpy() for name, tensor in tensors.items()})
        command = [str(python), str(WORKER), str(archive), *(f"{bound:g}" for bound in RANGE_DB)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise WorkerFailedError(f"--nnc-python {python}: expected a Python with nncodec, got {error}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WorkerFailedError(f"--nnc-python {python}: {reason[0]}; it needs torch, numpy<2 and nncodec")
    return read(json.loads(done.stdout))


def read(data: dict[str, Any]) -> Sweep:
    """A sweep as the worker prints it."""
    return Sweep(version=data["version"], tensors=data["tensors"])
