"""The benchmark of the encode stage on more GPUs: the shares of a host, runs side by side, the page."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.shard.task import ShardResult
from tests.harness.benchmarks import bench_scaling, history, scaling_report


def ran(name: str, seconds: float, *, on_gpus: int = 0, **more: Any) -> dict[str, Any]:
    count = int(name)
    return {
        "name": name, "gpus": count, "workers": 14 * count, "on_gpus": on_gpus * count, "shards": 198,
        "cores": 16 * count, "first_pass_s": 20.0, "seconds": seconds, "tail_s": 0.1, "busy": 0.98,
        "stages_worker_s": {"key": 10.0 * count, "encode": 60.0}, "used": {"user_s": 68.0, "system_s": 2.0, "pages": 4},
        "bytes": 10**10, "blobs": "a", **more,
    }  # fmt: skip


def case(second: float, on_gpus: int = 0) -> dict[str, Any]:
    one = ran("1", 10.0, on_gpus=on_gpus)
    runs = [one, ran("2", second, on_gpus=on_gpus), bench_scaling.merged([one, ran("1", 12.5, on_gpus=on_gpus)])]
    return {"model": "SAM-H", "copies": 2, "conditions": {"processor": "cpu"}, "runs": runs}


DATA = {"cases": {"balanced": case(6.25), "paper": case(5.0, on_gpus=4)}}


def test_profiles_are_side_by_side_on_the_page_each_with_its_verdict() -> None:
    page = scaling_report.page(DATA)
    assert "| balanced | 16 against 32 cores | 1000 | 1600 | 1.60 | 1.80 | missed |" in page
    assert "| paper | 1 against 2 GPUs, 16 against 32 cores | 1000 | 2000 | 2.00 | 1.80 | met |" in page
    assert "| 1 + 1 | 32 | 28 | 8 | 396 |" in page
    assert page.count("No GPU is used") == page.count("Workers on GPUs alone get tasks") == 1
    assert "| encode | 60.0 | 60.0 | 60.0 | 1.00 | 1.00 |" in page
    assert "such work becomes 1.00 times as fast with 2 times the workers" in page


def test_its_figures_are_followed_by_profile_and_count() -> None:
    found = [line["figures"] for line in history.lines("scaling", DATA)]
    assert [figures[f"cases/{name}/runs/2/seconds"] for figures, name in zip(found, DATA["cases"], strict=True)] == [
        6.25,
        5.0,
    ]


def test_runs_side_by_side_add_up_their_rates_and_must_agree() -> None:
    merged = bench_scaling.merged([ran("1", 10.0), ran("1", 5.0)])
    assert merged["name"] == "1 + 1"
    assert merged["bytes"] / merged["seconds"] == pytest.approx(3e9)
    assert merged["stages_worker_s"] == {"key": 20.0, "encode": 120.0}
    with pytest.raises(RuntimeError, match="different blobs"):
        bench_scaling.merged([ran("1", 10.0), ran("1", 10.0, blobs="b")])


def test_threads_of_a_core_and_cores_of_a_package_are_in_one_share(tmp_path: Path) -> None:
    for core, package, number in [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1), (4, 0, 0), (5, 1, 0)]:
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{number}\n")
    assert bench_scaling.neighbours_first([5, 4, 3, 2, 1, 0], tmp_path) == [0, 4, 2, 1, 5, 3]
    assert bench_scaling.neighbours_first([3, 7, 1], tmp_path / "none") == [1, 3, 7]


@pytest.mark.parametrize(
    ("shares", "gpu", "cores", "visible"),
    [
        ([0], True, "0,4", "0"),
        ([1], True, "1,5", "1"),
        ([0, 1], True, "0,4,1,5", "0,1"),
        ([0, 1], False, "0,4,1,5", ""),
    ],
)
def test_a_run_sees_the_cores_and_gpus_of_its_shares_alone(
    shares: list[int], gpu: bool, cores: str, visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["taskset", "-c", cores]
        assert env["CUDA_VISIBLE_DEVICES"] == visible
        return subprocess.CompletedProcess(command, 0, json.dumps({"workers": 2}), "")

    monkeypatch.setattr(bench_scaling.subprocess, "run", child)
    one = bench_scaling.Case(
        profile="paper", copies=2, checkpoint=tmp_path, work=tmp_path, cores=[0, 4, 1, 5], each=2, gpu=gpu
    )
    assert bench_scaling.in_own_process(one, shares, "store") == {"name": f"{len(shares)}", "workers": 2}


class Made:
    """An executor whose results are given."""

    def __init__(self, blobs: list[str]) -> None:
        self._blobs = blobs

    def run(self, _: TaskQueue) -> Iterator[Outcome]:
        for blob in self._blobs:
            record: Any = SimpleNamespace(blob=blob)
            task: Any = SimpleNamespace(index=0, label="net shard 0")
            yield Outcome(task=task, result=ShardResult(record=record, reused=False, stages={"key": 1.0}))


def test_copies_of_a_shard_must_have_the_same_blob() -> None:
    executor: Any = Made(["a", "a"])
    found = bench_scaling.run(executor, [])
    assert (found.blobs, found.stages, len(found.ended)) == ({0: "a"}, {"key": 2.0}, 2)
    executor = Made(["a", "b"])
    with pytest.raises(RuntimeError, match="net shard 0: another blob"):
        bench_scaling.run(executor, [])
