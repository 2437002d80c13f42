"""The fleet's data: the manifest of all models, the layouts, and synthetic checkpoints."""

import math
import os
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor, source_digest
from birkhoff.pipeline.download import resolve
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.plan.manifest import load_manifest
from tests.harness.benchmarks import bench_fleet, family, fleet_report, synthetic
from tests.harness.benchmarks.process_tree import measure, own_bytes, shared_bytes
from tests.patience import PATIENT_SECONDS

MANIFEST = Path(__file__).parents[3] / "manifests" / "all_sams.yaml"
SCALE = 0.04


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: read_tensor(tensor) for tensor in open_checkpoint(path, cache=path.parent / "cache").tensors}


def written(folder: Path, *names: str) -> list[Path]:
    return synthetic.write_files(folder, [family.files()[name] for name in names], scale=SCALE, processes=1)


def test_manifest_and_family_name_the_same_models_and_files() -> None:
    entries = {entry.name: entry for entry in load_manifest(MANIFEST).models}
    published = {member.name: member for member in family.members()}
    assert list(entries) == list(published)
    for name, entry in entries.items():
        assert tuple(dict.fromkeys(part.name for part in entry.source)) == published[name].files, name


def test_manifest_fetches_over_https_only() -> None:
    urls = [url for entry in load_manifest(MANIFEST).models for part in entry.source for url in part.urls]
    assert len(urls) == 23
    assert all(url.startswith("https://") for url in urls)


def test_the_newer_ones_stand_beside_the_table() -> None:
    newer, table = (load_manifest(path).models for path in (MANIFEST.with_name("newer_sams.yaml"), MANIFEST))
    urls = [url for entry in newer for part in entry.source for url in part.urls]
    assert all(url.startswith("https://") for url in urls)
    assert {url for entry in table for part in entry.source for url in part.urls}.isdisjoint(urls)
    assert {entry.name for entry in table}.isdisjoint(entry.name for entry in newer)
    assert {"SAM2.1-Tiny", "SAM2.1-S", "SAM2.1-B", "SAM2.1-L", "TinySAM-3.0"} <= {entry.name for entry in newer}


@pytest.mark.parametrize("member", [m for m in family.members() if m.original_mib], ids=lambda member: member.name)
def test_layouts_have_the_published_sizes(member: family.Member) -> None:
    expected = member.original_mib or 0.0
    mib = sum(
        tensor.nbytes
        for file in member.files
        for _, tensor in family.tensors_of(family.files()[file])
        if len(member.files) == 1 or file != member.files[0] or tensor.name.startswith("image_encoder.")
    ) / (1 << 20)
    assert mib == pytest.approx(expected, rel=0.01, abs=0.8)


def test_frozen_weights_are_drawn_once() -> None:
    for size, extra in (("b", 25), ("l", 25), ("h", 25)):
        sam = next(spec for spec in family.files().values() if spec.file.startswith(f"sam_vit_{size}_"))
        hq = family.tensors_of(family.files()[f"sam_hq_vit_{size}.pth"])
        owners = Counter(owner for owner, _ in hq)
        assert owners == {sam.file: len(family.tensors_of(sam)), f"sam_hq_vit_{size}.pth": extra}
        assert {owner for owner, tensor in hq if tensor.name.startswith("image_encoder.")} == {sam.file}
    own = family.tensors_of(family.files()["sam_hq_vit_tiny.pth"])
    assert {owner for owner, _ in own} == {"sam_hq_vit_tiny.pth"}


def test_files_hold_what_is_drawn_and_torch_reads_them(tmp_path: Path) -> None:
    (path,) = written(tmp_path, "edge_sam.pth")
    loaded = torch.load(path, weights_only=True)
    owned = family.tensors_of(family.files()[path.name], SCALE)
    expected = {tensor.name: (owner, tensor) for owner, tensor in owned}
    assert list(loaded) == list(expected)
    for name, (owner, tensor) in expected.items():
        np.testing.assert_array_equal(loaded[name].numpy(), synthetic.draw(owner, tensor))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_nesting_and_packing(tmp_path: Path) -> None:
    flat, nested, packed = written(tmp_path, "mobile_sam.pt", "sam2_hiera_tiny.pt", "efficient_sam_vits.pt.zip")
    assert open_checkpoint(flat).nesting == ()
    assert open_checkpoint(nested).nesting == ("model",)
    assert len(weights_of(packed)) == len(family.layout("efficient_sam_s"))
    assert not packed.with_suffix("").exists()


def test_the_decoder_of_mobilesamv2_is_two_state_dicts_that_its_manifest_joins(tmp_path: Path) -> None:
    names = ("sam_vit_h_4b8939.pth", "Prompt_guided_Mask_Decoder.pt")
    encoder, decoder = written(tmp_path, *names)
    loaded = torch.load(decoder, weights_only=True)
    assert set(loaded) == {"PromtEncoder", "MaskDecoder"}
    with pytest.raises(SourceError, match=r"2 state dicts, under .*name the wanted one with `under`"):
        open_checkpoint(decoder)
    (entry,) = (entry for entry in load_manifest(MANIFEST).models if entry.name == "MobileSAMv2-ViT-H")
    joined = resolve.resolve(entry.source, cache=tmp_path / "cache", downloads=tmp_path / "downloads", mirror=tmp_path)
    expected = {name for name in torch.load(encoder, weights_only=True) if name.startswith("image_encoder.")}
    expected |= {f"prompt_encoder.{name}" for name in loaded["PromtEncoder"]}
    expected |= {f"mask_decoder.{name}" for name in loaded["MaskDecoder"]}
    assert {tensor.name for tensor in joined.tensors} == expected
    assert joined.nesting == ()
    assert joined.skipped == ()
    read = {tensor.name: read_tensor(tensor) for tensor in joined.tensors}
    for key, prefix in (("PromtEncoder", "prompt_encoder."), ("MaskDecoder", "mask_decoder.")):
        for name, tensor in loaded[key].items():
            assert torch.equal(read[prefix + name], tensor), name
    spec = family.files()[decoder.name]
    (place,) = [pair for pair in family.tensors_of(spec, SCALE) if pair[1].name == "mask_decoder.iou_token.weight"]
    np.testing.assert_array_equal(loaded["MaskDecoder"]["iou_token.weight"].numpy(), synthetic.draw(*place))


def test_writing_again_and_apart_gives_the_same_bytes(tmp_path: Path) -> None:
    (first,) = written(tmp_path / "a", "tinysam.pth")
    specs = [family.files()[name] for name in ("efficient_sam_vitt.pt", "tinysam.pth")]
    _, second = synthetic.write_files(tmp_path / "b", specs, scale=SCALE, processes=1)
    assert source_digest(open_checkpoint(first)) == source_digest(open_checkpoint(second))


def test_weights_look_like_weights() -> None:
    tensors = family.tensors_of(family.files()["edge_sam.pth"], 0.25)
    drawn = [(tensor, synthetic.draw(owner, tensor)) for owner, tensor in tensors]
    assert all(np.isfinite(values).all() for _, values in drawn)
    counters = [values for tensor, values in drawn if tensor.kind == "counter"]
    assert counters
    assert all(values.dtype == np.int64 and values > 0 for values in counters)
    assert all((values > 0).all() for tensor, values in drawn if tensor.name.endswith("running_var"))
    norms = [values.mean() for tensor, values in drawn if tensor.name.endswith("norm1.weight")]
    assert norms
    assert all(0.7 < mean < 1.3 for mean in norms)
    scaled = [values.std() * math.sqrt(values[0].size) for tensor, values in drawn if tensor.kind == "linear"]
    assert 0.3 < np.median(scaled) < 1.5
    assert max(scaled) > 2 * np.median(scaled)


def test_one_model_writes_only_its_files() -> None:
    assert [spec.file for spec in family.wanted_files(["MobileSAMv2-ViT-H"])] == [
        "sam_vit_h_4b8939.pth",
        "Prompt_guided_Mask_Decoder.pt",
    ]
    with pytest.raises(ValueError, match="no model 'SAM-X'"):
        family.wanted_files(["SAM-X"])


def test_sharing_counts_common_blobs_once() -> None:
    rows = [{"stored_bytes": 60}, {"stored_bytes": 50}]
    assert bench_fleet.sharing(rows, {"blobs/a": 40, "blobs/b": 15})["stored_share"] == 0.5


def test_criteria_are_judged_only_where_they_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "wall_s": 21.0,
        "peak_bytes_by_role": {"worker": 7e9},
        "stored_share": 0.51,
        "second_run_s": 3.0,
        "second_run_new_blobs": 1,
    }
    record = fleet_report.record(
        form="fleet", store="file", scale=1.0, runs=[{"figures": figures, "models": [{}] * 18, "problems": []}]
    )
    record["machine"] |= {"gpus": ["NVIDIA H200"], "cores": 16}
    assert [verdict for *_, verdict in fleet_report.criteria(record)] == ["missed", "met", "met", "missed"]
    record["machine"]["gpus"] = []
    assert next(verdict for *_, verdict in fleet_report.criteria(record)) not in ("met", "missed")
    assert fleet_report.criteria({**record, "scale": 0.1}) == []


def test_memory_of_a_command_includes_detached_children() -> None:
    held = "held = bytearray(80 << 20); import time; time.sleep(1.2)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}], start_new_session=True)"
    found = measure([sys.executable, "-c", child], environment=dict(os.environ), limit_s=30)
    assert found.returncode == 0
    assert found.peaks["other"] > 80 << 20
    assert found.peak > found.job_peak > 0


def test_time_limit_ends_everything_that_was_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    found = measure([sys.executable, "-c", parent], environment=dict(os.environ), limit_s=1.5)
    assert found.returncode is None
    assert found.wall_s < 3
    pid = int(note.read_text())
    assert own_bytes(pid) == shared_bytes(pid) == 0  # gone, or a zombie that init has yet to collect


def test_memory_is_what_the_kernel_says_but_for_pages_of_a_fork() -> None:
    with subprocess.Popen([sys.executable, "-c", "held = bytearray(80 << 20); input()"], stdin=subprocess.PIPE) as held:
        try:
            deadline = time.monotonic() + PATIENT_SECONDS
            while own_bytes(held.pid) < 80 << 20:
                assert time.monotonic() < deadline
            words = Path(f"/proc/{held.pid}/smaps_rollup").read_text().split()
            whole = int(words[words.index("Pss:") + 1]) << 10
            assert own_bytes(held.pid) + shared_bytes(held.pid) == pytest.approx(whole, abs=1 << 20)
        finally:
            held.kill()
