"""Reports: what a run writes about itself, what people read of it, and how long it stays."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from birkhoff.pipeline import interrupt
from birkhoff.pipeline.artifact.readers import StoredArtifact, TensorRow, inspect
from birkhoff.pipeline.errors import ArtifactNotFoundError, StoreError, StoreUnreachableError, WorkerError
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.report import html, recorder
from birkhoff.pipeline.report.document import LayerRecord, RunReport, schema
from birkhoff.pipeline.report.html import render
from birkhoff.pipeline.report.stored import RunClock, read_report
from birkhoff.pipeline.run.inline import InlineExecutor
from birkhoff.pipeline.run.model_run import ModelRun
from birkhoff.pipeline.run.outcome import Outcome
from birkhoff.pipeline.run.queue import TaskQueue
from birkhoff.pipeline.run_ids import run_of
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.text import sparkline
from tests.patience import PATIENT_SECONDS
from tests.pipeline.report.reports import HOSTILE, Fleet, family_report, page_data

SCHEMA = Path(recorder.__file__).parent / "report.schema.json"


@pytest.fixture
def fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    return Fleet(tmp_path, capsys)


def test_the_published_schema_is_current_and_a_real_report_follows_it(fleet: Fleet) -> None:
    import jsonschema  # what it imports takes two seconds of each process that collects this file

    assert SCHEMA.read_text() == schema(), "run: birkhoff report --schema > pipeline/report/report.schema.json"
    fleet.compress(missing=True)
    with fleet.store() as store:
        body = json.loads(store.get(f"runs/{fleet.runs()[0]}/report.json"))
    jsonschema.validate(body, json.loads(schema()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "version": 2}, json.loads(schema()))


def test_a_report_tells_every_tensor_as_it_is_stored(fleet: Fleet) -> None:
    code, _, err = fleet.compress(missing=True)
    assert (code, f"report: birkhoff report {fleet.runs()[0]}" in err) == (14, True)
    report = fleet.report()
    net, fine, gone = report.models
    with fleet.store() as store:
        version = resolve(store, "net")
        rows = list(inspect(StoredArtifact(store, version)))
    assert [(y.name, y.shape, y.codec, y.bits_per_weight, y.sqnr_db, y.max_abs_error) for y in net.layers] == [
        (row.name, row.shape, row.action, row.bits_per_weight, row.sqnr_db, row.max_abs_error) for row in rows
    ]
    layers = {layer.name: layer for layer in net.layers}
    assert layers["encoder.bias"].reason == "one-dimensional"
    assert layers["encoder.constant"].reason == "all its weights are equal"
    matrices = [y for y in net.layers if y.probe_db is not None]
    assert sorted(y.name for y in matrices) == sorted(
        [f"encoder.blocks.{b}.{n}.weight" for b in range(3) for n in ("qkv", "lin")] + [HOSTILE]
    )
    assert {y.probe_db for y in matrices} == {db for shard in version.manifest.shards for db in shard.probe_db}
    targets = [[y.target_db for y in model.layers if y.reason is None] for model in (net, fine)]
    assert all(later == pytest.approx(first + 6) for first, later in zip(*targets, strict=True))
    weights = [y.weights for y in net.layers if y.reason is None]
    mean = sum(db * count for db, count in zip(targets[0], weights, strict=True) if db) / sum(weights)
    assert mean == pytest.approx(30, abs=1)
    assert all(y.sqnr_db >= y.target_db for y in (*net.layers, *fine.layers) if y.sqnr_db and y.target_db)
    assert (gone.status, gone.layers, "no such file" in str(gone.error)) == ("failed", (), True)
    totals = report.totals
    assert (totals.models, totals.published, totals.failed, totals.shards_reused) == (3, 2, 1, 0)
    assert totals.stored_bytes == version.stored_bytes + (fine.stored_bytes or 0)
    assert totals.new_bytes == totals.unique_bytes == sum(t.stored_bytes or 0 for t in report.slowest)
    assert [t.seconds for t in report.slowest] == sorted((t.seconds for t in report.slowest), reverse=True)
    assert (report.settings["shard_mib"], report.settings["executor"]) == (1, "inline")
    assert report.environment.packages["torch"]


@pytest.mark.parametrize("failing", [None, "the question", "the run"])
def test_a_report_names_the_workers_gpus_however_the_run_ends(
    failing: str | None, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    end = InlineExecutor.__exit__

    def gpus(_: InlineExecutor) -> dict[str, str]:
        if failing == "the question":
            raise ConnectionError("the head node is gone")
        return {"GPU-1": "NVIDIA H200, 140 GiB"}

    def run(_: InlineExecutor, _queue: TaskQueue) -> Iterator[Outcome]:
        raise WorkerError("all workers died")

    monkeypatch.setattr(InlineExecutor, "gpus", gpus)
    monkeypatch.setattr(InlineExecutor, "__exit__", lambda *words: (closed.append(1), end(*words)))
    if failing == "the run":
        monkeypatch.setattr(InlineExecutor, "run", run)
    code, _, err = fleet.compress()
    assert (code != 0) == (failing == "the run"), err
    assert fleet.report().environment.gpus == (() if failing == "the question" else ("NVIDIA H200, 140 GiB",))
    assert closed == [1]


def test_a_second_run_reports_what_it_changed_and_a_third_nothing(fleet: Fleet) -> None:
    fleet.compress()
    assert fleet.report().models[0].changes is None
    fleet.tensors["encoder.blocks.1.lin.weight"] = fleet.tensors["encoder.blocks.1.lin.weight"] * 1.5
    fleet.compress("--only", "net")
    changes = fleet.report().models[0].changes
    assert changes is not None
    assert (changes.version, changes.tensors, changes.recipe) == ("v1", {"same": 9, "changed": 1}, ())
    assert [change.name for change in changes.listed] == ["encoder.blocks.1.lin.weight"]
    assert (changes.shards_new, changes.shards_same) == (1, 2)
    assert len(fleet.runs()) == 2
    code, _, err = fleet.compress("--only", "net")
    assert (code, "report" in err, len(fleet.runs())) == (0, False, 2)
    fleet.compress("--only", "net", "--profile", "fine")
    recoded = fleet.report().models[0]
    assert recoded.changes is not None
    assert recoded.changes.recipe == ("profile balanced -> fine", "target_db 30.0 -> 36.0")
    # Shards of the model `fine`, whose other tensors are the same.
    assert (recoded.shards_reused, recoded.changes.shards_new) == (2, 3)
    _, out, _ = fleet.run("report")
    assert "recoded" in out
    assert "target_db 30.0 -> 36.0" in " ".join(out.split())


def test_too_much_to_compare_is_counted_by_shards(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("birkhoff.pipeline.report.changes._MOST_BYTES", 10)
    fleet.compress("--only", "net")
    fleet.compress("--only", "net", "--profile", "fine")
    changes = fleet.report().models[0].changes
    assert changes is not None
    assert (changes.tensors, changes.listed, changes.shards_new) == (None, (), 3)
    with fleet.store() as store:
        page = store.get(f"runs/{fleet.runs()[-1]}/report.html").decode()
    assert "not compared one by one" in page


def test_a_run_whose_models_all_fail_is_reported(fleet: Fleet) -> None:
    fleet.tensors["encoder.bias"][3] = float("nan")
    code, _, _ = fleet.compress()
    report = fleet.report()
    assert (code, report.totals.failed, report.totals.source_bytes) == (6, 2, 0)
    assert all("NaN" in str(model.error) for model in report.models)


def test_a_run_that_failed_before_it_began_leaves_no_report(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WorkerError("no workers today")

    monkeypatch.setattr("birkhoff.pipeline.run.inline.InlineExecutor.__init__", refuse)
    code, _, err = fleet.compress()
    assert (code, "no workers today" in err, fleet.runs()) == (13, True, [])


def test_a_published_model_is_read_while_the_run_goes_on(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    run, of, read = InlineExecutor.run, recorder._Layers.of, threading.Event()

    def note(self: recorder._Layers, model: ModelRun) -> tuple[LayerRecord, ...]:
        read.set()
        return of(self, model)

    def wait_after_publishing(self: InlineExecutor, queue: TaskQueue) -> Iterator[Outcome]:
        published = not len(queue)
        yield from run(self, queue)
        assert not published or read.wait(PATIENT_SECONDS)

    monkeypatch.setattr(recorder._Layers, "of", note)
    monkeypatch.setattr(InlineExecutor, "run", wait_after_publishing)
    code, _, _ = fleet.compress()
    assert code == 0
    assert [(model.status, bool(model.layers)) for model in fleet.report().models] == [("published", True)] * 2


def test_what_could_not_be_read_during_the_run_is_read_at_its_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, tries = recorder._Layers.of, Counter[str]()

    def fail_once(self: recorder._Layers, model: ModelRun) -> tuple[LayerRecord, ...]:
        tries[model.name] += 1
        if tries[model.name] == 1:
            raise StoreUnreachableError("away for a moment")
        return of(self, model)

    monkeypatch.setattr(recorder._Layers, "of", fail_once)
    code, _, err = fleet.compress()
    assert (code, "could not be written" in err) == (0, False)
    assert set(tries.values()) == {2}
    assert all(model.layers for model in fleet.report().models)


def test_a_run_that_is_stopped_does_not_wait_for_what_its_report_would_need(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reading, go_on = InlineExecutor.run, threading.Event(), threading.Event()

    def wait(*_: object) -> list[TensorRow]:
        reading.set()
        assert go_on.wait(PATIENT_SECONDS)
        return []

    def stop_after_publishing(self: InlineExecutor, queue: TaskQueue) -> Iterator[Outcome]:
        done = not len(queue)
        yield from run(self, queue)
        if done:
            assert reading.wait(PATIENT_SECONDS)
            raise interrupt.Interrupted

    monkeypatch.setattr(recorder, "inspect_shard", wait)
    monkeypatch.setattr(InlineExecutor, "run", stop_after_publishing)
    try:
        code, _, _ = fleet.compress()
        assert code == 130
        assert not go_on.is_set()  # what was being read is still waited for by nobody
    finally:
        go_on.set()


def test_a_run_that_broke_off_reports_what_was_published(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    run = InlineExecutor.run

    def die_after_the_first_model(self: InlineExecutor, queue: TaskQueue) -> Iterator[Outcome]:
        if not len(queue):
            raise WorkerError("no workers any more")
        outcomes = list(run(self, queue))
        yield from (outcome for outcome in outcomes if outcome.task.model == outcomes[0].task.model)

    monkeypatch.setattr(InlineExecutor, "run", die_after_the_first_model)
    code, _, err = fleet.compress()
    report = fleet.report()
    states = {model.name: (model.status, len(model.layers)) for model in report.models}
    assert (code, report.error) == (13, "no workers any more")
    assert f"report: birkhoff report {report.run}" in err
    assert sorted(status for status, _ in states.values()) == ["failed", "published"], states
    assert {bool(layers) for status, layers in states.values() if status == "published"} == {True}
    assert (report.totals.published, report.totals.failed) == (1, 1)
    with fleet.store() as store:
        page = store.get(f"runs/{report.run}/report.html").decode()
    assert "no workers any more" in page
    assert sorted(len(data["bits"]) for data in page_data(page)) == [0, 10]
    code, out, _ = fleet.run("report")
    assert (code, "no workers any more" in out) == (0, True)


def test_a_report_that_cannot_be_written_fails_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(store: Store, report: RunReport) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(recorder, "write_report", refuse)
    code, _, err = fleet.compress()
    assert (code, fleet.runs(), "birkhoff report" in err) == (0, [], False)
    assert "could not be written" in caplog.text
    assert "the disk is full" in caplog.text
    assert fleet.run("list", "net")[0] == 0


def test_reports_are_found_by_id_start_and_age(fleet: Fleet) -> None:
    (fleet.folder / "store").mkdir()
    code, _, err = fleet.run("report")
    assert (code, "has no reports yet" in err) == (10, True)
    fleet.compress("--only", "net")
    fleet.compress("--only", "fine")
    first, second = fleet.runs()
    assert first < second
    assert fleet.report(first).models[0].name == "net"
    assert fleet.report(second[:-3]).run == fleet.report().run == second
    with fleet.store() as store, pytest.raises(ArtifactNotFoundError, match=f"2 runs start with '2'.*{second}"):
        read_report(store, "2")
    with fleet.store() as store, pytest.raises(ArtifactNotFoundError, match="no run starts with 'x'"):
        read_report(store, "x")
    rows = json.loads(fleet.run("report", "--list", "--json")[1])
    assert [(row["run"], row["published"], row["failed"]) for row in rows] == [(first, 1, 0), (second, 1, 0)]
    whole = json.loads(fleet.run("report", first, "--json")[1])
    assert RunReport.model_validate(whole) == fleet.report(first)
    ids = [RunClock().run for _ in range(3)]
    assert all(run_of(f"runs/{run}/report.json") == run for run in ids)
    assert run_of("runs/open/0123.json") is None


def test_the_page_goes_to_a_file(fleet: Fleet) -> None:
    fleet.compress("--only", "net")
    page = fleet.folder / "page.html"
    code, out, _ = fleet.run("report", "--html", str(page))
    assert (code, out.strip()) == (0, str(page))
    with fleet.store() as store:
        assert store.get(f"runs/{fleet.runs()[0]}/report.html").decode() == page.read_text()
    assert fleet.run("report", "--html", str(fleet.folder / "no" / "page.html"))[0] == 0
    assert (fleet.folder / "no" / "page.html").read_text() == page.read_text()
    code, _, err = fleet.run("report", "--html", str(page / "page.html"))
    assert (code, "Not a directory" in err or "File exists" in err) == (16, True), err


class Scanner(HTMLParser):
    """Elements and addresses of a page; void elements need no end."""

    VOID = ("meta", "input", "path", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(found)
        self.addresses += [str(found[key]) for key in ("src", "href", "action", "data") if key in found]
        self.handlers += [key for key in found if key.startswith("on") or key == "style"]
        self.ids += [str(found["id"])] if "id" in found else []

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def scan(page: str) -> Scanner:
    scanner = Scanner()
    scanner.feed(page)
    scanner.close()
    return scanner


def test_hostile_names_are_text_in_the_page(fleet: Fleet) -> None:
    fleet.compress(missing=True)
    page = render(fleet.report())
    found = scan(page)
    assert found.open == []
    assert [script.get("type") for script in found.scripts] == ["application/json", None]
    assert all(address.startswith("#") for address in found.addresses)
    assert (found.handlers, "<script>alert" in page) == ([], False)
    assert len(set(found.ids)) == len(found.ids)
    data = page_data(page)
    names = data[0]["names"]
    assert isinstance(names, list)
    assert unfolded(names) == [layer.name for layer in fleet.report().models[0].layers]


def unfolded(names: list[object]) -> list[str]:
    """As the script does it, in UTF-16 units."""
    found, before = [], b""
    for same, rest in zip(names[::2], names[1::2], strict=True):
        before = before[: 2 * int(str(same))] + str(rest).encode("utf-16-le")
        found.append(before.decode("utf-16-le"))
    return found


def test_names_that_share_half_a_character_unfold() -> None:
    layer = family_report().models[0].layers[0]
    names = ["\U0001f600a", "\U0001f601a", "\U0001f601ab", "", "b"]
    packed = html._packed([layer.model_copy(update={"name": name}) for name in names])
    assert unfolded(packed["names"]) == names


def test_the_page_of_the_whole_family_is_small() -> None:
    report = family_report()
    assert (len(report.models), sum(len(model.layers) for model in report.models) > 9_000) == (19, True)
    page = render(report)
    assert len(page.encode()) < 2_000_000
    found = scan(page)
    assert (found.open, len(found.scripts)) == ([], 2)
    assert page.count('class="panel ') == 4 * 19
    assert all(f'aria-label="{title} of' in page for title in ("Bits a weight", "SQNR against its target"))


def test_old_reports_are_collected_and_leases_left_alone(fleet: Fleet) -> None:
    from datetime import timedelta

    for profile in ("balanced", "fine", "small"):
        fleet.compress("--only", "net", "--profile", profile)
    first, second, third = fleet.runs()
    with fleet.store() as store:
        planned = collect(store, grace=timedelta(0), keep_runs=1)
        row = next(row for row in planned.rows() if row["kind"] == "run")
        assert (row["objects"], row["kept"], len(fleet.runs())) == (4, 2, 3)
        assert not [item for item in collect(store, keep_runs=0).garbage if item.kind == "run"]  # too young
        store.put("runs/open/feed.json", b"{}")
        store.put("runs/mine.txt", b"not a report")
    code, _, err = fleet.run("gc", "--keep-runs", "2", "--grace", "0s", "--yes")
    assert (code, "open runs" in err) == (7, True)
    with fleet.store() as store:
        store.delete("runs/open/feed.json")
    assert fleet.run("gc", "--keep-runs", "2", "--grace", "0s", "--yes")[0] == 0
    assert fleet.runs() == [second, third]
    with fleet.store() as store:
        assert store.get("runs/mine.txt") == b"not a report"
        with pytest.raises(ArtifactNotFoundError, match="no run starts with"):
            read_report(store, first)


def test_sparklines_show_the_course() -> None:
    assert sparkline([1, 2, 3, 8]) == "▁▂▃█"
    assert sparkline([5, 5]) == "▄▄"
    assert sparkline([]) == ""
