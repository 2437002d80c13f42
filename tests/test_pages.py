"""Every page as its reader follows it: blocks run in order in a folder like a fresh clone, commands and links exist.

All pages share one clone and one store, in which the demo model is published once: by README's first command, its
console script and Ray, as printed. A block under `<!-- not run: REASON -->` does not run. `make test` only collects,
pictures and objects are few, `birkhoff compress` then runs inline, the embedded server stays up between commands, and
commands and snippets run in forks of one process (`tests.warm`), each on its own; all else is as printed. What a
manifest may say is read by the pipeline itself.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from birkhoff.pipeline.cli import main
from birkhoff.pipeline.plan.manifest import Manifest, ModelEntry, load_manifest
from tests import warm
from tests.harness.benchmarks.__main__ import PAGES as DRAWN
from tests.harness.benchmarks.__main__ import parts
from tests.pages import FOLDERS, ROOT, Page, pages

PAGES = pages()
FIRST_READ = ("README.md", "docs/tutorial.md")
RUN = [
    *FIRST_READ,
    *(
        name
        for name, page in PAGES.items()
        if name not in FIRST_READ and {"sh", "python"} & {block.kind for block in page.blocks if block.reason is None}
    ),
]
"""Pages with blocks that run. A newcomer's come first: later ones publish more versions, and `make` starts Ray."""
LEAVES = {
    "docs/tutorial.md": ["masks.png"],
    "docs/how-to/observe.md": ["report.html"],
    "manifests/demo/README.md": ["dense.safetensors"],
}
"""Files that the blocks of a page make."""

ELSEWHERE = ("from segment_anything", "from sam2")
"""What only examples have that `test_guides` runs, with stand-ins for these packages."""

FIRST = "make compress MANIFEST=demo.yaml"
"""The first of README's two commands. It publishes what every page uses; run again, it finds nothing to do."""

SECONDS = 400
"""Within which a block must end."""

TARGETS = re.compile(r"^([a-z-]+):.*## ", re.M)
GLOBAL = {"--debug", "--allow-http", "--help"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what git tracks, this environment as its `.venv`, and a home, a store and caches of its own."""
    if importlib.util.find_spec("transformers") is None or not (Path(sys.prefix) / "bin" / "birkhoff").exists():
        pytest.skip("the pages' commands need the environment of `make setup`")
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "README.md", "src", *FOLDERS):
        (folder / name).symlink_to(ROOT / name)
    for name in ("constraints.txt", "pyproject.toml"):  # copies: an edit meanwhile must not make `make` install anew
        (folder / name).write_bytes((ROOT / name).read_bytes())
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    (environment / ".ready").touch()  # `make setup` has been here
    birkhoff = Path(sys.prefix) / "bin" / "birkhoff"
    subprocess.run([birkhoff, "store", "up"], cwd=folder, env=variables(folder), check=True)
    try:
        ended = shell(folder, FIRST, 2 * SECONDS)  # on a busy machine Ray alone may take five minutes to start
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
        with warm.server(folder, variables(folder)) as client:
            _stand_in(environment, client)
            yield folder
    finally:
        subprocess.run([birkhoff, "store", "down"], cwd=folder, env=variables(folder), check=True)


def _stand_in(environment: Path, client: Path) -> None:
    """From now on `.venv/bin/birkhoff` asks the warm server; the rest of `.venv/bin` stays what it is."""
    (environment / "bin").unlink()
    (environment / "bin").mkdir()
    for path in (Path(sys.prefix) / "bin").iterdir():
        (environment / "bin" / path.name).symlink_to(path)
    (environment / "bin" / "birkhoff").unlink()
    (environment / "bin" / "birkhoff").write_text(f'#!/bin/sh\nexec {client} birkhoff "$@"\n')
    (environment / "bin" / "birkhoff").chmod(0o755)


def variables(folder: Path) -> dict[str, str]:
    """The environment of a newcomer."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "BIRKHOFF_", "MAKE", "ARGS"))
    }
    more = {"BIRKHOFF_HOME": str(folder / ".birkhoff"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return kept | more | {"BIRKHOFF_MIRROR": "", "AWS_EC2_METADATA_DISABLED": "true"}


def shell(folder: Path, script: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a script; all that it started ends with its time."""
    words = ["sh", "-ec", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=folder, env=variables(folder), text=True, start_new_session=True, **pipes) as run:
        try:
            out, err = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGTERM)
            raise
    return subprocess.CompletedProcess(words, run.returncode, out, err)


def bounded(script: str) -> str:
    """A block's commands, those that would take minutes cut short."""
    script = re.sub(r"^make test$", "make test ARGS='--collect-only -q tests/test_pages.py'", script, flags=re.M)
    script = re.sub(r"(birkhoff compress )", r"\1--executor inline ", script)  # Ray has run for `make compress`
    script = re.sub(r"(held_out.py \S+)$", r"\1 --pictures 16", script, flags=re.M)
    return re.sub(r"(birkhoff evaluate )", r"\1--limit 2 ", script)


def run(folder: Path, kind: str, text: str) -> subprocess.CompletedProcess[str]:
    if kind == "sh":
        return shell(folder, bounded(text))
    imported = "" if "import birkhoff\n" in text else "import birkhoff\n"
    (folder / "snippet.py").write_text(imported + text)
    return shell(folder, "./warm.py snippet.py")


def test_blocks_are_marked_as_what_they_are() -> None:
    blocks = [block for page in PAGES.values() for block in page.blocks]
    assert {block.kind for block in blocks} == {"", "sh", "python", "yaml", "console"}
    assert all(len(block.reason) > 10 for block in blocks if block.reason is not None)
    assert not [
        block.text for block in blocks if block.kind == "" and re.search(r"^(make|\.venv|birkhoff)", block.text)
    ]
    assert sum(page.text.count("```") for page in PAGES.values()) == 2 * len(blocks)  # none is seen by half


@pytest.mark.slow
@pytest.mark.timeout(5 * SECONDS)
@pytest.mark.parametrize("name", RUN)
def test_every_block_runs_in_order(name: str, clone: Path) -> None:
    blocks = [block for block in PAGES[name].blocks if block.kind in ("sh", "python") and block.reason is None]
    assert blocks
    for block in blocks:
        if any(package in block.text for package in ELSEWHERE):
            continue
        ended = run(clone, block.kind, block.text)
        assert ended.returncode == 0, f"{block.text}\n{ended.stdout}\n{ended.stderr}"
        if (name, block.text.split("\n")[0]) == ("README.md", FIRST):
            assert "up to date" in ended.stdout
    assert [made for made in LEAVES.get(name, []) if not (clone / made).is_file()] == []


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if any(b.kind == "yaml" for b in page.blocks)])
def test_blocks_of_yaml_are_manifests(name: str, tmp_path: Path) -> None:
    for block in PAGES[name].blocks:
        if block.kind == "yaml":
            (tmp_path / "m.yaml").write_text(block.text)
            assert load_manifest(tmp_path / "m.yaml").models


def test_the_reference_names_every_key_of_a_manifest() -> None:
    page = PAGES["manifests/README.md"].text
    keys = {*Manifest.model_fields, *ModelEntry.model_fields}
    assert len(keys) > 12
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", page)) == []


def unknown(words: list[str]) -> str | None:
    """What a command names that does not exist; None where all of it does."""
    program, *rest = words
    if program == "birkhoff":
        return _unknown_option(typer.main.get_command(main.app), rest)
    if program == "make":
        return _unknown_target(rest)
    if rest[0] == "-m":
        module, part = rest[1], (rest[2:] or ["-"])[0]
        missing = not (ROOT / module.replace(".", "/")).is_dir() and not importlib.util.find_spec(module)
        return (
            module
            if missing
            else part
            if module == "tests.harness.benchmarks" and part not in ["-", *parts(), *DRAWN]
            else None
        )
    return None if (ROOT / rest[0]).is_file() or rest[0].startswith("-") else rest[0]


def _unknown_option(command: click.Command, words: list[str]) -> str | None:
    """The first subcommand or option that the command line does not have."""
    options = {option: p for p in command.params for option in (*p.opts, *p.secondary_opts)}
    left = iter(words)
    for word in left:
        option, value, _ = word.partition("=")
        if word.startswith("-"):
            if option not in options and option not in GLOBAL:
                return word
            if option in options and not value and not getattr(options[option], "is_flag", True):
                next(left, None)
        elif children := getattr(command, "commands", {}):
            if word.isupper():  # COMMAND, say
                return None
            return _unknown_option(children[word], [*left]) if word in children else word
    return None


def _unknown_target(words: list[str]) -> str | None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _ = word.partition("=")
        if not (re.search(rf"\$\({name}\)|\$\(call needs,{name}\)", text) if given else name in TARGETS.findall(text)):
            return word
    return None


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_exist(name: str) -> None:
    wrong = {" ".join(words): found for words in PAGES[name].commands() if (found := unknown(words)) is not None}
    assert wrong == {}


def test_what_does_not_exist_is_found() -> None:
    text = "`birkhoff pul X` `birkhoff pull --outptu Y` `make compres` `make bench PRAT=codec` `python -m\ntests.kaos`"
    block = "\n```sh\n.venv/bin/birkhoff \\\n    store ups  # so\npython no/such.py\n```\n"
    found = [unknown(words) for words in Page(name="x.md", text=text + block).commands()]
    assert found == ["ups", "no/such.py", "pul", "--outptu", "compres", "PRAT=codec", "tests.kaos"]
    page = Page(name="x.md", text="`birkhoff gc --wait 5m` `make pull MODEL=x` `birkhoff --install-completion`")
    assert [unknown(words) for words in page.commands()] == [None, None, None]


def astray(page: Page) -> list[str]:
    """Links of a page to files or headings that are not there, and paths in backticks that nothing matches."""
    found = []
    for link in page.links:
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (ROOT / page.name).parent / path if path else ROOT / page.name
        known = PAGES.get(os.path.relpath(target.resolve(), ROOT))
        if not target.exists() or (anchor and (known is None or anchor not in known.anchors)):
            found.append(link)
    for code in page.codes:
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", code) and "NAME" not in code and not any(ROOT.glob(code)):
            found.append(code)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name: str) -> None:
    assert astray(PAGES[name]) == []


def test_links_astray_are_found() -> None:
    text = "[a](README.md) [b](READ.md) [c](PROMISES.md#concurrent-processes) [d](PROMISES.md#no) `codec/no.py`"
    assert astray(Page(name="x.md", text=text)) == ["READ.md", "PROMISES.md#no", "codec/no.py"]


def test_every_page_is_reached_from_the_first() -> None:
    """By links; tables of results lie in a folder that the first page names."""
    reached, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name in PAGES and name not in reached:
            reached.add(name)
            folder = (ROOT / name).parent
            linked = [link.split("#")[0] for link in PAGES[name].links if "://" not in link]
            waiting += [os.path.relpath((folder / link).resolve(), ROOT) for link in linked]
    results = "tests/harness/benchmarks/results"
    assert results in PAGES["README.md"].links
    assert [name for name in PAGES if name not in reached and not name.startswith(results)] == []
