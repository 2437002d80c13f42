"""Notebooks, executed in a kernel of this environment."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENT_SECONDS


def execute(notebook: Any, folder: Path) -> Any:
    """The notebook with the outputs of its cells. Skips the test where nothing here executes notebooks."""
    for package in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from nbclient import NotebookClient

    return NotebookClient(notebook, timeout=PATIENT_SECONDS, resources={"metadata": {"path": str(folder)}}).execute()


def shown(cell: Any, kind: str) -> list[str]:
    """What a cell shows of a MIME type, in order, its value last."""
    return [output["data"][kind] for output in cell["outputs"] if kind in output.get("data", {})]
