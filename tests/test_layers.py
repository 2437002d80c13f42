"""Imports run one way: between the three folders, between the packages inside them, and without a circle anywhere."""

from collections import Counter

from tests.layers import ORDER, ROOT, TOP, circle, imports_of, module_graph, modules, package_graph, package_of, upward

MOST_MODULES = 20
"""In a folder: more than that, and a newcomer reads a list instead of a place."""


def test_every_package_has_its_place() -> None:
    assert {package_of(path) for path in modules().values()} == set(ORDER)


def test_imports_run_one_way() -> None:
    assert upward(package_graph(module_graph())) == []


def test_there_is_no_circle() -> None:
    graph = module_graph()
    assert circle(graph) == []
    assert circle(package_graph(graph)) == []


def test_whatever_is_imported_of_ours_is_there() -> None:
    """And nothing is imported by the name of a top-level folder."""
    ours = {"birkhoff", *modules()}
    wrong = {f"{name}: {other}" for name, imported in module_graph().items() for other in imported if other not in ours}
    assert wrong == set()


def test_only_the_pipeline_knows_the_whole() -> None:
    found = modules()
    users = {name.split(".")[1] for name, imported in module_graph().items() if "birkhoff" in imported}
    assert users <= {"pipeline"}
    assert len(found) > 100


def test_a_folder_is_small_enough_to_be_looked_through() -> None:
    counts = Counter(package_of(path) for path in modules().values())
    assert {package: count for package, count in counts.items() if count > MOST_MODULES} == {}


def test_the_top_folders_are_namespace_folders() -> None:
    """A package named `kernels` on the path would stand in the way of the one that transformers imports."""
    assert [top for top in TOP if (ROOT / top / "__init__.py").exists()] == []


def test_what_is_wrong_is_seen() -> None:
    text = "def f():\n    from birkhoff.pipeline.store import base\nimport birkhoff.kernels.decode.op\n"
    text += "import kernels\nimport torch\nfrom birkhoff import __version__\n"
    known = {"birkhoff.pipeline.store.base", "birkhoff.kernels.decode.op"}
    assert sorted(imports_of(text, known)) == [
        "birkhoff",
        "birkhoff.kernels.decode.op",
        "birkhoff.pipeline.store.base",
        "top-level kernels",
    ]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert upward({"pipeline/store": {"pipeline/cli"}}) == ["pipeline/store -> pipeline/cli"]
