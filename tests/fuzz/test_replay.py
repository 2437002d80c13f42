"""Every input of the fuzzers' corpus, findings of the past among them, still passes; no fuzzer is needed for that."""

import itertools
from pathlib import Path

import pytest

from tests.harness.fuzz.__main__ import HERE, load, targets


def _inputs(target: str) -> list[bytes]:
    kept = sorted((HERE / "corpus" / target).glob("*"))
    return [*load(target).seeds(), *map(Path.read_bytes, kept)]


@pytest.mark.parametrize("target", targets())
def test_the_corpus_passes(target: str) -> None:
    check, inputs = load(target).check, _inputs(target)
    assert inputs
    for data in inputs:
        check(data)


@pytest.mark.parametrize("target", ["checkpoint", "documents", "manifest"])
def test_no_damage_to_a_seed_is_a_finding(target: str) -> None:
    """Cuts and changed bytes at even distances: what can be tried in a second without a fuzzer."""
    module = load(target)
    for seed in itertools.islice(module.seeds(), 8):
        for place in range(0, len(seed), max(1, len(seed) // 12)):
            module.check(seed[:place])
            module.check(seed[:place] + bytes([seed[place] ^ 0x5B]) + seed[place + 1 :])
