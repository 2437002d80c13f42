"""Entries of a container's metadata: typed parameters and claims, written and read in one place."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from birkhoff.codec.container import (
    Claims,
    CodedTensor,
    DifferenceParams,
    LatticeParams,
    PaperParams,
    Params,
    parse,
    parse_entry,
    serialise,
)
from birkhoff.codec.errors import FormatError
from birkhoff.codec.profiles import PROFILES
from birkhoff.codec.tensor import decode_tensor
from tests.codec.by_profile import encode_tensor

FIXTURE = Path(__file__).parent / "fixtures" / "v1.safetensors"
MEASURED = Claims(sqnr_db=30.0421, max_abs=0.000123456, mean_abs=2.5)
LATTICE_PARAMS = LatticeParams(path=1, columns=3, step=0.03125, escapes=7)
PAPER_PARAMS = PaperParams(per_row=False, U=1600, K=2, bits=12, centre=(0.5, -0.25), far=(1.0, 0.0))

DIFFERENCE_PARAMS = DifferenceParams(
    path=0, columns=3, step=0.03125, escapes=0, base="0123456789abcdef" * 4, times=2, stride=3
)

WRITTEN: dict[str, tuple[Params, Claims, str]] = {
    "lattice": (LATTICE_PARAMS, MEASURED, "path=1 columns=3 step=3d000000 escapes=7"),
    "difference": (
        DIFFERENCE_PARAMS,
        MEASURED,
        f"path=0 columns=3 step=3d000000 escapes=0 base={'0123456789abcdef' * 4} times=2 stride=3",
    ),
    "paper": (PAPER_PARAMS, MEASURED, "per_row=0 U=1600 K=2 bits=12 centre=3f000000be800000 far=3f80000000000000"),
    "planes": (None, Claims(reason="constant"), "reason=constant"),
    "raw": (None, Claims(), ""),
}


def tensor(codec: str, params: Params, claims: Claims) -> CodedTensor:
    return CodedTensor(
        name="w", codec=codec, dtype="F32", shape=(2, 3), params=params, claims=claims, parts=(b"ab", b"c")
    )


@pytest.mark.parametrize("codec", WRITTEN)
def test_an_entry_is_written_as_the_page_says_and_read_back(codec: str) -> None:
    params, claims, text = WRITTEN[codec]
    measured = "sqnr_db=30.042 max_abs=0.0001235 mean_abs=2.5" if claims is MEASURED else ""
    words = f"codec={codec} dtype=F32 shape=2,3 parts=2,1 {text} {measured}".split()
    made = tensor(codec, params, claims)
    assert made.entry().split(" ") == words
    entry, sizes = parse_entry("w", made.entry())
    assert (entry.codec, entry.dtype, entry.shape, sizes) == (codec, "F32", (2, 3), (2, 1))
    assert (entry.params, entry.claims) == (params, claims.rounded())
    turned = " ".join(reversed([*words, "unknown=1"]))
    assert parse_entry("w", turned) == (entry, sizes)  # any order, unknown keys ignored


def test_what_was_encoded_is_what_is_read_back() -> None:
    """Also before it went through bytes: nothing is more precise in memory than in the file."""
    blob = (FIXTURE.parent / "v2.safetensors").read_bytes()
    read = parse(blob)
    assert serialise(read) == blob
    assert {type(item.params) for item in read} == {LatticeParams, PaperParams, type(None)}
    source = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)) * 0.02
    for profile in PROFILES.values():
        made = encode_tensor("w", source, profile).tensor
        assert parse(serialise([made])) == [made]


def test_a_target_of_its_own_stands_last() -> None:
    made = tensor("lattice", LATTICE_PARAMS, Claims(sqnr_db=-math.inf, max_abs=0, mean_abs=0, target_db=36))
    assert made.entry().endswith(" escapes=7 sqnr_db=-inf max_abs=0 mean_abs=0 target_db=36.000")


WRONG = {
    "path=3": "parameter path is '3', not 0, 1 or 2",
    "columns=-3": "parameter columns is '-3', not a number",
    "columns=": "parameter columns is '', not a number",
    "columns=1234567890123": "parameter columns is '1234567890123', not a number",
    "escapes=\u0663": "parameter escapes is '\u0663', not a number",
    "step=3d0000": "parameter step is '3d0000', not 1 float32 in hex",
    "step=zz": "parameter step is 'zz', not 1 float32 in hex",
    "step=7f800000": r"parameter step is \(inf,\), not finite",
    "step=bd000000": "parameter step is -0.03125, not a positive number",
    "step=00000000": "parameter step is 0.0, not a positive number",
    "codec=lettuce": "unknown codec 'lettuce'; known: lattice, difference, raw, planes, paper",
    "codec=difference": "parameter times is '', not a number",
    "codec=paper": "parameter centre is None, not 2 float32 in hex",
    "dtype=F31": "unknown element type 'F31'",
    "shape=2,x": "metadata lacks or garbles '2,x'",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_parameter_is_named(word: str) -> None:
    words = dict(token.split("=") for token in tensor("lattice", LATTICE_PARAMS, MEASURED).entry().split(" "))
    key, value = word.split("=")
    with pytest.raises(FormatError, match=WRONG[word]):
        parse_entry("w", " ".join(f"{k}={v}" for k, v in {**words, key: value}.items()))


@pytest.mark.parametrize(("word", "what"), [
    ("base=", "parameter base is '', not a sha256 in hex"),
    (f"base={'AB' * 32}", "parameter base is 'AB"),
    (f"base={'ab' * 33}", "not a sha256 in hex"),
    ("times=0", "parameters times and stride are 0 and 3; 1 to 15 and 1 to 127 are allowed"),
    ("times=16", "are 16 and 3"),
    ("stride=0", "are 2 and 0"),
    ("stride=128", "are 2 and 128"),
    ("stride=-1", "parameter stride is '-1', not a number"),
])  # fmt: skip
def test_a_wrong_parameter_of_a_difference_is_named(word: str, what: str) -> None:
    words = dict(token.split("=") for token in tensor("difference", DIFFERENCE_PARAMS, MEASURED).entry().split(" "))
    key, value = word.split("=")
    with pytest.raises(FormatError, match=what):
        parse_entry("w", " ".join(f"{k}={v}" for k, v in {**words, key: value}.items()))


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(FormatError, match="tensor 'w': parameter path is '', not 0, 1 or 2"):
        parse_entry("w", "codec=lattice dtype=F32 shape=2,3 parts=2,1 columns=3 step=3d000000 escapes=0")


def test_claims_decide_nothing() -> None:
    """What is no number reads as NaN, what is not there as None; the weights are the same."""
    blob = FIXTURE.read_bytes()
    honest = next(item for item in parse(blob) if item.claims.sqnr_db is not None)
    text = f"sqnr_db={honest.claims.sqnr_db:.3f}".encode()
    for forged in (b"sqnr_db=" + b"?" * (len(text) - 8), b"x" * 7 + b"=" + text[8:]):
        read = next(item for item in parse(blob.replace(text, forged)) if item.name == honest.name)
        assert read.claims.sqnr_db is None or math.isnan(read.claims.sqnr_db)
        assert torch.equal(decode_tensor(read), decode_tensor(honest))


@pytest.mark.parametrize("key", ["shape", "parts"])
@pytest.mark.parametrize(
    "numbers", ["1,", ",1", "1,,2", "+1", "-1", "1 ", "1.0", "\u0663", "\u00b2", "1" * 19, "1,x", "1_0", "1\n"]
)
def test_only_plain_numbers_are_a_list(key: str, numbers: str) -> None:
    given = {"shape": "2,3", "parts": "24"} | {key: numbers}
    text = f"codec=raw dtype=F32 shape={given['shape']} parts={given['parts']}"
    with pytest.raises(FormatError, match="tensor 'w': metadata"):
        parse_entry("w", text)


def test_a_long_list_of_numbers_takes_no_more_memory_than_its_text() -> None:
    """In a process of its own, whose peak nothing else has set."""
    program = """
import resource
from birkhoff.codec.container import _NUMBERS
text = "1," * (1 << 23) + "1"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert _NUMBERS.fullmatch(text) and not _NUMBERS.fullmatch(text + ",")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 64 << 20
