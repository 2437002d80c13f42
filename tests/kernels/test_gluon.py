"""The Gluon kernels, which cannot be interpreted: that they compile for Hopper, and how their work is cut up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon")

from birkhoff.kernels.linear.hopper import Schedule


def test_they_compile_for_hopper_as_meant(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_for_hopper.py"
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name, found in json.loads(ran.stdout).items():
        assert found["spills"] == 0, name
        assert not found["serialised"], name
        assert found["shared"] <= 227 * 1024, name


@pytest.mark.parametrize("tiles", [1, 28, 66, 67, 131, 132, 133, 160, 480, 528])
@pytest.mark.parametrize("blocks", [1, 7, 20, 80])
def test_every_tile_is_done_and_the_last_wave_is_not_overfull(tiles: int, blocks: int) -> None:
    schedule = Schedule.of(tiles, 132, blocks)
    assert schedule.full + schedule.cut == tiles
    assert schedule.cut * schedule.splits <= 132
    if schedule.cut:
        assert schedule.full % 132 == 0
        assert schedule.splits >= 2
        assert blocks // schedule.splits >= 4
    else:
        assert schedule.splits == 1
