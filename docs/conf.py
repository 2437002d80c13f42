"""The site of the pages: `make docs`. Its source folder is the repository, so links hold here and on a forge.

`generate` writes what comes from the code (commands, manifest keys) to `docs/_build/generated`; pages under
`docs/reference` include it.
"""

import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "src")]

import generate  # noqa: E402  (it lies beside this file)

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
    "pipeline/SIGNING.md",
    "pipeline/registry/PROTOCOL.md",
    "manifests/README.md",
    "manifests/*/README.md",
    "tests/harness/benchmarks/kernels.md",
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

html_theme = "furo"
html_title = f"Birkhoff {version}"
html_extra_path = ["extra"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
linkcheck_anchors = False


def setup(app: Sphinx) -> None:
    """Write the generated parts before Sphinx looks for sources."""
    app.connect("builder-inited", lambda _: generate.write(ROOT / "docs" / "_build" / "generated"))
