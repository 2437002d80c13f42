"""`inspect` of artifacts with many tensors: in constant memory, in the checkpoint's order, one line a tensor."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.cli.tables import TENSOR_COLUMNS, stream
from birkhoff.pipeline.registry.documents import SourceRecord, VersionManifest, blob_key, sha256
from birkhoff.pipeline.registry.versions import publish, resolve
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured
from tests.pipeline.publishing import unmeasured

PROGRAM = (
    "import sys\n"
    "from pathlib import Path\n"
    "from birkhoff.pipeline.cli import main\n"
    "code = main.run(lambda: main.app(sys.argv[1:], standalone_mode=False), debug=True)\n"
    "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], file=sys.stderr)\n"
    "sys.exit(code)\n"
)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    found = (tmp_path / "store").as_uri()
    monkeypatch.setenv("BIRKHOFF_STORE", found)
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    return found


def publish_many(url: str, model: str, count: int, *, per_shard: int) -> list[str]:
    """A version of so many tiny tensors; their names in order."""
    coded = encode_tensor("x", torch.arange(4.0), PROFILES["fast"].decide((4,), "float32")).tensor
    names = [f"blocks.{index}.norm.weight" for index in range(count)]
    with open_store(url) as store:
        records = []
        for start in range(0, count, per_shard):
            part = names[start : start + per_shard]
            blob = serialise([replace(coded, name=name) for name in part])
            store.put(blob_key(sha256(blob)), blob)
            records.append(unmeasured(blob, source_bytes=16 * len(part), tensors=len(part)))
        source = SourceRecord(file="f", sha256=sha256(model.encode()), bytes=16 * count, format="test")
        recipe = PROFILES["fast"].recipe()
        publish(
            store,
            VersionManifest(model=model, source=source, profile="fast", recipe=recipe, code="0", shards=tuple(records)),
        )
    return names


def peak_kib(*arguments: str) -> int:
    """Peak memory of a command in a process of its own, whose output goes nowhere."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ran = subprocess.run(
        command, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    return int(ran.stderr)


@pytest.fixture(scope="module")
def few_and_many(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = (tmp_path_factory.mktemp("many") / "store").as_uri()
    publish_many(found, "few", 600, per_shard=100)
    publish_many(found, "many", 30_000, per_shard=500)
    return found


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_memory_does_not_grow_with_the_tensors(few_and_many: str, url: str, form: list[str]) -> None:
    few, many = (peak_kib("inspect", model, *form, "--store", few_and_many) for model in ("few", "many"))
    assert many - few < 12 << 10  # 30,000 drawn rows take 300 MiB


def test_every_tensor_is_there_in_order(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = publish_many(url, "net", 1100, per_shard=7)
    code, out, _ = captured(capsys, "inspect", "net", "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, names)
    code, out, _ = captured(capsys, "inspect", "net")
    title, head, *lines = out.splitlines()
    assert (code, title.startswith("net@v1 (fast): 1100 tensors"), head.split()[0]) == (0, True, "tensor")
    assert [line.split()[0] for line in lines] == names
    assert {len(line.split(maxsplit=6)) for line in lines} == {7}


def test_few_tensors_stand_in_a_drawn_table(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = publish_many(url, "net", 20, per_shard=7)
    code, out, _ = captured(capsys, "inspect", "net")
    assert (code, out.count("┃") > 0) == (0, True)
    assert all(name in out for name in names)


def test_a_pulled_folder_is_read_alike(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    publish_many(url, "net", 1100, per_shard=7)
    assert captured(capsys, "pull", "net", "-o", str(tmp_path / "out"))[0] == 0
    stored, pulled = (captured(capsys, "inspect", place, "--json")[1] for place in ("net", str(tmp_path / "out")))
    assert stored == pulled


def test_what_a_forger_named_moves_no_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(url) as store:
        coded = encode_tensor("x", torch.arange(4.0), PROFILES["fast"].decide((4,), "float32")).tensor
        blob = serialise([replace(coded, name=f"a\x1b[2J\n{index}") for index in range(600)])
        store.put(blob_key(sha256(blob)), blob)
        record = unmeasured(blob, source_bytes=16, tensors=600)
        source = SourceRecord(file="f", sha256=sha256(b"s"), bytes=16, format="test")
        publish(
            store,
            VersionManifest(model="net", source=source, profile="p", recipe={}, code="0", shards=(record,)),
        )
    code, out, _ = captured(capsys, "inspect", "net")
    assert (code, "\x1b" in out, len(out.splitlines())) == (0, False, 602)


def test_json_is_one_document_also_if_a_late_shard_is_gone(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    publish_many(url, "net", 1100, per_shard=7)
    with open_store(url) as store:
        store.delete(blob_key(resolve(store, "net").manifest.shards[-1].blob))
    code, out, _ = captured(capsys, "inspect", "net", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (11, 11)


def test_a_narrow_terminal_gets_the_columns_that_fit() -> None:
    rows = [{"name": f"blocks.{index}.weight", "shape": [4], "dtype": "float32", "why": "w"} for index in range(600)]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    stream(console, TENSOR_COLUMNS, rows, as_json=False, title="net")
    title, head, *lines, last = out.getvalue().splitlines()
    assert (title, len(lines), "dtype" in head, "bits/weight" in head) == ("net", 600, False, True)
    assert max(map(len, [head, *lines])) <= 60
    assert last.startswith("too narrow for: ")
    assert "dtype" in last
