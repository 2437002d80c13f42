"""The types that users of the package see, as pyright counts them; mypy looks after those inside (`make check`)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FROM_GLUON = {
    "birkhoff.kernels.int8.hopper.BK",
    "birkhoff.kernels.int8.hopper.tiles_of",
    "birkhoff.kernels.linear.hopper.ROWS",
    "birkhoff.kernels.runtime.gluon_ops.decoded",
}
"""Triton's Gluon has no types: what its decorator and its constants are is known to nobody."""


@pytest.mark.slow
def test_every_public_symbol_has_a_type(tmp_path: Path) -> None:
    """As pip installs it: files instead of links, a folder on the path."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    program = [sys.executable, "-m", "pyright"]
    started = subprocess.run([*program, "--version"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"pyright does not start, it may be without node or npm: {started.stderr.strip()[-200:]}")
    shutil.copytree(
        ROOT / "src" / "birkhoff", tmp_path / "site" / "birkhoff", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # its python's packages are what it knows
    ended = subprocess.run(
        [*program, "--verifytypes", "birkhoff", "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    report = json.loads(ended.stdout)["typeCompleteness"]
    assert report["pyTypedPath"] == str(tmp_path / "site" / "birkhoff" / "py.typed")
    symbols = report["symbols"]
    assert sum(symbol["isExported"] for symbol in symbols) > 3000
    unknown = {symbol["name"] for symbol in symbols if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]}
    assert unknown <= FROM_GLUON, {s["name"]: s["diagnostics"] for s in symbols if s["name"] in unknown - FROM_GLUON}
