"""Forms of an encoder: what is stored comes back as the same layers, and what is wrong is not timed."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from tests.harness.benchmarks import bench_inference, encoder_forms, encoders, inference_report

TINY = {
    "image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1], "output_channels": 16, "num_pos_feats": 8,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, "tiny", TINY)
    monkeypatch.setattr(inference_report, "_MODELS", ("tiny",))


@pytest.mark.timeout(1800)  # it runs some ten packages; how long each takes on a busy machine is no part of the test
def test_every_form_here_is_verified_and_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    given = ["--models", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(out), "--profiles", "balanced"]
    assert bench_inference.main([*given, "--work", str(tmp_path), "--commit", "abc"]) == 0
    found = json.loads((out / "inference.json").read_text())["cpu tiny"]
    rows = {row["form"]: row for row in found["rows"]}
    assert {"original float32", "original bfloat16", "ours, balanced"} <= rows.keys()
    assert found["made_on"]["commit"] == "abc"
    assert rows["original float32"]["output_sqnr_db"] is None
    assert 20 < rows["ours, balanced"]["output_sqnr_db"] < 50
    assert rows["ours, balanced"]["disk_bytes"] < rows["original bfloat16"]["disk_bytes"]
    assert rows["ours, balanced, packed12"]["disk_bytes"] == rows["ours, balanced"]["disk_bytes"]
    in_int8 = rows["ours, balanced, int8"]
    assert in_int8["weights_bytes"] <= rows["ours, balanced"]["weights_bytes"] * 1.01
    assert 20 < in_int8["output_sqnr_db"] < rows["ours, balanced"]["output_sqnr_db"] + 1
    assert 12 < rows["ours, balanced, packed10"]["output_sqnr_db"] < rows["ours, balanced"]["output_sqnr_db"]
    ran = [row for row in rows.values() if "error" not in row]  # a baseline may refuse so small a model
    assert all(row["latency_ms"] > 0 and row["peak_bytes"] >= row["weights_bytes"] > 0 for row in ran)
    assert "| ours, balanced |" in (out / "inference.md").read_text()


def test_a_wrong_result_is_not_timed(tiny, tmp_path):
    skeleton = partial(encoders.build, TINY, "meta")
    form = encoder_forms.forms("cpu", skeleton, ())[0]

    def broken(folder, skeleton, device):
        model = form.load(folder, skeleton, device)
        nn.init.zeros_(model.vision_encoder.layers[0].mlp.lin1.weight)
        return model

    wrong = encoder_forms.Form(
        name="broken",
        about="",
        dtype=torch.float32,
        store=form.store,
        load=broken,
        least_db=form.least_db,
        foreign=True,
    )
    state = bench_inference.weights_of("tiny", "cpu")
    pixels = bench_inference.pixels_of("tiny")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with torch.inference_mode():
        _, _, output = bench_inference._one(form, state, pixels, tmp_path / "a", skeleton, {})
        with pytest.raises(bench_inference.WrongResultError, match=r"broken is at .* dB, expected 80 at least"):
            bench_inference._one(wrong, state, pixels, tmp_path / "b", skeleton, {"original": output})


def test_what_did_not_run_is_said():
    entry = {"made_on": {"gpu": "G"}, "rows": [{"model": "demo", "form": "baseline", "error": "OSError('no library')"}]}
    page = inference_report.markdown({"cuda demo": entry})
    assert "Did not run there:\n\n- baseline: `OSError('no library')`" in page
