"""Checkpoint sources against what torch and safetensors themselves load."""

import hashlib
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from birkhoff.codec.dtypes import DTYPES
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, contiguous_stride
from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor, source_digest
from birkhoff.pipeline.errors import SourceError
from tests.patience import PATIENT_SECONDS

BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)
SHAPES = {
    "matrix": BASE.clone(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "image_encoder.blocks.0.attn.qkv.weight": torch.linspace(-1, 1, 60).reshape(3, 4, 5),
}
VIEWS = {
    "base": BASE,
    "window": BASE[1:3, 2:5],
    "transposed": BASE.t(),
    "strided": BASE[:, ::2],
    "tail": BASE[3],
    "tied": BASE,
    "expanded": torch.tensor([7.0]).expand(5, 1),
}
# The legacy form knows no storages of the dtypes that came after it.
LEGACY_DTYPES = {"bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}


def of_every_dtype(names: set[str]) -> dict[str, torch.Tensor]:
    """Every byte pattern that makes sense in each dtype: 0 and 1 for bool, all others for the rest."""
    raw = torch.arange(256, dtype=torch.uint8)
    return {name: (raw % 2 == 1) if name == "bool" else raw.clone().view(DTYPES[name]) for name in sorted(names)}


def assert_same(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert tensor.is_contiguous()
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (tensor, expected)]
    assert torch.equal(*as_bytes)


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoint lists exactly the `expected` tensors in their order, and reads them bit for bit."""
    assert [tensor.name for tensor in checkpoint.tensors] == list(expected)
    for tensor in checkpoint.tensors:
        assert_same(read_tensor(tensor), expected[tensor.name])


def save_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def pack(path: Path, member: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(member, name)


class TestTorchZip:
    @pytest.mark.parametrize("state", [SHAPES, VIEWS, of_every_dtype(set(DTYPES))], ids=["shapes", "views", "dtypes"])
    def test_reads_what_torch_loads(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "model.pth"
        torch.save(state, path)
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.path, checkpoint.files) == ("torch-zip", path, (path,))
        assert checkpoint.nbytes == path.stat().st_size
        assert_holds(checkpoint, torch.load(path, weights_only=True))
        assert_holds(checkpoint, state)

    def test_describes_views_as_they_are(self, tmp_path: Path) -> None:
        torch.save(VIEWS, tmp_path / "model.pth")
        tensors = {tensor.name: tensor for tensor in open_checkpoint(tmp_path / "model.pth").tensors}
        window = tensors["window"]
        assert (window.shape, window.stride, window.dtype) == ((2, 3), (6, 1), "float32")
        assert window.offset == tensors["base"].offset + 4 * (6 + 2)
        assert window.nbytes == 4 * (6 + 2 + 1)
        assert tensors["expanded"].nbytes == 4

    def test_lists_tied_weights_under_each_name(self, tmp_path: Path) -> None:
        torch.save(VIEWS, tmp_path / "model.pth")
        assert open_checkpoint(tmp_path / "model.pth").shared == (("base", "transposed", "tied"),)

    def test_offsets_are_those_torch_maps(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        torch.save(SHAPES, path)
        raw = path.read_bytes()
        for tensor in open_checkpoint(path).tensors:
            expected = SHAPES[tensor.name].contiguous().numpy().tobytes()
            assert raw[tensor.offset : tensor.offset + tensor.nbytes] == expected

    def test_reads_tensors_saved_on_a_gpu(self, tmp_path: Path) -> None:
        with mock.patch("torch.serialization.location_tag", return_value="cuda:3"):
            torch.save(SHAPES, tmp_path / "model.pth")
        assert_holds(open_checkpoint(tmp_path / "model.pth"), SHAPES)

    def test_reads_parameters_with_and_without_attributes(self, tmp_path: Path) -> None:
        tagged = torch.nn.Parameter(BASE.clone())
        tagged.no_weight_decay = True  # type: ignore[attr-defined]
        state = {"plain": torch.nn.Parameter(BASE.clone()), "tagged": tagged}
        torch.save(state, tmp_path / "model.pth")
        assert_holds(open_checkpoint(tmp_path / "model.pth"), state)

    def test_reads_the_state_dict_of_a_module(self, tmp_path: Path) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        torch.save(module.state_dict(), tmp_path / "model.pth")
        assert_holds(open_checkpoint(tmp_path / "model.pth"), module.state_dict())

    def test_does_not_depend_on_the_order_of_records(self, tmp_path: Path) -> None:
        torch.save(SHAPES, tmp_path / "model.pth")
        with (
            zipfile.ZipFile(tmp_path / "model.pth") as old,
            zipfile.ZipFile(tmp_path / "repacked.pth", "w") as new,
        ):
            for name in reversed(old.namelist()):
                new.writestr(name, old.read(name))
        assert_holds(open_checkpoint(tmp_path / "repacked.pth"), SHAPES)

    def test_reads_files_saved_without_checksums(self, tmp_path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(SHAPES, tmp_path / "model.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        assert_holds(open_checkpoint(tmp_path / "model.pth"), SHAPES)

    def test_reads_files_before_the_byteorder_record(self, tmp_path: Path) -> None:
        torch.save(SHAPES, tmp_path / "model.pth")
        with (
            zipfile.ZipFile(tmp_path / "model.pth") as new,
            zipfile.ZipFile(tmp_path / "old.pth", "w") as old,
        ):
            for name in new.namelist():
                if not name.endswith("byteorder"):
                    old.writestr(name, new.read(name))
        assert_holds(open_checkpoint(tmp_path / "old.pth"), SHAPES)

    def test_takes_any_file_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save(SHAPES, tmp_path / "модель é 模型.weird")
        monkeypatch.chdir(tmp_path)
        checkpoint = open_checkpoint("модель é 模型.weird")
        assert checkpoint.path.is_absolute()
        assert_holds(checkpoint, SHAPES)


class TestSafetensors:
    @pytest.mark.parametrize("state", [SHAPES, of_every_dtype(set(DTYPES))], ids=["shapes", "dtypes"])
    def test_reads_what_the_library_loads(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "model.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        checkpoint = open_checkpoint(path)
        assert (checkpoint.format, checkpoint.nesting, checkpoint.shared) == ("safetensors", (), ())
        loaded = load_file(path)
        in_file_order = sorted(checkpoint.tensors, key=lambda tensor: tensor.offset)
        assert list(checkpoint.tensors) == in_file_order
        assert_holds(checkpoint, {tensor.name: loaded[tensor.name] for tensor in checkpoint.tensors})
        assert set(loaded) == set(state)

    def test_strides_are_those_of_torch(self) -> None:
        for shape in [(), (3,), (2, 0, 5), (0, 3), (4, 1, 2)]:
            assert contiguous_stride(shape) == torch.empty(shape).stride()

    def test_header_length_that_looks_like_a_pickle(self, tmp_path: Path) -> None:
        # 0x0280 bytes of header: the file begins with 80 02, as a pickle of protocol 2 does.
        header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(0x280)
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\x09")
        assert_holds(open_checkpoint(path), {"w": torch.tensor([9], dtype=torch.uint8)})

    def test_content_wins_over_suffix(self, tmp_path: Path) -> None:
        save_file(SHAPES, tmp_path / "model.pth")
        assert open_checkpoint(tmp_path / "model.pth").format == "safetensors"


class TestSharded:
    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        save_file({"a": BASE, "b": torch.ones(2)}, tmp_path / "model-1.safetensors")
        save_file({"c": torch.zeros(3)}, tmp_path / "model-2.safetensors")
        weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 116}, "weight_map": weight_map}))
        return path

    def test_reads_every_shard(self, index: Path) -> None:
        checkpoint = open_checkpoint(index)
        assert_holds(checkpoint, {"a": BASE, "b": torch.ones(2), "c": torch.zeros(3)})
        assert [file.name for file in checkpoint.files] == [
            "model.safetensors.index.json",
            "model-1.safetensors",
            "model-2.safetensors",
        ]
        assert checkpoint.nbytes == sum(file.stat().st_size for file in checkpoint.files)

    def test_digest_is_that_of_the_sha256sum_listing(self, index: Path) -> None:
        names = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
        digests = [hashlib.sha256((index.parent / name).read_bytes()).hexdigest() for name in names]
        listing = f"{digests[0]}  {names[0]}\n{digests[1]}  {names[1]}\n{digests[2]}  {names[2]}\n".encode()
        assert source_digest(open_checkpoint(index)) == hashlib.sha256(listing).hexdigest()

    def test_digest_changes_with_a_shard(self, index: Path) -> None:
        before = source_digest(open_checkpoint(index))
        save_file({"c": torch.ones(3)}, index.parent / "model-2.safetensors")
        assert source_digest(open_checkpoint(index)) != before


class TestLegacy:
    @pytest.mark.parametrize("state", [SHAPES, VIEWS, of_every_dtype(LEGACY_DTYPES)], ids=["shapes", "views", "dtypes"])
    def test_reads_what_torch_loads(self, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "model.pth"
        save_legacy({"epoch": 3, "state_dict": state}, path)
        checkpoint = open_checkpoint(path, cache=tmp_path / "cache")
        assert (checkpoint.format, checkpoint.files) == ("torch-legacy", (path,))
        assert (checkpoint.nesting, checkpoint.skipped) == (("state_dict",), (("epoch", "int"),))
        assert checkpoint.nbytes == path.stat().st_size
        assert_holds(checkpoint, torch.load(path, weights_only=True)["state_dict"])

    def test_tied_weights_stay_tied(self, tmp_path: Path) -> None:
        save_legacy({"base": BASE, "other": torch.ones(2), "tied": BASE}, tmp_path / "model.pth")
        checkpoint = open_checkpoint(tmp_path / "model.pth", cache=tmp_path)
        assert checkpoint.shared == (("base", "tied"),)

    def test_is_rewritten_once(self, tmp_path: Path) -> None:
        cache = tmp_path / "deep" / "cache"
        save_legacy(SHAPES, tmp_path / "model.pth")
        (tmp_path / "copy.pth").write_bytes((tmp_path / "model.pth").read_bytes())
        first = open_checkpoint(tmp_path / "model.pth", cache=cache)
        (copy,) = cache.iterdir()
        written = copy.stat().st_mtime_ns
        second = open_checkpoint(tmp_path / "copy.pth", cache=cache)
        assert second.tensors == first.tensors
        assert [(file, file.stat().st_mtime_ns) for file in cache.iterdir()] == [(copy, written)]

    def test_may_be_rewritten_by_several_at_once(self, tmp_path: Path) -> None:
        save_legacy(SHAPES, tmp_path / "model.pth")
        with ThreadPoolExecutor(4) as pool:
            opened = list(pool.map(lambda _: open_checkpoint(tmp_path / "model.pth", cache=tmp_path / "c"), range(8)))
        assert_holds(opened[0], SHAPES)
        assert all(checkpoint == opened[0] for checkpoint in opened)
        assert len(list((tmp_path / "c").iterdir())) == 1

    def test_needs_a_cache(self, tmp_path: Path) -> None:
        save_legacy(SHAPES, tmp_path / "model.pth")
        with pytest.raises(SourceError, match=r"model\.pth: is a legacy pickle.*pass cache="):
            open_checkpoint(tmp_path / "model.pth")


class TestPacked:
    @pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
    def test_reads_the_packed_checkpoint(self, tmp_path: Path, save: object) -> None:
        inner, path, cache = tmp_path / "efficient.pt", tmp_path / "efficient.pt.zip", tmp_path / "cache"
        assert callable(save)
        save({"model": SHAPES}, inner)
        pack(path, inner, "weights/efficient.pt")
        checkpoint = open_checkpoint(path, cache=cache)
        assert (checkpoint.path, checkpoint.files, checkpoint.nesting) == (path, (path,), ("model",))
        assert checkpoint.nbytes == path.stat().st_size
        assert_holds(checkpoint, SHAPES)
        assert source_digest(checkpoint) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert all(cache in Path(tensor.path).parents for tensor in checkpoint.tensors)

    def test_is_unpacked_once_and_ignores_what_finder_adds(self, tmp_path: Path) -> None:
        torch.save(SHAPES, tmp_path / "a.pt")
        pack(tmp_path / "a.pt.zip", tmp_path / "a.pt", "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt.zip", "a") as archive:
            archive.writestr("__MACOSX/._a.pt", b"resource fork")
        open_checkpoint(tmp_path / "a.pt.zip", cache=tmp_path / "cache")
        (unpacked,) = (tmp_path / "cache").iterdir()
        written = unpacked.stat().st_mtime_ns
        assert_holds(open_checkpoint(tmp_path / "a.pt.zip", cache=tmp_path / "cache"), SHAPES)
        assert unpacked.stat().st_mtime_ns == written

    def test_a_damaged_copy_is_made_again(self, tmp_path: Path) -> None:
        torch.save(SHAPES, tmp_path / "a.pt")
        pack(tmp_path / "a.pt.zip", tmp_path / "a.pt", "a.pt")
        open_checkpoint(tmp_path / "a.pt.zip", cache=tmp_path / "cache")
        (unpacked,) = (tmp_path / "cache").iterdir()
        unpacked.write_bytes(b"cut")
        assert_holds(open_checkpoint(tmp_path / "a.pt.zip", cache=tmp_path / "cache"), SHAPES)

    def test_needs_a_cache(self, tmp_path: Path) -> None:
        torch.save(SHAPES, tmp_path / "a.pt")
        pack(tmp_path / "a.pt.zip", tmp_path / "a.pt", "a.pt")
        with pytest.raises(SourceError, match=r"a\.pt\.zip: is a zip that packs a checkpoint.*pass cache="):
            open_checkpoint(tmp_path / "a.pt.zip")


class TestNesting:
    @pytest.mark.parametrize(
        ("value", "nesting", "skipped"),
        [
            (SHAPES, (), ()),
            (OrderedDict(SHAPES), (), ()),
            ({**SHAPES, "step": 7}, (), (("step", "int"),)),
            ({"model": SHAPES}, ("model",), ()),
            ({"ema": SHAPES, "epoch": 3}, ("ema",), (("epoch", "int"),)),
            ({"model_state_dict": {**SHAPES, "n": None}}, ("model_state_dict",), (("model_state_dict.n", "NoneType"),)),
            (
                {"model": SHAPES, "optimizer": {"state": {0: {"exp_avg": BASE}}}, "args": {"lr": 0.1}},
                ("model",),
                (("optimizer", "dict"), ("args", "dict")),
            ),
            ({"ema": {"w": BASE}, "model": SHAPES}, ("model",), (("ema", "dict of 1 tensors"),)),
            ({"teacher": {"w": BASE}, "state_dict": SHAPES}, ("state_dict",), (("teacher", "dict of 1 tensors"),)),
            ({"state_dict": {"w": BASE}, "model": SHAPES}, ("model",), (("state_dict", "dict of 1 tensors"),)),
        ],
    )
    def test_finds_the_state_dict(
        self,
        tmp_path: Path,
        value: object,
        nesting: tuple[str, ...],
        skipped: tuple[tuple[str, str], ...],
    ) -> None:
        torch.save(value, tmp_path / "model.pth")
        checkpoint = open_checkpoint(tmp_path / "model.pth")
        assert (checkpoint.nesting, checkpoint.skipped) == (nesting, skipped)
        assert_holds(checkpoint, SHAPES)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({}, "holds no tensors"),
            ({"model": {}}, r"holds no tensors.*\['model'\]"),
            ({"epoch": 3, "lr": 0.1}, r"holds no tensors.*\['epoch', 'lr'\]"),
            ([BASE], "holds a list, expected a dict"),
            (BASE, "holds a tensor, expected a dict"),
            ({"encoder": {"w": BASE}, "decoder": {"w": BASE}}, r"2 state dicts, under \['encoder', 'decoder'\]"),
            ({"model": {"encoder": {"w": BASE}}}, r"as deep as 'model\.encoder'"),
            ({"model": {"bias": BASE, "encoder": {"w": BASE}}}, r"as deep as 'model\.encoder'"),
            ({"rng": BASE, "model": {"w": BASE}}, r"at its top level and under \['model'\]"),
            ({3: BASE}, "has the key 3, expected text"),
        ],
    )
    def test_refuses_what_is_no_single_state_dict(self, tmp_path: Path, value: object, message: str) -> None:
        torch.save(value, tmp_path / "model.pth")
        with pytest.raises(SourceError, match=message):
            open_checkpoint(tmp_path / "model.pth")


class TestDescriptors:
    def test_are_small_and_picklable(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "model.pth")
        checkpoint = open_checkpoint(tmp_path / "model.pth")
        packed = pickle.dumps(checkpoint)
        assert len(packed) < 2000
        assert pickle.loads(packed) == checkpoint

    def test_tensors_own_their_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        torch.save(VIEWS, path)
        tensors = [read_tensor(tensor) for tensor in open_checkpoint(path).tensors]
        path.write_bytes(bytes(path.stat().st_size))
        for tensor, expected in zip(tensors, VIEWS.values(), strict=True):
            assert_same(tensor, expected)
        tensors[0].zero_()
        assert_same(tensors[-2], VIEWS["tied"])

    def test_reading_says_when_the_file_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"w": BASE}, path)
        (tensor,) = open_checkpoint(path).tensors
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(SourceError, match=r"'w' needs 96 bytes at \d+, 86 are left; the file has changed"):
            read_tensor(tensor)
        path.unlink()
        with pytest.raises(SourceError, match=r"cannot be read \(FileNotFoundError"):
            read_tensor(tensor)

    def test_refuses_to_read_on_a_big_endian_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_file({"w": BASE}, tmp_path / "model.safetensors")
        (tensor,) = open_checkpoint(tmp_path / "model.safetensors").tensors
        monkeypatch.setattr(sys, "byteorder", "big")
        with pytest.raises(SourceError, match="little-endian"):
            read_tensor(tensor)


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_file], ids=["zip", "legacy", "safetensors"])
def test_digest_is_that_of_the_source_file(tmp_path: Path, save: object) -> None:
    path = tmp_path / "model"
    assert callable(save)
    save(SHAPES, path)
    checkpoint = open_checkpoint(path, cache=tmp_path / "cache")
    assert source_digest(checkpoint) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        source_digest(checkpoint)


def test_opening_takes_no_memory_for_the_data(tmp_path: Path) -> None:
    """Peak memory of a fresh process grows by less than 60 MB over a 300 MB checkpoint (3 MB seen)."""
    path = tmp_path / "large.pth"
    with torch.serialization.skip_data():
        torch.save({f"w{n}": torch.empty(5 << 20) for n in range(15)}, path)
    script = """
import resource, sys
from birkhoff.pipeline.checkpoint.open import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
checkpoint = open_checkpoint(sys.argv[1])
print(sum(tensor.nbytes for tensor in checkpoint.tensors), (peak() - before) << 10)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=PATIENT_SECONDS
    )
    described, growth = map(int, run.stdout.split())
    assert described == 15 * (20 << 20)
    assert path.stat().st_size > described
    assert growth < 60 << 20
