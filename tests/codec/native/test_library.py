"""The native library is there where a compiler was, and what is missing is said."""

import logging
import os
import shutil
import subprocess
import sys

import pytest

from birkhoff.codec.native import library

HASH = """
import hashlib, torch
from dataclasses import replace
from birkhoff.codec.container import serialise
from birkhoff.codec.difference.encode import Base, encode
from birkhoff.codec.native import library
from birkhoff.codec.profiles import Decision
from birkhoff.codec.tensor import decode_tensor, encode_tensor
generator = torch.Generator().manual_seed(0)
w = torch.randn(150, 130, generator=generator) * torch.randn(150, 1, generator=generator).exp()
made = [encode_tensor(str(p), w, Decision(codec="lattice", target_db=p, path=p > 20)).tensor for p in (15.0, 30.0)]
near = w + 0.02 * torch.randn(150, 130, generator=generator)
near[3, 5] += 40.0
made += [encode(c.name, near, Decision(codec="lattice", target_db=25.0), Base(container="ab" * 32, tensor=c)).tensor
         for c in made]
made.append(encode_tensor("bias", w[0], Decision(codec="planes")).tensor)
back = b"".join(decode_tensor(coded).numpy().tobytes() for coded in made)
made = [replace(coded, name=str(number)) for number, coded in enumerate(made)]
assert any(coded.codec == "difference" for coded in made)
print(library.native() is not None, hashlib.sha256(serialise(made) + back).hexdigest())
"""


def run(**environment: str) -> tuple[str, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", HASH], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    used, digest = done.stdout.split()
    return used, digest, done.stderr


def test_the_references_make_the_same_bytes_and_say_that_they_run() -> None:
    used, digest, _ = run()
    without, same, said = run(BIRKHOFF_NATIVE="0")
    assert without == "False"
    assert same == digest
    assert "native codec library not in use (BIRKHOFF_NATIVE=0)" in said
    assert used == str(library.describe()[0])


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here: nothing is built")
def test_it_is_built_where_there_is_a_compiler() -> None:
    assert library.describe()[0], library.describe()[1]


def test_a_library_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "VERSION", 10_000)
    for cached in (library.native, library._load):
        cached.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="birkhoff.native"):
            assert library.native() is library.native() is None
        assert len(caplog.records) == 1  # once
        assert "run make setup" in caplog.text or "not built" in caplog.text
        assert not library.describe()[0]
    finally:
        monkeypatch.undo()
        for cached in (library.native, library._load):
            cached.cache_clear()
