"""The page of the family: a cell is a result or a reason, and a member that is not there is named."""

from tests.family.members import MEMBERS
from tests.harness.benchmarks.family_report import failed, markdown

ROW = {
    "name": "SAM-L",
    "code": "segment-anything 1.0",
    "builds": {"tensors": 9, "weights": 308_300_000, "published": "2 differ"},
    "side": 256,
    "compresses": {"bytes": 1_233_000_000, "stored": 203_000_000},
    "masks": {"adapter": "sam", "box": {"pixels": 7, "of": 108_000}},
    "loads": {"as": "segment_anything.Sam", "by": "tensors", "compressed": 167, "dense": 0},
    "sqnr_db": {"reason": "AssertionError: nothing was loaded"},
    "everything": {"masks": 3, "points": 16},
    "made_on": {"date": "2026-11-29", "commit": "abc", "load": "1.0 processes in the minute before"},
    "seconds": {"builds": 1.0, "masks": 2.0},
}


def test_each_cell_is_a_result_or_a_reason() -> None:
    page = markdown({"SAM-L": ROW})
    (line,) = [line for line in page.splitlines() if line.startswith("| SAM-L ")]
    assert line == (
        "| SAM-L | segment-anything 1.0 | 308.3 M, 2 differ from the published file | 1233.0 → 203.0 | "
        "167, by tensors | below | 7 of 108 k, side 256 | not offered | 3 at 16 points | not reached |"
    )
    assert "Without a result:\n\n- SAM-L, sqnr_db: AssertionError: nothing was loaded\n" in page
    assert "- date 2026-11-29; commit abc: SAM-L (3 s, load 1.0)" in page
    absent = ", ".join(member.name for member in MEMBERS if member.name != "SAM-L")
    assert f"Not run yet: {absent}.\n" in page
    assert failed(ROW)
    assert not failed({**ROW, "sqnr_db": 23.0})
