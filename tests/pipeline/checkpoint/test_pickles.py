"""Pickles that hold more than weights, or far more than they show: read as data, within bounds, and never called."""

import argparse
import collections
import datetime
import io
import json
import os
import pathlib
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from birkhoff.pipeline.checkpoint import pickle_reader, pickle_vetting
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.errors import SourceError, UnsafeSourceError
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import captured

WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.bias": torch.ones(3)}


class Settings:
    """A class of a trainer's own, which no reader has."""

    def __init__(self) -> None:
        self.rate = 0.1


BESIDE: dict[str, Any] = {
    "numpy scalar": np.float64(0.9),
    "numpy array": np.arange(3),
    "numpy random state": np.random.get_state(),
    "random state": random.getstate(),
    "namespace": argparse.Namespace(lr=1e-3),
    "path": pathlib.PurePosixPath("/x"),
    "defaultdict": collections.defaultdict(dict),
    "datetime": datetime.datetime(2024, 1, 1),
    "bytes": b"abc\xff",
    "bytearray": bytearray(b"abc"),
    "frozenset": frozenset({"a"}),
    "set": {1, 2},
    "complex": 1j,
    "range": range(3),
    "slice": slice(3),
    "deque": collections.deque([1]),
    "class": Settings(),
    "kind": Settings,
    "function": np.mean,
    "signal": signal.Signals.SIGINT,
    "simple namespace": types.SimpleNamespace(a=1),
    "buffer": io.BytesIO(b"abc"),
    "device": torch.device("cuda:1"),
    "dtype": torch.float16,
    "size": torch.Size([1, 2]),
    "generator": torch.Generator().get_state(),
    "module": torch.nn.Linear(2, 2),
    "sparse": [torch.eye(2).to_sparse()],
    "dict of tuples": {(1, 2): 3, None: 4, 1.5: 6},
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
}


def zipped(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for key, data in (records or {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(shape: bytes = b"(K\x04K\x04t", stride: bytes = b"(K\x04K\x01t", start: bytes = b"K\x00") -> bytes:
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x10tQ"
    rest = b"\x89" + named("collections", "OrderedDict") + b")RtR"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + start + shape + stride + rest


def table(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


def shared_tuples(levels: int) -> bytes:
    """A tuple of two of a tuple of two ...: few bytes, and 2^levels leaves for whoever walks or hashes it."""
    steps = (b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels))
    return b")q\x00" + b"".join(steps)


class TestTrainersFiles:
    """What is no tensor, and no dict on the way to one, is a placeholder: the weights beside it load."""

    @pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("kind", BESIDE)
    def test_beside_the_weights(self, tmp_path: Path, kind: str, modern: bool) -> None:
        path = tmp_path / "m.pth"
        saved = {"model": WEIGHTS, kind: BESIDE[kind], "epoch": 3}
        torch.save(saved, path, _use_new_zipfile_serialization=modern)
        if kind == "generator":  # a tensor at the top, so that only `under` tells which weights are meant
            with pytest.raises(SourceError, match="has tensors both at its top level and under"):
                open_checkpoint(path, cache=tmp_path / "cache")
        for under in ["model"] if kind == "generator" else ["model", None]:
            checkpoint = open_checkpoint(path, cache=tmp_path / "cache", under=under)
            found = {tensor.name: read_tensor(tensor).tolist() for tensor in checkpoint.tensors}
            assert found == {name: value.tolist() for name, value in WEIGHTS.items()}
            assert [key for key, _ in checkpoint.skipped] == [kind, "epoch"]

    def test_among_the_weights(self, tmp_path: Path) -> None:
        saved = {**WEIGHTS, "note": argparse.Namespace(a=1), "when": datetime.date(2024, 1, 1), "extra": b"\xff"}
        torch.save(saved, tmp_path / "m.pth")
        checkpoint = open_checkpoint(tmp_path / "m.pth")
        assert [t.name for t in checkpoint.tensors] == list(WEIGHTS)
        assert checkpoint.skipped == (("note", "argparse.Namespace"), ("when", "datetime.date"), ("extra", "bytes"))

    def test_a_defaultdict_may_hold_the_weights(self, tmp_path: Path) -> None:
        torch.save({"model": collections.defaultdict(dict, WEIGHTS)}, tmp_path / "m.pth")
        assert [t.name for t in open_checkpoint(tmp_path / "m.pth").tensors] == list(WEIGHTS)

    def test_a_tensor_that_is_no_weight_matters_among_the_weights_alone(self, tmp_path: Path) -> None:
        sparse = torch.eye(3).to_sparse()
        torch.save({"model": WEIGHTS, "optimizer": {"momentum": sparse}}, tmp_path / "m.pth")
        assert len(open_checkpoint(tmp_path / "m.pth", under="model").tensors) == 2
        torch.save({"model": {**WEIGHTS, "bad": sparse}}, tmp_path / "m.pth")
        with pytest.raises(SourceError, match="'bad' is sparse"):
            open_checkpoint(tmp_path / "m.pth")

    def test_no_attribute_of_a_tensor_counts(self, tmp_path: Path) -> None:
        """Names that torch's own unpickler would set on the tensor."""
        of_type, plain = named("torch._tensor", "_rebuild_from_type_v2"), named("torch", "Tensor")
        inner = tensor()[len(named("torch._utils", "_rebuild_tensor_v2")) : -1]
        for attribute in ("shape", "stride", "storage_offset", "untyped_storage", "__class__"):
            state = b"}(" + text(attribute) + named("builtins", "set") + b"u"
            call = of_type + b"(" + named("torch._utils", "_rebuild_tensor_v2") + plain + inner + state + b"tR"
            (found,) = open_checkpoint(zipped(tmp_path / "m.pth", table(text("w"), call))).tensors
            assert (found.shape, found.stride, found.nbytes) == ((4, 4), (4, 1), 64)


class TestNothingIsCalled:
    @pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
    def test_what_is_skipped_is_not_made(self, tmp_path: Path, modern: bool) -> None:
        """A class of this very module, which could be found and made, leaves its canary alone."""
        canary = tmp_path / "canary"
        torch.save({"model": WEIGHTS, "x": _Touch(canary)}, tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
        checkpoint = open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache")
        assert checkpoint.skipped[0][1].endswith("test_pickles._touch")
        assert not canary.exists()
        pickle.loads(pickle.dumps(_Touch(canary)))
        assert canary.exists()

    @pytest.mark.parametrize(
        "name",
        ["os.system", "subprocess.Popen", "builtins.exec", "__builtin__.eval", "sys.setprofile", "runpy.run_path",
         "importlib.import_module", "builtins.__import__", "webbrowser.open", "shutil.rmtree", "io.open", "nt.system"],
    )  # fmt: skip
    def test_what_runs_commands_is_refused_wherever_it_stands(self, tmp_path: Path, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        for call in (b")R", b")\x81", b"", b"0N"):  # called, made, bare, dropped
            value = named(module, leaf) + call
            path = zipped(tmp_path / "m.pth", table(text("w"), tensor(), text("evil"), value))
            with pytest.raises(UnsafeSourceError, match=f"wants to call '{name}' \\(near 'evil'\\)"):
                open_checkpoint(path)

    def test_the_reader_imports_nothing_but_the_standard_library(self) -> None:
        ran = subprocess.run(
            [sys.executable, "-I", "-S", pickle_reader.__file__, "1"],
            input=pickle.dumps({"a": 1}, 2),
            capture_output=True,
        )
        assert json.loads(ran.stdout)["pickles"][0]["tables"] == [
            {"kind": "dict", "entries": [["a", "int"]], "others": []}
        ]


def _touch(path: str) -> None:
    Path(path).touch()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _touch, (str(self.path),)


class TestBounds:
    """Few bytes that describe much: each ends soon, with weights or in one line."""

    def test_keys_that_share_parts(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "m.pth", table(text("w"), tensor(), shared_tuples(60), text("v")))
        began = time.monotonic()
        checkpoint = open_checkpoint(path)
        assert time.monotonic() - began < 30
        assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
        assert {key for key, _ in checkpoint.skipped} == {"<tuple>"}

    def test_a_tensor_under_such_a_key(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="has the key <tuple>, expected text"):
            open_checkpoint(zipped(tmp_path / "m.pth", table(shared_tuples(60), tensor())))

    def test_values_that_share_parts(self, tmp_path: Path) -> None:
        value = b"]q\x00" + b"".join(
            b"]q" + bytes([k + 1]) + b"(h" + bytes([k]) + b"h" + bytes([k]) + b"e" for k in range(60)
        )
        (found,) = open_checkpoint(zipped(tmp_path / "m.pth", table(text("w"), tensor(), text("v"), value))).tensors
        assert found.name == "w"

    def test_a_dict_that_holds_itself(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "m.pth", b"\x80\x02}q\x00(" + text("w") + tensor() + text("me") + b"h\x00u.")
        with pytest.raises(SourceError, match="has tensors both at its top level and under"):
            open_checkpoint(path)
        with pytest.raises(SourceError, match="as deep as"):
            open_checkpoint(path, under="me")

    def test_many_tensors_that_expand(self, tmp_path: Path) -> None:
        wide = tensor(shape=b"(J\x00\x00\x00\x04t", stride=b"(K\x00t")  # 256 MiB of 4 bytes
        one = zipped(tmp_path / "one.pth", table(text("w"), wide))
        assert open_checkpoint(one).tensors[0].dense_bytes == 256 << 20
        many = zipped(tmp_path / "many.pth", table(*(text(f"w{n}") + wide for n in range(2000))))
        with pytest.raises(SourceError, match=r"tensors expand \d+ bytes to 536870912000, at most \d+ are allowed"):
            open_checkpoint(many)

    @pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
    def test_many_names_of_the_same_bytes(self, tmp_path: Path, modern: bool) -> None:
        base = torch.zeros(1 << 20)
        tied = {f"layer{n}": base for n in range(24)}
        torch.save(tied, tmp_path / "tied.pth", _use_new_zipfile_serialization=modern)
        assert len(open_checkpoint(tmp_path / "tied.pth", cache=tmp_path / "cache").tensors) == 24
        absurd = {f"layer{n}": base for n in range(200)}
        torch.save(absurd, tmp_path / "absurd.pth", _use_new_zipfile_serialization=modern)
        with pytest.raises(SourceError, match=r"tensors expand \d+ bytes to 838860800"):
            open_checkpoint(tmp_path / "absurd.pth", cache=tmp_path / "cache")

    def test_too_many_tensors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickle_vetting, "MAX_TENSORS", 10)
        torch.save({f"w{n}": torch.ones(1) for n in range(11)}, tmp_path / "m.pth")
        with pytest.raises(SourceError, match="a state dict of 11 tensors, at most 10 are allowed"):
            open_checkpoint(tmp_path / "m.pth")

    @pytest.mark.parametrize(
        "forged",
        [
            tensor(stride=b"(J\xff\xff\xff\xffK\x01t"),
            tensor(start=b"J\xf0\xff\xff\xff"),
            tensor(start=b"K\x10"),
            tensor(shape=b"(\x8a\x08" + b"\xff" * 7 + b"\x7fK\x04t"),
            tensor(shape=b"(\x8a\x09" + bytes(8) + b"\x01K\x04t"),
            tensor(shape=b"(\x88K\x04t"),
            tensor(shape=b"(G" + bytes(8) + b"K\x04t"),
            tensor(shape=b"(K\x04t"),
            tensor(shape=b"K\x04"),
        ],
        ids=["stride", "start", "beyond", "huge", "above 2^63", "bool", "float", "ranks", "number"],
    )
    def test_numbers_that_lie(self, tmp_path: Path, forged: bytes) -> None:
        with pytest.raises(SourceError, match=r"spans bytes|cannot be rebuilt|expands few stored bytes"):
            open_checkpoint(zipped(tmp_path / "m.pth", table(text("w"), forged)))

    @pytest.mark.parametrize(
        ("pickled", "what"),
        [
            (b"\x80\x02(" + b"}" * (15 << 20) + b"l.", "memory: 15 million dicts"),
            (b"\x80\x02}(" + text("k" * (1 << 20)) + b"q\x00K\x01" + b"u." + b"", "control"),
        ],
    )
    def test_memory(self, tmp_path: Path, pickled: bytes, what: str) -> None:
        path = zipped(tmp_path / "m.pth", pickled)
        match = "takes more than 1024 MiB or 60 s" if "memory" in what else "holds no tensors"
        with pytest.raises(SourceError, match=match):
            open_checkpoint(path)

    def test_keys_repeated_by_reference(self, tmp_path: Path) -> None:
        """A text of 1 MiB under a thousand tables: a gigabyte, were it written out."""
        tables = b"".join(b"}(h\x00K\x01u" for _ in range(1000))
        pickled = b"\x80\x02}(" + text("k" * (1 << 20)) + b"q\x00" + b"(" + tables + b"l"
        body = b"".join(text(f"t{n}") + b"}(h\x00K\x01u" for n in range(1000))
        path = zipped(tmp_path / "m.pth", pickled + body + b"u.")
        with pytest.raises(SourceError, match="takes more than"):
            open_checkpoint(path)

    def test_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reader that never ends is ended."""
        (tmp_path / "slow.py").write_text("while True: pass\n")
        monkeypatch.setattr(pickle_vetting.pickle_reader, "__file__", str(tmp_path / "slow.py"))
        monkeypatch.setattr(pickle_vetting, "_WALL_SECONDS", 1.0)
        with pytest.raises(SourceError, match="takes more than"):
            open_checkpoint(zipped(tmp_path / "m.pth", table(text("w"), tensor())))

    def test_processor_time_ends_the_reader_itself(self) -> None:
        """Should its parent be killed, nothing of it stays."""
        code = (
            "import runpy, sys, resource\n"
            "import birkhoff_reader as r\n"
            "r.CPU_SECONDS = 1\n"
            "r.answer = lambda *_: [None for _ in iter(int, 1)]\n"
            "r.main()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code.replace("birkhoff_reader", "birkhoff.pipeline.checkpoint.pickle_reader"), "1"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            assert process.wait(PATIENT_SECONDS) in (-signal.SIGXCPU, -signal.SIGKILL)

    def test_the_environment_stays_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
        spy = tmp_path / "spy.py"
        spy.write_text(f"import os, json; open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(dict(os.environ)))\n")
        monkeypatch.setattr(pickle_vetting.pickle_reader, "__file__", str(spy))
        with pytest.raises(SourceError):
            open_checkpoint(zipped(tmp_path / "m.pth", table(text("w"), tensor())))
        assert "canary" not in (tmp_path / "seen").read_text()


class TestOneBadFile:
    """In a manifest beside a good model, and under Ctrl-C."""

    @pytest.fixture
    def command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str]]:
        """Runs a command; gives its exit code and what it wrote."""
        for name, value in environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)

        def run(*words: str) -> tuple[int, str]:
            code, out, err = captured(capsys, *words)
            return code, out + err

        return run

    def test_it_costs_one_model(self, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
        torch.save(WEIGHTS, tmp_path / "good.pth")
        zipped(tmp_path / "bad.pth", b"\x80\x02(" + b"}" * (15 << 20) + b"l.")
        manifest = tmp_path / "m.yaml"
        manifest.write_text("models:\n- {name: good, source: good.pth}\n- {name: bad, source: bad.pth}\n")
        code, said = command("compress", str(manifest), "--executor", "inline")
        assert code == 14, said
        assert "takes more than" in said
        assert command("inspect", "good")[0] == 0

    def test_ctrl_c_ends_it(self, tmp_path: Path) -> None:
        zipped(tmp_path / "bad.pth", table(text("w"), tensor()))
        began_reading = tmp_path / "began"
        (tmp_path / "slow.py").write_text(f"import time; open({str(began_reading)!r}, 'x'); time.sleep(100)\n")
        (tmp_path / "m.yaml").write_text("models:\n- {name: bad, source: bad.pth}\n")
        code = (
            "import sys\n"
            "from birkhoff.pipeline.checkpoint import pickle_reader\n"
            f"pickle_reader.__file__ = {str(tmp_path / 'slow.py')!r}\n"
            "from birkhoff.__main__ import main\n"
            "print('ready', flush=True)\n"
            "main()\n"
        )
        words = [sys.executable, "-c", code, "plan", str(tmp_path / "m.yaml")]
        with subprocess.Popen(
            words, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not began_reading.exists():
                assert process.poll() is None
                time.sleep(0.05)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(PATIENT_SECONDS)
            assert process.returncode == 130
            assert time.monotonic() - began < 15

    def test_the_plan_says_what_was_skipped(self, tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
        torch.save(
            {"model": WEIGHTS, "args": argparse.Namespace(a=1), "rng": np.random.get_state()}, tmp_path / "m.pth"
        )
        (tmp_path / "m.yaml").write_text("models:\n- {name: m, source: m.pth}\n")
        code, said = command("plan", str(tmp_path / "m.yaml"))
        assert code == 0
        assert "args (argparse.Namespace)" in said


def environment(folder: Path) -> dict[str, str]:
    home = {"BIRKHOFF_HOME": str(folder / "home"), "BIRKHOFF_STORE": (folder / "store").as_uri(), "NO_COLOR": "1"}
    return {**os.environ, **home, "COLUMNS": "200"}


def test_reading_takes_no_longer_than_a_checkpoint_of_many_tensors_may() -> None:
    """100,000 tensors are read well inside the limits of time and memory."""
    with torch.serialization.skip_data():
        torch.save({f"block.{n}.weight": torch.empty(1) for n in range(20_000)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    began = time.process_time()
    assert len(pickle_reader.answer(pickled, 1)["pickles"][0]["tensors"]) == 20_000
    assert time.process_time() - began < pickle_reader.CPU_SECONDS / 5
