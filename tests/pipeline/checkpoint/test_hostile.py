"""Checkpoint files that are broken, foreign or forged: every one is refused in one line, and none runs code."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.errors import OutputError, SourceError, UnsafeSourceError

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}
Disk = namedtuple("Disk", "total used free")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def refused(path: Path, match: str, *, kind: type[SourceError] = SourceError) -> None:
    """Opening `path` raises exactly `kind`: one line that names the file, matches, and offers a remedy."""
    with pytest.raises(SourceError, match=match) as caught:
        open_checkpoint(path, cache=path.parent / "cache")
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert len(text.splitlines()) == 1
    assert len(text) < 600 + len(str(path))
    assert text.startswith(f"{path}")
    assert "; " in text


def rewritten(path: Path, change: Callable[[str, bytes], dict[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """A copy of a zip file in which `change` says what becomes of each member."""
    copy = path.with_name(f"forged-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", method) as new:
        for name in old.namelist():
            for changed, data in change(name, old.read(name)).items():
                new.writestr(changed, data)
    return copy


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    """A copy of a file in which the bytes `old` occur and are replaced everywhere."""
    raw = path.read_bytes()
    assert old in raw
    copy = path.with_name(f"forged-{path.name}")
    copy.write_bytes(raw.replace(old, new))
    return copy


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(STATE, path)
    return path


class TestCode:
    """Nothing in a pickle is run: the canary file of each attack must not appear."""

    @pytest.fixture
    def canary(self, tmp_path: Path) -> Path:
        return tmp_path / "canary"

    @pytest.fixture
    def attack(self, canary: Path) -> Calls:
        return Calls(os.system, f"touch {canary}")

    def test_the_canary_works(self, canary: Path, attack: Calls) -> None:
        pickle.loads(pickle.dumps(attack))
        assert canary.exists()

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_torch_save(self, tmp_path: Path, canary: Path, attack: Calls, zipped: bool, protocol: int) -> None:
        path = tmp_path / "model.pth"
        value = {**STATE, "evil": attack}
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        if zipped or protocol == 2:
            refused(path, r"wants to call '(posix|nt)\.system'", kind=UnsafeSourceError)
        else:
            # Its magic number is then spelled otherwise, so to us it is any pickle.
            refused(path, "plain pickle" if protocol == 3 else f"pickle protocol {protocol}")
        assert not canary.exists()

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_plain_pickle(self, tmp_path: Path, canary: Path, attack: Calls, protocol: int) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(pickle.dumps({"model": attack}, protocol=protocol))
        refused(path, r"wants to call '(posix|nt)\.system'", kind=UnsafeSourceError)
        assert not canary.exists()

    @pytest.mark.parametrize("protocol", [0, 1])
    def test_textual_pickle_is_no_known_format(
        self, tmp_path: Path, canary: Path, attack: Calls, protocol: int
    ) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(pickle.dumps(attack, protocol=protocol))
        refused(path, r"begins with b'c(posix|nt).*whatever the suffix \.pt says")
        assert not canary.exists()

    def test_harmless_pickle_of_a_later_protocol(self, tmp_path: Path) -> None:
        torch.save({"model": STATE}, tmp_path / "model.pth", pickle_protocol=4)
        refused(tmp_path / "model.pth", "pickle protocol 4, expected 2")

    def test_in_a_packed_checkpoint(self, tmp_path: Path, canary: Path, attack: Calls) -> None:
        torch.save({"evil": attack}, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt.zip", "w") as archive:
            archive.write(tmp_path / "a.pt", "a.pt")
        refused(tmp_path / "a.pt.zip", r"\(unpacked\).*wants to call", kind=UnsafeSourceError)
        assert not canary.exists()

    def test_says_near_which_key(self, tmp_path: Path, attack: Calls) -> None:
        torch.save({**STATE, "evil": attack}, tmp_path / "model.pth")
        refused(tmp_path / "model.pth", r"near 'evil'", kind=UnsafeSourceError)
        torch.save({**STATE, "evil": attack}, tmp_path / "model.pth", pickle_protocol=4)
        refused(tmp_path / "model.pth", r"near 'evil'", kind=UnsafeSourceError)

    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (Calls(eval, "1"), "__builtin__.eval"),
            (Calls(bytearray, 1 << 40), "__builtin__.bytearray"),
            (b"bytes that double by _codecs.encode", "_codecs.encode"),
            (Calls(torch.load, "other.pth"), "torch.serialization.load"),
            (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ],
        ids=["eval", "bytearray", "bytes", "torch.load", "module"],
    )
    def test_more_than_tensors_need(self, tmp_path: Path, value: object, name: str) -> None:
        torch.save({"model": value}, tmp_path / "model.pth")
        refused(tmp_path / "model.pth", name, kind=UnsafeSourceError)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_a_whole_module_says_what_to_save(self, tmp_path: Path, zipped: bool) -> None:
        torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        refused(
            tmp_path / "m.pth",
            r"Linear.*save model\.state_dict\(\).*safetensors\.torch\.save_file",
            kind=UnsafeSourceError,
        )

    def test_extension_registry(self, pth: Path) -> None:
        forged = rewritten(pth, lambda name, data: {name: b"\x80\x02\x82\x01." if "pkl" in name else data})
        refused(forged, "copyreg extension 1", kind=UnsafeSourceError)


class TestTensorKinds:
    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.eye(3).to_sparse(), "'bad' is sparse"),
            (torch.zeros(2, dtype=torch.complex64), "'bad' is complex64"),
            (torch.empty(2, device="meta"), "'bad' is on the meta device"),
            (torch._neg_view(torch.ones(2)), "'bad' is sparse or a lazily negated view"),
            (torch.tensor([1.0]).expand(1 << 40), "'bad' expands few stored bytes to 4398046511104"),
            (torch.ones([1] * 65), "'bad' has 65 dimensions"),
        ],
        ids=["sparse", "complex", "meta", "negated", "expanded", "dimensions"],
    )
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_are_named(self, tmp_path: Path, tensor: torch.Tensor, message: str, zipped: bool) -> None:
        value = {"good": torch.ones(2), "bad": tensor}
        torch.save(value, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "model.pth", message)

    @pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
    def test_quantized(self, tmp_path: Path) -> None:
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        torch.save({"good": torch.ones(2), "bad": quantized}, tmp_path / "model.pth")
        refused(tmp_path / "model.pth", "'bad' is quantized")


class TestForgedZip:
    def test_compressed(self, pth: Path) -> None:
        forged = rewritten(pth, lambda name, data: {name: data + bytes(99)}, zipfile.ZIP_DEFLATED)
        refused(forged, "is compressed, expected it stored")

    @pytest.mark.parametrize("order", [b"big", b"middle", b""])
    def test_other_byte_order(self, pth: Path, order: bytes) -> None:
        forged = rewritten(pth, lambda name, data: {name: order if name.endswith("byteorder") else data})
        refused(forged, r"byte order is b'.*expected b'little'")

    def test_torchscript(self, pth: Path) -> None:
        with zipfile.ZipFile(pth, "a") as archive:
            archive.writestr("model/constants.pkl", b"")
        refused(pth, "TorchScript")

    @pytest.mark.parametrize("lost", ["data/1", "version"])
    def test_missing_member(self, pth: Path, lost: str) -> None:
        refused(rewritten(pth, lambda name, data: {} if name.endswith(lost) else {name: data}), lost)

    def test_storage_shorter_than_its_tensor(self, pth: Path) -> None:
        forged = rewritten(pth, lambda name, data: {name: data[:5] if name.endswith("data/1") else data})
        refused(forged, r"'b\.weight' spans bytes 0 to 16 of a storage of 5")

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    def test_member_twice(self, pth: Path) -> None:
        with zipfile.ZipFile(pth, "a") as archive:
            archive.writestr("model/data/1", bytes(16))
        refused(pth, "'data/1' occurs twice")

    def test_two_roots(self, pth: Path) -> None:
        with zipfile.ZipFile(pth, "a") as archive:
            archive.writestr("other/data/1", bytes(16))
        refused(pth, r"2 root folders \['model', 'other'\]")

    def test_pickle_too_long(self, pth: Path) -> None:
        forged = rewritten(pth, lambda name, data: {name: bytes(17 << 20) if "pkl" in name else data})
        refused(forged, "'data.pkl' has 17825792 bytes, at most 16777216")

    def test_pickle_of_nonsense(self, pth: Path) -> None:
        refused(rewritten(pth, lambda name, data: {name: b"nonsense" if "pkl" in name else data}), "its pickle is")

    def test_pickle_that_fails_in_the_unpickler(self, pth: Path) -> None:
        # Appends to nothing; well-formed as opcodes.
        forged = rewritten(pth, lambda name, data: {name: b"\x80\x02aaa." if "pkl" in name else data})
        refused(forged, r"its pickle cannot be rebuilt \(IndexError")

    def test_local_header_of_another_name(self, pth: Path) -> None:
        raw = pth.read_bytes()
        pth.write_bytes(raw.replace(b"model/data/1", b"model/data/7", 1))
        refused(pth, "'model/data/1' is called otherwise in its local header")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            (42, 7, "no local header where the directory puts it"),
            (42, 0, "is called otherwise"),
            (20, 1 << 20, "is compressed"),
            (8, 1, "is encrypted"),
        ],
        ids=["offset", "first", "size", "flag"],
    )
    def test_directory_entry(self, pth: Path, field: int, value: int, message: str) -> None:
        raw = bytearray(rewritten(pth, lambda name, data: {name: data}).read_bytes())
        entry = raw.rindex(b"model/data/1") - 46
        assert raw[entry : entry + 4] == b"PK\x01\x02"
        raw[entry + field : entry + field + (2 if field == 8 else 4)] = struct.pack("<H" if field == 8 else "<I", value)
        pth.write_bytes(raw)
        refused(pth, message)

    def test_record_that_runs_into_the_next(self, pth: Path) -> None:
        raw = bytearray(rewritten(pth, lambda name, data: {name: data}).read_bytes())
        entry = raw.rindex(b"model/data/1") - 46
        raw[entry + 20 : entry + 28] = struct.pack("<II", 60, 60)
        pth.write_bytes(raw)
        refused(pth, r"'data/1' ends at byte \d+, expected \d+ at most")


class TestForgedLegacy:
    """Pickles that claim storages which the file does not hold."""

    @staticmethod
    def claiming(path: Path, numel: int) -> Path:
        torch.save({"w": torch.arange(200.0)}, path, _use_new_zipfile_serialization=False)
        claim = b"\x8a" + bytes([(numel.bit_length() + 8) // 8])
        claim += numel.to_bytes((numel.bit_length() + 8) // 8, "little", signed=True)
        return replaced(path, b"K\xc8", claim)

    @pytest.mark.parametrize("numel", [5_000, 1 << 28, 1 << 36])
    def test_more_bytes_than_the_file_has(self, tmp_path: Path, numel: int) -> None:
        path = self.claiming(tmp_path / "m.pth", numel)
        refused(path, rf"its tensors need {4 * numel} bytes or more, the file has \d+|can't allocate memory")

    def test_a_storage_that_the_file_does_not_fill_is_no_leftover_memory(self, tmp_path: Path) -> None:
        torch.save({"w": torch.arange(200.0)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        raw = (tmp_path / "m.pth").read_bytes()
        (keys,) = set(re.findall(rb"\x80\x02\]q\x00X.\x00\x00\x00\d+q\x01a\.", raw))
        (tmp_path / "m.pth").write_bytes(raw.replace(keys, b"\x80\x02]q\x00.".ljust(len(keys), b"\0")))
        leftovers = [torch.full((200,), 7.0) for _ in range(50)]
        del leftovers
        (tensor,) = open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache").tensors
        assert not read_tensor(tensor).any()


class TestForgedSafetensors:
    @staticmethod
    def write(path: Path, header: object, data: bytes = bytes(8), *, length: int | None = None) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
        return path

    @staticmethod
    def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (entry(dtype="F99"), "'w' is 'F99'"),
            (entry(dtype="C64"), "'w' is 'C64'"),
            (entry(dtype=None), "'w' is 'None'"),
            (entry(dtype=["F32"]), r"""'w' is "\['F32'\]" """.strip()),
            (entry(shape=[3]), r"float32\[3\] needs 12 bytes, its offsets span 8"),
            (entry(shape=[-2]), r"shape \[-2\]"),
            (entry(shape=[2.0]), r"shape \[2\.0\]"),
            (entry(shape=[True, 2]), r"shape \[True, 2\]"),
            (entry(shape=2), "shape 2"),
            (entry(shape=[1 << 64, 0]), "shape"),
            (entry(shape=[1 << 62, 1 << 62]), "its offsets span 8"),
            (entry(shape=[1] * 64 + [2]), "65 dimensions"),
            (entry(data_offsets=[8, 0]), "its offsets span -8"),
            (entry(data_offsets=[-8, 0]), r"lies at \[-8, 0\]"),
            (entry(data_offsets=[0, 4, 8]), r"lies at \[0, 4, 8\]"),
            (entry(data_offsets=[4, 12]), r"begins at byte \d+, expected \d+: it leaves a hole"),
            (entry(data_offsets=[0, 1 << 70]), "lies at"),
            (entry(shape=[4], data_offsets=[0, 16]), r"truncated, 8 of \d+ bytes are missing"),
            (entry(shape=[1], data_offsets=[0, 4]), "4 bytes follow the last tensor"),
            ({"dtype": "F32", "shape": [2]}, r"expected \['data_offsets', 'dtype', 'shape'\]"),
            ({**entry(), "more": 1}, "expected"),
            ("text", "'w' is 'text'"),
        ],
    )
    def test_entry(self, tmp_path: Path, entry: object, message: str) -> None:
        refused(self.write(tmp_path / "model.safetensors", {"w": entry}), message)

    def test_overlap(self, tmp_path: Path) -> None:
        header = {"v": self.entry(), "w": self.entry(data_offsets=(4, 12))}
        refused(self.write(tmp_path / "model.safetensors", header, bytes(12)), "'w'.*overlaps the one before")

    def test_duplicate_name(self, tmp_path: Path) -> None:
        entry = json.dumps(self.entry()).encode()
        header = b'{"w":' + entry + b',"w":' + entry + b"}"
        refused(self.write(tmp_path / "model.safetensors", header), "a key occurs twice")

    def test_name_that_is_no_text(self, tmp_path: Path) -> None:
        refused(self.write(tmp_path / "m.safetensors", {"\ud800": self.entry()}), "not valid text")

    def test_long_name_with_line_breaks(self, tmp_path: Path) -> None:
        refused(self.write(tmp_path / "m.safetensors", {"\n" * 9999: self.entry(shape=[3])}), r"\.\.\.")

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"{}", "holds no tensors"),
            ({"__metadata__": {"format": "pt"}}, "holds no tensors"),
            ({"__metadata__": {"format": 1}}, "must map strings to strings"),
            ({"__metadata__": "pt"}, "must map strings to strings"),
            (b'{"w": ', "not valid JSON"),
            (b'{"w": "\xff"}', "not valid JSON"),
            (b'{"w":' + b"[" * 100_000, "not valid JSON"),
            (b'{"w": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ],
    )
    def test_header(self, tmp_path: Path, header: object, message: str) -> None:
        refused(self.write(tmp_path / "model.safetensors", header, b""), message)

    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (100_000_001, "header of 100000001 bytes, at most 100000000"),
            (100_000_000, r"ends \d+ bytes inside its header"),
            (1 << 63, "begins with"),
        ],
    )
    def test_header_length(self, tmp_path: Path, length: int, message: str) -> None:
        refused(self.write(tmp_path / "m.safetensors", {"w": self.entry()}, length=length), message)

    def test_says_how_much_is_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file(STATE, path)
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-13])
        refused(path, f"truncated, 13 of {size} bytes are missing; download it again")


class TestForgedIndex:
    @staticmethod
    def write(folder: Path, weight_map: object) -> Path:
        save_file(STATE, folder / "one.safetensors")
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return path

    @pytest.mark.parametrize(
        "name", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b", "c:d", "x\0y", 3]
    )
    def test_paths(self, tmp_path: Path, name: object) -> None:
        refused(self.write(tmp_path, {"a": name}), "expected a plain file name of the same folder")

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            (
                {"a": "one.safetensors", "b.weight": "two.safetensors"},
                r"lists \['two\.safetensors'\], which are not beside",
            ),
            ({"a": "one.safetensors"}, r"1 tensors that the index does not list there, first 'b\.weight'"),
            ({"a": "one.safetensors", "b.weight": "one.safetensors", "c": "one.safetensors"}, "lacks 1 listed"),
            ({}, "without a weight_map"),
            (None, "without a weight_map"),
            (["a"], "without a weight_map"),
        ],
    )
    def test_listing(self, tmp_path: Path, weight_map: object, message: str) -> None:
        refused(self.write(tmp_path, weight_map), message)

    def test_other_json(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["SamModel"]}')
        refused(tmp_path / "config.json", "JSON without a weight_map")

    def test_shard_that_is_no_safetensors(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, {"a": "one.safetensors"})
        (tmp_path / "one.safetensors").write_bytes(b"nonsense")
        with pytest.raises(SourceError, match=r"one\.safetensors: claims a header"):
            open_checkpoint(path)


class TestPackedZip:
    @staticmethod
    def write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    @pytest.fixture
    def inner(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(STATE, buffer)
        return buffer.getvalue()

    @pytest.mark.parametrize("name", ["../../evil.pt", "/evil.pt", "a/../../evil.pt", "..\\evil.pt", "c:\\evil.pt"])
    def test_names_that_leave_the_archive(self, tmp_path: Path, inner: bytes, name: str) -> None:
        refused(self.write(tmp_path / "a.pt.zip", {name: inner}), "points out of the archive")
        assert not list(tmp_path.parent.rglob("evil.pt"))

    def test_bomb(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.pt.zip", {"a.pt": bytes(8 << 20)})
        refused(path, r"inflates \d+ bytes to 8388608, at most 100 times")
        assert not (tmp_path / "cache").exists()

    def test_bomb_that_lies_about_its_size(self, tmp_path: Path) -> None:
        raw = self.write(tmp_path / "a.pt.zip", {"a.pt": bytes(1 << 20)}).read_bytes()
        claimed = raw.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 5000))
        (tmp_path / "a.pt.zip").write_bytes(claimed)
        refused(tmp_path / "a.pt.zip", "packed member cannot be unpacked.*CRC")
        assert not list((tmp_path / "cache").iterdir())

    def test_does_not_fit_on_the_disk(self, tmp_path: Path, inner: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 40, 1 << 40, 1000))
        refused(self.write(tmp_path / "a.pt.zip", {"a.pt": inner}), r"needs \d+ bytes.*, 1000 are free; make room")
        assert not list((tmp_path / "cache").iterdir())

    def test_a_legacy_copy_that_does_not_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1 << 40, 1 << 40, 1000))
        torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        refused(tmp_path / "m.pth", "needs 40 bytes")
        assert not list((tmp_path / "cache").iterdir())

    @pytest.mark.parametrize("names", [[], ["readme.txt"], ["a.pt", "b.pth"], ["a.pt/"]])
    def test_not_one_checkpoint(self, tmp_path: Path, inner: bytes, names: list[str]) -> None:
        path = self.write(tmp_path / "a.zip", dict.fromkeys(names, inner))
        refused(path, "an empty zip file" if not names else r"holds [02] \.pt or \.pth files")

    def test_other_compression(self, tmp_path: Path, inner: bytes) -> None:
        refused(self.write(tmp_path / "a.zip", {"a.pt": inner}, zipfile.ZIP_BZIP2), "compressed by method 12")

    def test_encrypted(self, tmp_path: Path, inner: bytes) -> None:
        path = self.write(tmp_path / "a.zip", {"a.pt": inner})
        raw = bytearray(path.read_bytes())
        raw[6] |= 1
        raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
        refused(path, "encrypted")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"nonsense" * 9, r"\(unpacked\): begins with"),
            (b"", r"\(unpacked\): is empty"),
            (b"\x02\0\0\0\0\0\0\0{}", r"\(unpacked\): a safetensors file, expected what torch.save writes"),
        ],
    )
    def test_member_that_is_no_checkpoint(self, tmp_path: Path, data: bytes, message: str) -> None:
        refused(self.write(tmp_path / "a.pt.zip", {"a.pt": data}), message)

    def test_zip_in_a_zip(self, tmp_path: Path, inner: bytes) -> None:
        nested = self.write(tmp_path / "b.pt.zip", {"b.pt": inner}).read_bytes()
        refused(self.write(tmp_path / "a.pt.zip", {"b.pt": nested}), "a zip file, expected what torch.save writes")


class TestForeign:
    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("m.pth", b"", "is empty"),
            ("m.pth", b"x", "begins with b'x'.*whatever the suffix .pth says"),
            ("m.bin", b"just text\n", r"begins with b'just text\\n', expected safetensors, torch.save or a zip of it;"),
            ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
            ("m.pth", b"<!DOCTYPE html><html>Not found</html>", "an HTML page"),
            ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
            ("m.pth", b"\x1f\x8b\x08" + bytes(90), "gzip data"),
            ("m.pth", bytes(257) + b"ustar\x0000" + bytes(300), "a tar file"),
            ("m.pth", b"PK\x05\x06" + bytes(18), "an empty zip file"),
            ("m.pth", pickle.dumps({"a": 1}, protocol=2), "a plain pickle, expected a checkpoint"),
            ("m.safetensors", b"PK\x03\x04" + bytes(90), r"by content a zip file, whatever the suffix \.safetensors"),
            ("m.pth", b"PK\x03\x04" + bytes(90), "zip file of 94 bytes without a readable directory at its end"),
            ("m.pth", b"\x09\0\0\0\0\0\0\0{}", r"ends 7 bytes inside.*by content a safetensors file.*\.pth"),
        ],
    )
    def test_content(self, tmp_path: Path, name: str, data: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, message)

    def test_missing(self, tmp_path: Path) -> None:
        refused(tmp_path / "missing.pth", "no such file; check the path")

    def test_folder_and_pipe(self, tmp_path: Path) -> None:
        refused(tmp_path, "not a regular file")
        os.mkfifo(tmp_path / "pipe.pth")
        refused(tmp_path / "pipe.pth", "not a regular file")

    def test_unreadable(self, pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*args: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
        refused(pth, "cannot be read .*Permission denied.*check path and permissions")

    def test_cache_that_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(OutputError, match=r"cache: File exists; point BIRKHOFF_HOME at a folder that can be"):
            open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache")

    def test_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*args: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        monkeypatch.setattr("tempfile.mkstemp", denied)
        with pytest.raises(OutputError, match=r"cache: Permission denied; point BIRKHOFF_HOME"):
            open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache")

    def test_damaged_cache(self, tmp_path: Path) -> None:
        torch.save(STATE, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache")
        (copy,) = (tmp_path / "cache").iterdir()
        save_file(STATE, copy)
        with pytest.raises(SourceError, match=r"damaged cached copy.*delete it"):
            open_checkpoint(tmp_path / "m.pth", cache=tmp_path / "cache")


def _specimens() -> dict[str, bytes]:
    """One small file of each form."""
    modern, legacy, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": STATE, "epoch": 3}, modern)
    torch.save({"model": STATE, "epoch": 3}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pt", modern.getvalue())
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    raw = json.dumps(header).encode()
    return {
        "m.pth": modern.getvalue(),
        "legacy.pth": legacy.getvalue(),
        "a.pt.zip": packed.getvalue(),
        "m.safetensors": len(raw).to_bytes(8, "little") + raw + bytes(24),
    }


SPECIMENS = _specimens()
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", SPECIMENS)
class TestAnyDamage:
    def test_the_specimen_is_sound(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(SPECIMENS[name])
        assert open_checkpoint(tmp_path / name, cache=tmp_path / "cache").tensors

    @FUZZ
    @given(data=st.data())
    def test_a_cut_file_is_refused(self, tmp_path: Path, name: str, data: st.DataObject) -> None:
        whole = SPECIMENS[name]
        (tmp_path / name).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        refused(tmp_path / name, ".")

    @FUZZ
    @given(data=st.data())
    def test_a_mutated_file_is_refused_or_read(self, tmp_path: Path, name: str, data: st.DataObject) -> None:
        raw = bytearray(SPECIMENS[name])
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
            raw[place] = data.draw(st.integers(0, 255))
        (tmp_path / name).write_bytes(raw)
        fault = ""
        try:
            checkpoint = open_checkpoint(tmp_path / name, cache=tmp_path / "cache")
            for tensor in checkpoint.tensors:
                assert read_tensor(tensor).shape == tensor.shape
        except SourceError as error:
            fault = str(error)
        assert len(fault.splitlines()) <= 1
