"""A report's page in a headless Chromium: silent, self-contained, accessible, usable by mouse, touch and keyboard."""

from pathlib import Path

import pytest

from birkhoff.pipeline.report.document import RunReport
from birkhoff.pipeline.report.evaluation import page
from birkhoff.pipeline.report.html import render
from tests.pipeline.report.browser import SCHEMES, SCREENS, chromium, look
from tests.pipeline.report.evaluations import evaluation
from tests.pipeline.report.reports import HOSTILE, family_report

pytest.importorskip("playwright", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="no chromium on the PATH: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small models: one with a hostile tensor, one that failed, one without change."""
    report = family_report()
    first, *_, last = sorted(report.models, key=lambda model: len(model.layers))[:3]
    layers = (first.layers[0], first.layers[-1].model_copy(update={"name": HOSTILE}), *first.layers[1:24])
    models = (
        first.model_copy(update={"layers": layers, "name": "evil-<b>name</b>"}),
        last.model_copy(
            update={"layers": (), "status": "failed", "error": "<img src=x onerror=alert(1)>: no such file"}
        ),
        last.model_copy(update={"layers": (), "status": "up to date"}),
    )
    return _write(tmp_path_factory, report.model_copy(update={"models": models}))


def _write(factory: pytest.TempPathFactory, report: RunReport) -> Path:
    file = factory.mktemp("page") / "report.html"
    file.write_text(render(report))
    return file


@pytest.mark.parametrize(("scheme", "screen"), [(s, c) for s in SCHEMES for c in SCREENS])
def test_a_page_is_silent_accessible_and_fits_the_screen(few: Path, scheme: str, screen: str) -> None:
    with look(few, scheme, screen) as seen:
        seen.open_model(0)
        assert [(found["id"], found["impact"]) for found in seen.axe()] == []
        assert (seen.complaints, seen.overflow()) == ([], 0)


@pytest.mark.parametrize(("scheme", "screen"), [(s, c) for s in SCHEMES for c in SCREENS])
def test_the_page_of_an_evaluation_is_silent_accessible_and_fits_the_screen(
    tmp_path: Path, scheme: str, screen: str
) -> None:
    file = tmp_path / "evaluation.html"
    file.write_text(page(evaluation()))
    with look(file, scheme, screen) as seen:
        assert [(found["id"], found["impact"]) for found in seen.axe()] == []
        assert (seen.complaints, seen.overflow()) == ([], 0)


def test_a_tensor_can_be_read_off_and_found(few: Path) -> None:
    with look(few, "light", "desktop") as seen:
        section = seen.open_model(0)
        output, slider = section.locator("output"), section.locator("input[type=range]")
        first = output.inner_text()
        slider.focus()
        seen.page.keyboard.press("End")
        assert "bits a weight" in output.inner_text() != first
        assert slider.get_attribute("aria-valuetext") == output.inner_text()
        section.locator(".panel.bits svg").hover(position={"x": 2, "y": 20})
        assert output.inner_text() == first
        rows = section.locator(".every tbody tr:visible")
        every = rows.count()
        section.locator(".find input").fill("<SCRIPT>")
        assert (rows.count(), rows.first.locator("th").inner_text()) == (1, HOSTILE)
        section.locator(".find input").fill("")
        assert rows.count() == every
        assert (seen.complaints, seen.page.locator("b, img").count()) == ([], 0)


def test_the_page_lets_no_foreign_script_run(few: Path) -> None:
    with look(few, "light", "desktop") as seen:
        seen.page.evaluate(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
        )
        assert seen.page.evaluate("window.ran") is None
        assert any("Content Security Policy" in line for line in seen.complaints)


def test_the_page_of_the_whole_family_opens_and_a_link_leads_to_a_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with look(_write(tmp_path_factory, family_report()), "dark", "phone") as seen:
        assert seen.page.locator("details.model[open]").count() == 0
        seen.page.locator("a[href='#model-2']").first.click()
        opened = seen.page.locator("details.model[open]")
        assert (opened.count(), opened.locator("h3").inner_text()) == (1, "SAM-H")
        assert opened.locator(".panel svg").count() == 4
        assert (seen.complaints, seen.overflow()) == ([], 0)
