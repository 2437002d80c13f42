"""What a process's first kernel needs: Triton's digest, kept and made anew where a file changed, and imports."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from birkhoff.kernels.runtime import triton_key  # noqa: E402

KEY = triton.__version__ + "-".join(["0" * 64, "ab" * 32])


def test_the_digest_is_made_once_for_files_that_stay_as_they_are(tmp_path: Path) -> None:
    made: list[int] = []

    def original() -> str:
        made.append(1)
        return KEY

    folder = tmp_path / "cache"
    assert triton_key.kept_key(original, folder) == triton_key.kept_key(original, folder) == KEY
    assert len(made) == 1
    (file,) = folder.iterdir()
    file.write_text("no digest")
    assert triton_key.kept_key(original, folder) == KEY
    assert len(made) == 2
    assert file.read_text() == KEY


def test_a_cache_that_cannot_be_written_serves_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert triton_key.kept_key(lambda: KEY, tmp_path / "file" / "cache") == KEY


def test_a_digest_of_another_form_is_not_kept(tmp_path: Path) -> None:
    assert triton_key.kept_key(lambda: "something else", tmp_path) == "something else"
    assert not list(tmp_path.iterdir())


def test_the_state_of_its_files_changes_with_each(tmp_path: Path) -> None:
    for name in ("runtime/cache.py", "compiler/compiler.py", "_C/libtriton.so", "language/core.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    before = triton_key._state(tmp_path)
    assert triton_key._state(tmp_path) == before
    (tmp_path / "language" / "core.py").write_text("xy")
    assert triton_key._state(tmp_path) != before


def test_triton_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    importlib.import_module("triton.compiler.compiler")
    holders = [
        module for name, module in sys.modules.items() if name.startswith("triton.") and hasattr(module, "triton_key")
    ]
    assert holders
    for holder in holders:
        monkeypatch.setattr(holder, "triton_key", lambda: KEY)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    triton_key.keep_triton_key.cache_clear()
    triton_key.keep_triton_key()
    assert [holder.triton_key() for holder in holders] == [KEY] * len(holders)
    assert [file.read_text() for file in tmp_path.iterdir()] == [KEY]
    triton_key.keep_triton_key.cache_clear()


@pytest.mark.parametrize("gpu", [True, False])
def test_what_a_first_kernel_needs_is_imported_where_there_is_a_gpu(gpu: bool) -> None:
    program = f"""
        import sys
        from birkhoff.kernels.runtime import device
        device.gpu_in_sight = lambda: {gpu}
        import birkhoff.kernels.runtime.first_kernel
        print("triton.experimental.gluon" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(gpu)
