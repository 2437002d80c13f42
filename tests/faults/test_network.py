"""The bounded form of the fault suite: each fault in each stage at one depth, chosen so that all depths come by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from birkhoff.pipeline.errors import StoreUnreachableError
from birkhoff.pipeline.store.base import Store, StoreSettings
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from tests.harness.benchmarks import common
from tests.harness.faults import page
from tests.harness.faults.catalogue import FAULTS
from tests.harness.faults.proxy import Proxy, Rule
from tests.harness.faults.stages import STAGES
from tests.harness.faults.suite import DEPTHS, Case, Suite, cases

pytestmark = pytest.mark.faults

EVERY = 13
"""Of so many cases one is run: a number prime to those of faults, stages and depths."""


def _chosen() -> list[Case]:
    """These, and whatever ends otherwise than its fault does elsewhere."""
    spread = cases()[::EVERY]
    others = [case for case in cases() if case.depth == "lasting" and case.stage.name in case.fault.exceptions]
    return spread + [case for case in others if case not in spread]


def test_the_bounded_form_has_every_fault_stage_and_depth() -> None:
    chosen = _chosen()
    assert {case.fault.name for case in chosen} == {fault.name for fault in FAULTS}
    assert {case.stage.name for case in chosen} == {stage.name for stage in STAGES}
    assert {case.depth for case in chosen} == set(DEPTHS)


def test_faults_lose_and_leak_nothing(embedded_server: EmbeddedServer, s3_environment: str, tmp_path: Path) -> None:
    found = Suite(embedded_server, tmp_path).run(_chosen(), threads=4, report=lambda _: None)
    assert [f"{result.case.label}: {text}" for result in found for text in (*result.wrong, *result.leaked)] == []
    assert sum(result.injected for result in found) > len(found)


def test_results_from_before_a_stage_was_there_are_drawn(tmp_path: Path) -> None:
    """One section is run alone at times, and its page shows the others as they were."""
    record = json.loads((common.RESULTS / "faults.json").read_text())["network"]
    record["table"] = {
        name: {stage: cell for stage, cell in cells.items() if stage != "probe"}
        for name, cells in record["table"].items()
    }
    drawn = page.save(tmp_path, "network", record)
    (row,) = [line for line in drawn.splitlines() if line.startswith("| 503 SlowDown | ")]
    assert row.startswith("| 503 SlowDown |  | ")
    assert row.count("|") == len(STAGES) + 2


def test_the_suite_sees_what_is_wrong(embedded_server: EmbeddedServer, s3_environment: str, tmp_path: Path) -> None:
    """A stage that claims what it did not do, and leaves something, is found out."""
    lie = next(case for case in cases() if case.stage.name == "name" and case.depth == "first")

    def publishes_nothing(cell: object) -> None:
        Path(cell.folder, "left.part").touch()  # type: ignore[attr-defined]

    case = replace(lie, stage=replace(lie.stage, act=publishes_nothing))
    (result,) = Suite(embedded_server, tmp_path).run([case], threads=1, report=lambda _: None)
    assert result.outcome == "not met"
    assert result.wrong == ["1 versions, expected 2", "latest is not at the version published"]
    assert result.leaked == ["left.part"]


def test_an_endless_trickle_is_one_line_with_address_and_speed(
    embedded_server: EmbeddedServer, s3_environment: str
) -> None:
    """A store that sends a few bytes a second keeps the read time-out quiet, and would hold a puller for days."""
    drip = next(fault for fault in FAULTS if fault.name == "a few bytes a second, for ever")
    proxy = Proxy(target=int(embedded_server.endpoint.rsplit(":", 1)[1]))
    try:
        with open_store(s3_environment, StoreSettings(endpoint=proxy.endpoint, read_timeout=1.0, attempts=2)) as store:
            store.put("blob", bytes(1 << 20))
            for read in (lambda: store.get("blob"), lambda: list(store.list()), lambda: _copied(store, "blob")):
                proxy.arm(Rule(fault=drip, methods=("GET", "LIST"), key="", times=1000))
                with pytest.raises(StoreUnreachableError, match="bytes a second; the minimum is 1024") as caught:
                    read()
                assert proxy.endpoint in str(caught.value)
                assert "\n" not in str(caught.value)
            proxy.arm(None)
            assert store.get("blob") == bytes(1 << 20)
    finally:
        proxy.close()


def _copied(store: Store, key: str) -> int:
    return store.copy_range(key, memoryview(bytearray(1 << 16)), lambda _: None, start=0, length=1 << 20)


def test_a_page_is_no_empty_listing(embedded_server: EmbeddedServer, s3_environment: str) -> None:
    """Where a sign-in page answers for the store, a listing must fail: by an empty one everything would be garbage."""
    page = next(fault for fault in FAULTS if fault.name == "a page of another server")
    proxy = Proxy(target=int(embedded_server.endpoint.rsplit(":", 1)[1]))
    try:
        with open_store(s3_environment, StoreSettings(endpoint=proxy.endpoint, attempts=1)) as store:
            store.put("a", b"1")
            proxy.arm(Rule(fault=page, methods=("LIST",), key=""))
            with pytest.raises(StoreUnreachableError, match="is not a listing"):
                store.list()
            assert [info.key for info in store.list()] == ["a"]
    finally:
        proxy.close()
