"""What a forge and its visitors read: workflows, templates, the citation, and pages that must name all of something."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from birkhoff import __version__
from birkhoff.pipeline.errors import EXIT_CODES
from tests.pages import ROOT, read
from tests.test_pages import TARGETS

FORGE = ROOT / ".github"
WORKFLOWS = sorted(FORGE.glob("workflows/*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_there_is_a_workflow_for_each_kind_of_check() -> None:
    assert [path.stem for path in WORKFLOWS] == ["checks", "docs", "gpu", "tests"]
    ran = " ".join(step.get("run", "") for path in WORKFLOWS for step in steps(path))
    assert {"make check", "make test", "make docs"} <= set(re.findall(r"make [a-z]+", ran))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist_with_few_rights_and_a_limit(workflow: Path) -> None:
    document = yaml.safe_load(workflow.read_text())
    assert document["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 for job in document["jobs"].values())
    targets = set(TARGETS.findall((ROOT / "Makefile").read_text()))
    for step in steps(workflow):
        assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= targets
        assert "run" in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_the_gpu_job_runs_no_code_of_a_pull_request() -> None:
    document = yaml.safe_load((FORGE / "workflows" / "gpu.yml").read_text())
    assert set(document[True]) == {"workflow_dispatch", "schedule"}  # YAML 1.1 reads the key `on` as true
    assert document["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]


def test_workflows_test_the_oldest_python_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    matrix = yaml.safe_load((FORGE / "workflows" / "tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert oldest in matrix["python"]


@pytest.mark.parametrize("name", ["bug", "proposal"])
def test_forms_of_issues_ask_for_what_is_needed(name: str) -> None:
    form = yaml.safe_load((FORGE / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert any(field.get("validations", {}).get("required") for field in fields.values())
    assert all(field["attributes"]["label"] for field in fields.values())


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert "2507.08765" in str(citation["references"])


def test_the_changelog_is_grouped_by_release_and_kind() -> None:
    text = read("CHANGELOG.md").text
    releases = re.findall(r"^## (\S+)", text, re.M)
    assert releases[0] == __version__
    for release in text.split("\n## ")[1:]:
        kinds = re.findall(r"^### (\w+)$", release, re.M)
        assert kinds == [kind for kind in ("Added", "Changed", "Fixed") if kind in kinds]
        assert kinds


def test_every_exit_code_is_on_its_page() -> None:
    rows = re.findall(r"\| (\d+) \| ([^|]+) ", read("docs/reference/exit-codes.md").text)
    assert {int(code) for code, _ in rows} >= set(EXIT_CODES.values())


def test_every_variable_of_the_environment_is_on_its_page() -> None:
    page = read("docs/reference/environment.md").text
    sources = [path for folder in ("codec", "kernels", "pipeline", "src") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bBIRKHOFF_[A-Z_]*[A-Z]\b", path.read_text())}
    assert len(named) > 6
    assert sorted(name for name in named if f"`{name}`" not in page) == []
