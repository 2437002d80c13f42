"""Members of the family that repeat another's encoder share its shards whole, with a base and without."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.benchmarks import family, synthetic
from tests.pipeline.command import captured

SCALE = 0.04
SAM, HQ, DECODER = "sam_vit_h_4b8939.pth", "sam_hq_vit_h.pth", "Prompt_guided_Mask_Decoder.pt"
MODELS: dict[str, list[dict[str, Any]]] = {
    "sam": [{"urls": [SAM]}],
    "hq": [{"urls": [HQ]}],
    "mobile": [
        {"urls": [SAM], "keep": ["image_encoder.*"]},
        {"urls": [DECODER], "under": "PromtEncoder", "prefix": "prompt_encoder."},
        {"urls": [DECODER], "under": "MaskDecoder", "prefix": "mask_decoder."},
    ],
}
"""SAM-HQ repeats all of SAM and adds to its decoder; MobileSAMv2 has its encoder, and a decoder of its own."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    synthetic.write_files(folder, [family.files()[name] for name in (SAM, HQ, DECODER)], scale=SCALE, processes=1)
    return folder


def published(
    checkpoints: Path, folder: Path, capsys: pytest.CaptureFixture[str], base: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows of the table, and manifests by model; `base` is that of those but SAM."""
    store = folder / "store"
    models = [
        {
            "name": name,
            "source": [{**part, "urls": [str(checkpoints / url) for url in part["urls"]]} for part in source],
            **({} if base is None or name == base else {"base": base}),
        }
        for name, source in MODELS.items()
    ]
    whole = {"store": store.as_uri(), "proof": False, "profile": "fast", "shard_mib": 1, "models": models}
    (folder / "m.yaml").write_text(json.dumps(whole))
    code, out, err = captured(capsys, "compress", str(folder / "m.yaml"), "--executor", "inline", "--json")
    assert code == 0, err
    rows = {row["model"]: row for row in json.loads(out)}
    manifests = {
        name: json.loads((store / "models" / name / "versions" / row["digest"] / "manifest.json").read_bytes())
        for name, row in rows.items()
    }
    return rows, manifests


@pytest.mark.parametrize("base", [None, "sam"])
def test_encoders_that_are_the_same_are_stored_once(
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    base: str | None,
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    rows, manifests = published(checkpoints, tmp_path, capsys, base)
    shards = {name: {shard["blob"]: shard for shard in found["shards"]} for name, found in manifests.items()}
    encoder = sum(
        tensor.nbytes
        for _, tensor in family.tensors_of(family.files()[SAM], SCALE)
        if tensor.name.startswith("image_encoder.")
    )
    for name in ("hq", "mobile"):
        shared = [shard for blob, shard in shards[name].items() if blob in shards["sam"]]
        assert len(shared) >= 3
        assert sum(shard["source_bytes"] for shard in shared) >= encoder
        assert not any(shard.get("bases") for shard in shared)
        assert rows[name]["shards_reused"] >= len(shared)
    assert [rows[name]["base"] for name in ("hq", "mobile")] == [base and "sam@v1"] * 2
    for name in MODELS:
        assert captured(capsys, "verify", name, "--store", (tmp_path / "store").as_uri())[0] == 0
