"""README.md as the first page: short, and its table is what the results say. `test_pages` runs its blocks."""

import re

from tests.harness.benchmarks import summary
from tests.pages import read

MOST_WORDS = 900


def test_it_is_short() -> None:
    words = re.sub(r"<!--.*?-->", "", read("README.md").text, flags=re.S).split()
    assert len([word for word in words if re.search(r"\w", word)]) <= MOST_WORDS  # the rules of tables are no words


def test_its_table_is_what_the_results_say() -> None:
    text = summary.README.read_text()
    assert summary.lines() in text, f"the results changed: {summary.COMMAND}"
    assert summary.written(text) == text


def test_the_table_shows_where_this_loses() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary.lines().splitlines()[2:]]
    ours = [row for row in rows if "Birkhoff" in row[0]]
    others = [row for row in rows if "Birkhoff" not in row[0]]
    assert len(ours) >= 3
    assert max(float(row[2]) for row in others) > max(float(row[2]) for row in ours)  # float16 keeps masks better
    assert min(float(row[4]) for row in others if row[4]) < min(
        float(row[4]) for row in ours
    )  # 4 bits take less memory
