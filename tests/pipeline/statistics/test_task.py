"""Keys of statistics: by content, so that they are found again from another folder and not after a change."""

from dataclasses import replace

from birkhoff.pipeline.statistics.task import COUNTS, counts_on, key_of, keys_of
from tests.pipeline.statistics.places import CODE, Place

BEST = COUNTS[0]


def test_whatever_decides_them_makes_another_key(place: Place) -> None:
    subject, sha256 = place.subject, "a" * 64
    config = ("config.json", {"model_type": "sam"})
    variants = [
        (sha256, subject, BEST),
        ("b" * 64, subject, BEST),
        (sha256, replace(subject, adapter="sam"), BEST),
        (sha256, replace(subject, config=config), BEST),
        (sha256, replace(subject, builder="module:build"), BEST),
        (sha256, replace(subject, builder=f"{place.folder}/net.py:other"), BEST),
        (sha256, replace(subject, inputs=None), BEST),
        (sha256, subject, replace(BEST, pictures=1)),
        (sha256, subject, replace(BEST, probes=2)),
    ]
    assert len({key_of(*variant) for variant in variants}) == len(variants)
    keys = keys_of(sha256, subject)
    assert set(keys) == {key_of(sha256, subject, counts) for counts in COUNTS}
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of(sha256, subject, BEST)


def test_places_and_what_a_proof_needs_make_none(place: Place) -> None:
    before = key_of("a" * 64, place.subject, BEST)
    (place.folder / "elsewhere").mkdir()
    (place.folder / "elsewhere" / "code.py").write_text(CODE)
    moved = replace(
        place.subject,
        builder=f"{place.folder}/elsewhere/code.py:build",
        inputs=f"{place.folder}/elsewhere/code.py:batches",
    )
    proven = replace(place.subject, metric="m.py:f", pictures="/pictures", required=True, upstream="/clone")
    assert {key_of("a" * 64, subject, BEST) for subject in (moved, proven)} == {before}
    (place.folder / "net.py").write_text(CODE.replace("ReLU", "GELU"))
    assert key_of("a" * 64, place.subject, BEST) != before


def test_models_with_the_same_statistics_wait_for_each_other(place: Place) -> None:
    task = place.task()
    assert replace(task, model="other").signature == task.signature
    assert replace(task, source_sha256="b" * 64).signature != task.signature


def test_more_pictures_are_taken_of_a_model_whose_pictures_are_small() -> None:
    for device in ("cpu", "cuda"):
        small, large, unknown = (counts_on(device, side).pictures for side in (256, 1024, None))
        assert small > large == unknown
    assert counts_on("cuda", 256) == BEST
    assert counts_on("cuda", 1024).pictures > counts_on("cpu", 1024).pictures
    assert counts_on("xpu", 256) == counts_on("cpu", 256)
