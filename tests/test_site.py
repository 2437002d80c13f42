"""The site of the pages: builds without a warning, its links hold, and a browser finds nothing wrong with it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, pages
from tests.pipeline.report.browser import SCHEMES, SCREENS, chromium, look

pytest.importorskip("sphinx", reason="sphinx is not installed: make setup, or the extra docs")
pytest.importorskip("furo", reason="furo is not installed: make setup, or the extra docs")

SEEN = (
    "docs/index.html",
    "docs/tutorial.html",
    "docs/how-to/troubleshoot.html",
    "docs/reference/python.html",
    "manifests/README.html",
)
"""Pages that are looked at: prose, code, wide tables, docstrings. The page of commands is as long as all of them."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees"), "-c", "docs", "."]
    command = [sys.executable, "-m", "sphinx", *words, str(folder / "html")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return folder / "html"


def test_the_generated_pages_are_current() -> None:
    """A clone shows commands and keys without a build, so their pages are committed."""
    for name, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]().items():
        assert len(text.split()) > 500
        assert (ROOT / "docs" / "reference" / name).read_text() == text, f"docs/reference/{name}: run `make docs`"


def test_make_builds_it_the_same_way() -> None:
    assert "-m sphinx -W --keep-going -q -b $(or $(BUILDER),html) -c docs . " in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_every_page_but_readme_is_on_it_and_reached_by_its_links(site: Path) -> None:
    there = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    expected = {name.removesuffix(".md") for name in pages()} - {"README"}
    assert sorted(name for name in expected if name not in there) == []
    reached, waiting = set(), ["docs/index.html"]
    while waiting:
        name = waiting.pop()
        if name not in reached and (site / name).is_file():
            reached.add(name)
            links = re.findall(r'href="([^"#:]+\.html)(?:#[^"]*)?"', (site / name).read_text())
            targets = [((site / name).parent / link).resolve() for link in links]
            waiting += [target.relative_to(site.resolve()).as_posix() for target in targets]
    assert sorted(name for name in expected if f"{name}.html" not in reached) == []


@pytest.mark.slow
def test_links_lead_to_files_and_headings(site: Path) -> None:
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    broken = []
    for path, text in texts.items():
        for link in re.findall(r'(?:href|src)="([^":]+)"', text):
            name, _, anchor = link.partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not target.exists() or (anchor and target in texts and f'id="{anchor}"' not in texts[target]):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(chromium() is None, reason="no chromium on the PATH: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "screen"), [*zip(SCHEMES, SCREENS, strict=True)])
def test_pages_are_accessible_and_fit_the_screen(site: Path, scheme: str, screen: str) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    found = {}
    with look(site / SEEN[0], scheme, screen) as seen:
        for name in SEEN:
            seen.page.goto((site / name).as_uri(), wait_until="load")
            said = [line for line in seen.complaints if not line.startswith(f"request: {site.as_uri()}")]
            wrong = [f"{one['impact']} {one['id']}" for one in seen.axe() if one["impact"] in ("serious", "critical")]
            found[name] = (wrong, said, max(0, seen.overflow()))
            seen.complaints.clear()  # axe fetches styles, which a file may not
    assert found == dict.fromkeys(SEEN, ([], [], 0))
