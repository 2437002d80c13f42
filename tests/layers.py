"""The imports between this repository's modules and packages, read from their text.

python -m tests.layers          packages in their order, their modules, and what each imports from
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ("codec", "kernels", "pipeline")

ORDER = (
    *("codec/native", "codec/entropy"),
    "codec",
    *("codec/output", "codec/difference"),
    *("kernels/runtime", "kernels/decode", "kernels/entropy", "kernels/encode", "kernels/trellis"),
    *("kernels/feedback", "kernels/linear", "kernels/packed"),
    "kernels/int8",
    "kernels",
    "pipeline",
    *("pipeline/store", "pipeline/checkpoint", "pipeline/download", "pipeline/registry", "pipeline/shard"),
    *(
        "pipeline/plan",
        "pipeline/artifact",
        "pipeline/load",
        "pipeline/segment/adapters",
        "pipeline/segment",
        "pipeline/proof",
        "pipeline/statistics",
        "pipeline/progress",
        "pipeline/run",
        "pipeline/report",
    ),
    "pipeline/api",
    "pipeline/cli",
)
"""Every package, lowest first: each may import from itself and from those before it. `kernels` stands for the modules
right in that folder, which are what users of the layers import; `pipeline` for those that every package needs."""

Graph = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the three folders by its import name."""
    paths = (path for top in TOP for path in sorted((ROOT / top).rglob("*.py")))
    return {name_of(path): path for path in paths}


def name_of(path: Path) -> str:
    """`birkhoff.pipeline.store.base` of `pipeline/store/base.py`; a package's own name of its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("birkhoff", *(part for part in parts if part != "__init__")))


def package_of(path: Path) -> str:
    """`pipeline/store` of `pipeline/store/base.py`."""
    return path.relative_to(ROOT).parent.as_posix()


def imports_of(text: str, known: Iterable[str]) -> Iterator[str]:
    """What a module's text imports of ours, wherever in it: known modules by their names, else what it says."""
    known = set(known)
    for node in ast.walk(ast.parse(text)):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
        for full, module in names:
            if full.split(".")[0] == "birkhoff":
                yield full if full in known else module
            elif full.split(".")[0] in TOP:
                yield f"top-level {full.split('.')[0]}"


def module_graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    found = modules()
    return {name: set(imports_of(path.read_text(), found)) - {name} for name, path in found.items()}


def package_graph(graph: Graph) -> dict[str, set[str]]:
    """The packages that each package imports from, itself left out."""
    found = modules()
    packages: defaultdict[str, set[str]] = defaultdict(set)
    for name, imported in graph.items():
        here = package_of(found[name])
        packages[here] |= {package_of(found[other]) for other in imported if other in found} - {here}
    return dict(packages)


def circle(graph: Graph) -> list[str]:
    """The nodes of one circle, the first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def upward(graph: Graph) -> list[str]:
    """Imports of a package from one that comes after it in `ORDER`."""
    place = {package: index for index, package in enumerate(ORDER)}
    return [f"{here} -> {other}" for here in graph for other in sorted(graph[here]) if place[other] > place[here]]


def main() -> None:
    """Print the packages, what they import from, and how many circles there are."""
    graph, found = module_graph(), modules()
    packages = package_graph(graph)
    for package in ORDER:
        own = [path for path in found.values() if package_of(path) == package]
        print(f"{package:20} {len(own):3} modules  <- {', '.join(sorted(packages[package], key=ORDER.index)) or '-'}")
    edges = sum(len(imported & found.keys()) for imported in graph.values())
    print(
        f"{len(found)} modules, {edges} imports between them; {len(packages)} packages, "
        f"{sum(map(len, packages.values()))} imports between them; "
        f"circles: {'none' if not circle(graph) and not circle(packages) else circle(graph) or circle(packages)}"
    )


if __name__ == "__main__":
    main()
