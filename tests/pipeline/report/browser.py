"""Looks at a report's page in a headless Chromium.

    python -m tests.pipeline.report.browser [REPORT.html] [--shots DIR]

prints how long the page takes to open, what axe finds, and what the browser complains of, in light and dark, on a phone
and a desktop; without a file it draws a report of the whole family. `test_report_browser.py` runs the same checks.
"""

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birkhoff.pipeline.report.html import render
from tests.pipeline.report.reports import family_report

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")


def chromium() -> str | None:
    """The system's browser."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@dataclass(slots=True, kw_only=True)
class Look:
    """A page as one screen shows it."""

    page: Any
    scheme: str
    screen: str
    complaints: list[str] = field(default_factory=list)
    """Console messages, errors of scripts, and whatever was asked of the network."""

    def load_seconds(self) -> float:
        """From the start of the navigation to the end of `load`."""
        return float(self.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")) / 1000

    def overflow(self) -> int:
        """Pixels by which the page is wider than the screen."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def axe(self) -> list[dict[str, Any]]:
        """What axe finds wrong: `id`, `impact` and the elements."""
        from axe_playwright_python.sync_playwright import Axe

        return list(Axe().run(self.page).response["violations"])

    def open_model(self, index: int) -> Any:
        """Open a model's section and all in it; returns it."""
        section = self.page.locator("details.model").nth(index)
        section.evaluate(
            "section => { for (const d of [section, ...section.querySelectorAll('details')]) d.open = true }"
        )
        section.locator("output").wait_for()
        section.locator(".every tbody tr").first.wait_for()
        return section


@contextlib.contextmanager
def look(file: Path, scheme: str, screen: str) -> Iterator[Look]:
    """Open a page, without a network."""
    from playwright.sync_api import sync_playwright

    width, height = SCREENS[screen]
    with sync_playwright() as player:
        # Containers and CI run as root, where Chromium's own sandbox does not start.
        browser = player.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        found = Look(page=context.new_page(), scheme=scheme, screen=screen)
        page, said = found.page, found.complaints
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url != file.as_uri() and said.append(f"request: {request.url}"))
        page.goto(file.as_uri(), wait_until="load")
        try:
            yield found
        finally:
            browser.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m tests.pipeline.report.browser`."""
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.report.browser", description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, nargs="?", help="the page; one of the whole family where left out")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="write screenshots into this folder")
    parser.add_argument("--model", type=int, default=2, metavar="N", help="open this model's section for the checks")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = options.report or Path(folder) / "report.html"
        if options.report is None:
            file.write_text(render(family_report()))
        print(f"{file.stat().st_size} bytes")
        return 1 if sum(_check(file.resolve(), s, c, options) for s in SCHEMES for c in SCREENS) else 0


def _check(file: Path, scheme: str, screen: str, options: argparse.Namespace) -> int:
    """Number of things that are wrong."""
    with look(file, scheme, screen) as seen:
        seconds = seen.load_seconds()
        if options.shots:
            options.shots.mkdir(parents=True, exist_ok=True)
            seen.page.screenshot(path=options.shots / f"{scheme}-{screen}.png", full_page=True)
        section = seen.open_model(options.model)
        if options.shots:
            section.screenshot(path=options.shots / f"{scheme}-{screen}-model.png")
        found = seen.axe()
        print(f"{scheme} {screen}: {seconds:.2f} s, axe {len(found)}, complaints {len(seen.complaints)}")
        for violation in found:
            where = [node["target"] for node in violation["nodes"][:3]]
            print(f"  {violation['impact']} {violation['id']}: {violation['help']} {json.dumps(where)}")
        print("".join(f"  {line}\n" for line in seen.complaints), end="")
        return len(found) + len(seen.complaints) + max(0, seen.overflow())


if __name__ == "__main__":
    raise SystemExit(main())
