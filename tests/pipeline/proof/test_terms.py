"""What a manifest says of proofs, and what a version's proof is worth under it."""

from pathlib import Path

import pytest

from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.plan.proving import ProofTerms
from birkhoff.pipeline.registry.documents import Agreement, ProofRecord


def load(folder: Path, *lines: str, model: str = "") -> object:
    path = folder / "m.yaml"
    path.write_text("\n".join([*lines, "models:", f"  - {{name: a, source: a.pth{model}}}"]))
    return load_manifest(path)


def terms(folder: Path, *lines: str, model: str = "") -> ProofTerms:
    manifest = load(folder, *lines, model=model)
    return manifest.proving(manifest.models[0])  # type: ignore[attr-defined, no-any-return]


def test_a_models_word_stands_over_the_manifests(tmp_path: Path) -> None:
    assert terms(tmp_path) == ProofTerms()
    found = terms(tmp_path, "floor_agreement: 0.9", "pictures: scans", model=", proof: true, floor_agreement: 0.5")
    assert found == ProofTerms(required=True, floor_agreement=0.5, pictures=str(tmp_path / "scans"))
    assert terms(tmp_path, "floor_agreement: 0.9", model=", proof: false").wanted is False
    assert terms(tmp_path, "proof: false", model=", proof: true").required


def test_code_is_named_from_the_manifests_folder(tmp_path: Path) -> None:
    found = load(tmp_path, model=", builder: 'net.py:build', upstream: clone")
    assert found.models[0].builder == f"{tmp_path / 'net'}.py:build"  # type: ignore[attr-defined]
    assert found.models[0].upstream == str(tmp_path / "clone")  # type: ignore[attr-defined]
    assert load(tmp_path, model=", builder: 'package.net:build'").models[0].builder == "package.net:build"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (", proof: false, floor_agreement: 0.5", "floor_agreement: goes with a proof"),
        (", floor_agreement: 1.5", "less than or equal to 1"),
        (", floor_agrement: 0.5", "did you mean 'floor_agreement'"),
        (", proof: maybe", "valid boolean"),
        (", target_agreement: 0.9, max_bytes: 5MiB", "`max_bytes` and `target_agreement` are two budgets"),
        (", target_agreement: 0.9, proof: false", "agreement 0.9 is found by proofs"),
        (", target_agreement: 97", "less than 1"),
        (", target_agreement: 0.9, profile: paper", "two qualities"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        load(tmp_path, model=model)


def test_a_target_below_the_floor_is_the_users_word(tmp_path: Path) -> None:
    assert terms(tmp_path, model=", target_agreement: 0.6") == ProofTerms(required=True, floor_agreement=0.6)
    assert terms(tmp_path, model=", target_agreement: 0.97").floor_agreement == ProofTerms().floor_agreement
    assert terms(tmp_path, model=", target_agreement: 0.6, floor_agreement: 0.7").floor_agreement == 0.7
    assert terms(tmp_path, model=", target_output_db: 3").floor_output_db == 3


def record(mean: float, own: float | None = None) -> ProofRecord:
    sets = [
        None if m is None else Agreement(inputs=1, prompts=9, agreement_mean=m, output_db=20.0) for m in (mean, own)
    ]
    return ProofRecord(adapter="sam", measured=sets[0], own=sets[1])


def test_the_worse_of_both_sets_counts() -> None:
    assert record(0.9, own=0.7).figures["agreement_mean"] == 0.7
    assert ProofTerms(floor_agreement=0.8).complaint(record(0.9)) is None
    said = ProofTerms(floor_agreement=0.8).complaint(record(0.9, own=0.7))
    assert said is not None
    assert "0.7" in said
    assert "0.8" in said


def test_a_version_is_as_good_as_its_proof() -> None:
    assert ProofTerms().met_by(None)
    assert not ProofTerms(required=True).met_by(None)
    assert ProofTerms(wanted=False).met_by(record(0.1))
    assert ProofTerms(floor_agreement=0.8).met_by(record(0.9))
    assert not ProofTerms(floor_agreement=0.95).met_by(record(0.9))
    assert not ProofTerms(pictures="scans").met_by(record(0.9))
    assert ProofTerms(pictures="scans").met_by(record(0.9, own=0.9))


def test_outputs_of_a_model_without_masks_have_a_floor_of_their_own() -> None:
    outputs = ProofRecord(measured=Agreement(inputs=2, output_db=12.0))
    assert ProofTerms().complaint(outputs) is None
    assert "12 dB" in str(ProofTerms(floor_output_db=20).complaint(outputs))
    assert ProofTerms(floor_output_db=20).complaint(ProofRecord(measured=Agreement(inputs=2))) is None
