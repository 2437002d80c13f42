"""Progress: counts, speed and time left; the live view within a terminal's height; plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from birkhoff.pipeline.progress import progress as module
from birkhoff.pipeline.progress.progress import Progress
from birkhoff.pipeline.progress.state import FleetProgress, clock_time
from birkhoff.pipeline.progress.view import FleetView

MIB = 1 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def fleet() -> tuple[FleetProgress, Clock]:
    clock = Clock()
    state = FleetProgress(models=3, clock=clock)
    state.plan("a", 40 * MIB, 4, None)
    state.plan("b", 60 * MIB, 6, None)
    state.plan("c", 20 * MIB, 2, "up to date")
    return state, clock


def test_speed_and_time_left_follow_the_last_seconds() -> None:
    state, clock = fleet()
    assert (state.speed(), state.left(), state.done, state.done_bytes) == (None, None, 1, 20 * MIB)
    clock.now += 10
    for _ in range(2):
        state.advance("a", 10 * MIB, None, reused=False)
    assert (state.speed(), state.left()) == (2 * MIB, 40.0)
    assert state.summary() == "1/3 models, 4/12 shards, 40.0 MiB of 120.0 MiB, 2.0 MiB/s, 0:40 left"
    clock.now += 25
    state.advance("b", 15 * MIB, None, reused=True)
    assert state.speed() == 35 * MIB / 30
    clock.now += 20
    assert state.speed() == 0.5 * MIB  # what ended 45 s ago counts no more
    clock.now += 40
    assert (state.speed(), state.left()) == (None, None)


def test_a_failed_model_leaves_nothing_to_do_and_steps_without_bytes_are_no_shards() -> None:
    state, _ = fleet()
    state.advance("a", 0, None, reused=False)
    assert state.planned["a"].done_shards == 0
    state.advance("a", 10 * MIB, "failed", reused=False)
    assert (state.done, state.done_bytes, state.shards) == (2, 60 * MIB, (6, 12))
    assert [clock_time(s) for s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]


def drawn(state: FleetProgress, *, width: int = 110, height: int = 40, downloads: int = 0) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    files = {f"file{n}.pth": (n * MIB, 9 * MIB) for n in range(downloads)} | {"whole.pth": (5, 5)}
    console.print(FleetView(state, files))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def test_one_small_shard_says_nothing_of_speed_or_time_left() -> None:
    clock = Clock()
    state = FleetProgress(models=1, clock=clock)
    state.plan("a", 1000 * MIB, 4, None)
    clock.now += 20
    state.advance("a", 1 * MIB, None, reused=False)
    assert (state.speed(), state.left()) == (None, None)
    assert state.summary() == "0/1 models, 1/4 shards, 1.0 MiB of 1000.0 MiB"
    state.advance("a", 19 * MIB, None, reused=False)
    assert (state.speed(), state.left()) == (1 * MIB, 980.0)


def test_the_view_shows_models_shards_speed_and_time_left() -> None:
    state, clock = fleet()
    clock.now += 10
    state.advance("a", 10 * MIB, None, reused=True)
    lines = drawn(state, downloads=2)
    assert "1/3 models" in lines[0]
    assert all(text in lines[0] for text in ("3/12 shards", "1.0 MiB/s", "0:10 elapsed", "1:30 left"))
    assert any("◐ a" in line and "1/4" in line and "1 shared" in line for line in lines)
    assert any("· b" in line and "waiting" in line for line in lines)
    assert any("○ c" in line and "up to date" in line for line in lines)
    assert any("↓ file1.pth" in line and "1.0 MiB of 9.0 MiB" in line for line in lines)
    assert not any("whole.pth" in line for line in lines)


@pytest.mark.parametrize("height", [12, 24])
@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_view_fits_the_terminal(width: int, height: int) -> None:
    state = FleetProgress(models=40, clock=Clock())
    for n in range(40):
        state.plan(f"a-model-with-a-rather-long-name-{n}", MIB, 3, "published" if n < 30 else None)
    state.advance("a-model-with-a-rather-long-name-35", 1, None, reused=False)
    state.advance("a-model-with-a-rather-long-name-39", 1, "failed", reused=False)
    lines = drawn(state, width=width, height=height)
    assert len(lines) < height
    assert all(len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    assert "✕" in text
    assert "◐" in text
    assert "published" in lines[-1]


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=60), models=2) as progress:
        progress.downloaded("a.pth", 1, 100)
        progress.downloaded("a.pth", 50, 100)
        progress.planned("a", 4 * MIB, None, shards=4)
        progress.planned("b", MIB, "up to date", shards=1)
        progress.advanced("a", MIB, None)
        monkeypatch.setattr(module, "LINE_SECONDS", -1.0)
        progress.advanced("a", MIB, None)
        progress.advanced("a", MIB, "published")
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["downloading a.pth, 100 bytes", "1/2 b: up to date"]
    assert lines[2].startswith("1/2 models, 3/5 shards, 3.0 MiB of 5.0 MiB")
    assert lines[3:] == ["2/2 a: published"]


def test_quiet_says_nothing_but_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    file = io.StringIO()
    caplog.set_level("INFO", logger="birkhoff.run")
    with Progress(Console(file=file, force_terminal=True), models=1, quiet=True) as progress:
        progress.planned("a", MIB, None, shards=1)
        progress.advanced("a", MIB, "published", reused=True)
    assert file.getvalue() == ""
    events = [(record.message, getattr(record, "status", None)) for record in caplog.records]
    assert events == [("planned", None), ("shard", None), ("model", "published")]
