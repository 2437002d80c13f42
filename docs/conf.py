"""Sphinx configuration of the site, which `make docs` builds.

The source folder is the repository, so links work here and on a forge.
"""

import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "Birkhoff"
author = "the authors of Birkhoff"
copyright = f"{author}, {_PROJECT['license']}"
version = release = _PROJECT["version"]

root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "docs/**/*.rst",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "PROMISES.md",
    "SECURITY.md",
    "codec/FORMAT.md",
    "pipeline/README.md",
    "pipeline/SIGNING.md",
    "pipeline/registry/PROTOCOL.md",
    "manifests/README.md",
    "manifests/*/README.md",
    "tests/harness/benchmarks/*.md",
    "tests/harness/benchmarks/results/*.md",
]
exclude_patterns = ["docs/_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_mock_imports = ["peft"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # docstrings put names between single backticks

smartquotes = False  # they would turn the hyphens of `--quiet` into a dash

html_theme = "furo"
html_title = f"Birkhoff {version}"
html_extra_path = ["extra"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
linkcheck_anchors = False


def setup(app: Sphinx) -> None:
    """Fix what axe finds in the pages."""
    app.connect("html-page-context", _accessible, priority=900)  # after furo has drawn the navigation


def _accessible(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: object) -> None:
    """Give navigation captions a heading level, and let the keyboard reach code and tables that scroll."""
    for key, old, new in (
        ("furo_navigation_tree", 'role="heading"', 'role="heading" aria-level="2"'),
        ("body", "<pre>", '<pre tabindex="0">'),
        ("body", '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
    ):
        if isinstance(context.get(key), str):
            context[key] = context[key].replace(old, new)
