"""The pages of this repository: their fenced blocks, their links, and the commands that they name."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("codec", "docs", "kernels", "pipeline", "manifests", "tests")
PROGRAMS = ("birkhoff", "make", "python")

_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.M)
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'(.*?)\n.*?^\1$", re.M | re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; `reason` where it is not to run."""

    kind: str
    text: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A Markdown file; `name` is its path from the root."""

    name: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        return [Block(kind=m["kind"], text=m["text"], reason=m["reason"]) for m in _BLOCK.finditer(self.text)]

    @property
    def prose(self) -> str:
        """The page without its blocks."""
        return _BLOCK.sub("", self.text)

    @property
    def codes(self) -> list[str]:
        """What stands between backticks in its prose, on one line each."""
        return [" ".join(code.split()) for code in _CODE.findall(self.prose)]

    @property
    def links(self) -> list[str]:
        return _LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """The names under which its headings can be linked to, as the usual renderers make them."""
        heads = _HEADING.findall(self.prose)
        return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of this project that it shows, in blocks of shell and between backticks."""
        shell = "\n".join(_HERE_DOCUMENT.sub(r"\2", block.text) for block in self.blocks if block.kind == "sh")
        for line in [*shell.replace("\\\n", " ").splitlines(), *self.codes]:
            inner = re.fullmatch(r'eval "\$\((.*)\)"', line)
            try:
                words = shlex.split(inner[1] if inner else line, comments=True)
            except ValueError:  # no line of shell
                continue
            if len(words) > 1 and Path(words[0]).name in PROGRAMS:
                yield [Path(words[0]).name, *words[1:]]


def read(name: str) -> Page:
    return Page(name=name, text=(ROOT / name).read_text())


def pages() -> dict[str, Page]:
    """Every page, by its name."""
    files = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    names = sorted(path.relative_to(ROOT).as_posix() for path in files)
    return {name: read(name) for name in names if not any(part[0] in "._" for part in Path(name).parts)}
