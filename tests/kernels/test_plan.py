"""Plans: what is chosen for a shape, from rules, shipped tables and the user's own."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from birkhoff.kernels.linear import tuned
from birkhoff.kernels.linear.plan import DECODE, Problem, by_rule, candidates, hopper, small_m, tiles
from birkhoff.pipeline.paths import cache_folder

ALL = frozenset({"small_m", "hopper"})
NONE: frozenset[str] = frozenset()


def problem(tokens: int, rows: int = 3840, columns: int = 1280, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(tokens=tokens, rows=rows, columns=columns, dtype=dtype, aligned=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path))
    tuned.user_table.cache_clear()
    tuned.choose.cache_clear()
    (tmp_path / "cache").mkdir()
    yield tmp_path / "cache" / "plans.json"
    tuned.user_table.cache_clear()
    tuned.choose.cache_clear()


def test_plans_lie_in_the_cache_folder_of_the_pipeline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned._path() == cache == cache_folder() / "plans.json"
    monkeypatch.delenv("BIRKHOFF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "xdg"))
    assert tuned._path().parent == cache_folder() == cache.parent / "xdg" / "birkhoff"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1280, 144, 97])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("kernels", [ALL, NONE], ids=["all", "none"])
def test_rules_keep_to_what_runs(tokens: int, columns: int, dtype: torch.dtype, kernels: frozenset[str]) -> None:
    asked = problem(tokens, columns=columns, dtype=dtype)
    for plan in [by_rule(asked, kernels), *candidates(asked, kernels)]:
        if plan.path in ALL:
            assert plan.path in kernels
            assert columns % 64 == 0
            assert asked.half
        if plan.path == "small_m":
            assert tokens <= 64
    assert DECODE in candidates(asked, kernels)


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4900, 8192), (100_000, 8192)])
def test_buckets(tokens: int, bucket: int) -> None:
    assert problem(tokens).bucket == bucket


def test_unaligned_rows_take_the_portable_kernels() -> None:
    asked = Problem(tokens=300, rows=512, columns=640, dtype=torch.bfloat16, aligned=False)
    assert by_rule(asked, ALL).path in ("tiles", "decode")


def test_shipped_plans_are_used_only_on_their_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuned.SHIPPED, "Some GPU", {(3840, 1280): {256: hopper(64)}})
    assert tuned.choose(problem(200), "Some GPU", ALL) == hopper(64)
    assert tuned.choose(problem(30), "Some GPU", ALL) == hopper(64)  # the next that was measured
    assert tuned.choose(problem(300), "Some GPU", ALL) == by_rule(problem(300), ALL)
    assert tuned.choose(problem(200), "Another GPU", ALL) == by_rule(problem(200), ALL)
    assert tuned.choose(problem(200), "Some GPU", NONE) == by_rule(problem(200), NONE)


def test_shipped_plans_can_all_be_launched() -> None:
    for shapes in tuned.SHIPPED.values():
        for (rows, columns), plans in shapes.items():
            for tokens, plan in plans.items():
                assert plan in candidates(problem(tokens, rows, columns), ALL), (rows, columns, tokens)


def test_own_plans_are_kept_and_come_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuned.SHIPPED, "Some GPU", {(3840, 1280): {16: small_m(16, 4, 2)}})
    tuned.save({tuned.key("Some GPU", problem(16)): tiles(16, 64, 4, 4)})
    tuned.save({tuned.key("Some GPU", problem(1)): hopper(16, split=True)})
    assert tuned.choose(problem(16), "Some GPU", ALL) == tiles(16, 64, 4, 4)
    assert tuned.choose(problem(1), "Some GPU", ALL) == hopper(16, split=True)
    assert cache.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"path": "small_m", "speed": 9}}', '{"a": 3}'])
def test_a_damaged_file_is_named_and_left_alone(content: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text(content)
    with caplog.at_level(logging.WARNING, logger="birkhoff.kernels"):
        assert tuned.choose(problem(16), "Some GPU", ALL) == by_rule(problem(16), ALL)
    assert str(cache) in caplog.text
    assert cache.read_text() == content
