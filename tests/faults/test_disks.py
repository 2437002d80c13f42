"""Full and read-only disks, for real where this machine lets a test mount one."""

from pathlib import Path

import pytest

from tests.harness.faults import disks

pytestmark = pytest.mark.faults


def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not disks.possible():
        pytest.skip("this machine lets nobody mount in a namespace of their own (unshare -rm)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = disks.rows(tmp_path)
    assert len(found) == len(disks.PLACES) * len(disks.FAULTS)
    assert [row for row in found if row["wrong"] or row["leaked"] or row["outcome"] != "fails"] == []
    full = [row["line"] for row in found if row["fault"].startswith("disk full")]
    assert all("No space left" in line or "are free" in line for line in full), full
    read_only = [row["line"] for row in found if row["fault"].startswith("disk read-only")]
    assert all("Read-only" in line for line in read_only), read_only
