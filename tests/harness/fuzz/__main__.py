"""`python -m tests.harness.fuzz TARGET [--seconds N]`: coverage-guided fuzzing of one parser; `list` names the targets.

With `--record` the run's figures go to the page of results (`record.py`); with `--log FILE --commit HASH` beside it
those of a run elsewhere, FILE being what it printed. The fuzzer itself comes with `pip install -c constraints.txt -e
'.[fuzz]'`, which `make fuzz` sees to.

A target X is a module `target_X` beside this file with

    INSTRUMENT: tuple[str, ...]     packages whose coverage guides the search, beside birkhoff
    TOKENS: tuple[bytes, ...]       words of the language, for libFuzzer's dictionary
    seeds() -> Iterator[bytes]      small valid inputs
    check(data: bytes) -> None      the property; any exception is a finding

Inputs that reach new code go to .birkhoff/fuzz/X/corpus, findings to .birkhoff/fuzz/X; `--merge` brings the smallest
inputs that reach the same code into tests/harness/fuzz/corpus/X, which `make test` replays (`test_replay.py`).
"""

import argparse
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
WORK = Path(".birkhoff/fuzz")
RSS_LIMIT_MIB = 1024
"""Of the whole process, torch included: more is a finding."""
PART_INPUTS = 60_000
"""A longer run is several processes, one after the other on the same corpus: atheris 3.0 keeps every array that a
comparison makes, 6 kB an input of `tensor`, and would come to the limit of memory by itself."""
LEAST_SECONDS = 5
"""What is left of a run is not worth another process, which takes longer to start."""
INPUT_SECONDS = 20
"""Longer for one input is a hang, and a finding."""


def targets() -> list[str]:
    """Names of the targets there are."""
    return sorted(path.stem.removeprefix("target_") for path in HERE.glob("target_*.py"))


def load(target: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(f"tests.harness.fuzz.target_{target}")


def flags(target: str, module: ModuleType, options: argparse.Namespace) -> list[str]:
    """libFuzzer's command line; the first corpus folder is where it writes."""
    work, kept = WORK / target, HERE / "corpus" / target
    found, seeds = work / "corpus", work / "seeds"
    for folder in (found, seeds, kept):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(module.seeds()):
        (seeds / f"{number:03}").write_bytes(seed)
    words = ("".join(f"\\x{byte:02x}" for byte in token) for token in module.TOKENS)
    (work / "dictionary").write_text("".join(f'"{word}"\n' for word in words))
    common = [f"-rss_limit_mb={RSS_LIMIT_MIB}", f"-timeout={INPUT_SECONDS}", f"-artifact_prefix={work}/"]
    if options.merge:
        return [*common, "-merge=1", str(kept), str(found), str(seeds)]
    limits = [f"-max_total_time={options.seconds}", f"-max_len={options.max_len}", f"-dict={work / 'dictionary'}"]
    limits += [f"-runs={options.inputs}"] if options.inputs else []
    return [*common, *limits, "-print_final_stats=1", str(found), str(kept), str(seeds)]


def keeping(check: Callable[[bytes], None], folder: Path) -> Callable[[bytes], None]:
    """`check`, but a finding's input is kept at once: after long runs libFuzzer did not always come to writing it."""

    def checked(data: bytes) -> None:
        try:
            check(data)
        except BaseException:
            (folder / f"finding-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    return checked


def in_parts(options: argparse.Namespace, inner: Sequence[str]) -> tuple[int, list[str], float]:
    """Fuzz in processes of at most `PART_INPUTS`; the exit code of the last, the words of each, and the seconds."""
    from tests.harness.fuzz import record  # it imports ours, which a process that fuzzes must not have done

    code, texts, seconds = 0, list[str](), 0.0
    while not code and (left := round(options.seconds - seconds)) >= min(LEAST_SECONDS, options.seconds):
        limits = [f"--seconds={left}", f"--max-len={options.max_len}", f"--inputs={PART_INPUTS}"]
        code, text, took = record.run([sys.executable, "-m", "tests.harness.fuzz", options.target, *limits, *inner])
        texts.append(text)
        seconds += took
    return code, texts, seconds


def recorded(options: argparse.Namespace, inner: Sequence[str]) -> int:
    """Fuzz in processes of their own, or take the words of one that ended, and enter the figures."""
    from tests.harness.fuzz import record

    target, code, seconds = options.target, 0, options.seconds
    if options.log is None:
        code, texts, seconds = in_parts(options, inner)
    else:
        texts = [options.log.read_text()]
    inputs = len(list((HERE / "corpus" / target).iterdir())) + sum(1 for _ in load(target).seeds())
    try:
        one = record.record(texts, seconds=seconds, code=code, inputs=inputs, commit=options.commit)
    except ValueError as error:
        print(f"{target}: nothing recorded: {error}", file=sys.stderr)
        return code or 1
    print(record.save(options.out, target, one))
    return code


def main(arguments: Sequence[str]) -> int:
    """Fuzz the target named first; ends by the process's exit, which is not 0 after a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*targets(), "list"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--inputs", type=int, default=0, help="end after so many, in this process")
    parser.add_argument("--max-len", type=int, default=4096, help="bytes of an input")
    parser.add_argument("--merge", action="store_true", help="refresh the committed corpus instead")
    parser.add_argument("--record", action="store_true", help="put the run into the table of results")
    parser.add_argument("--log", type=Path, metavar="FILE", help="with --record: a run that ended, of --seconds")
    parser.add_argument("--commit", metavar="HASH", help="with --log: what it ran at")
    parser.add_argument("--out", type=Path, default=HERE.parent / "benchmarks" / "results", metavar="DIR")
    options, inner = parser.parse_known_args(arguments)  # to merge, libFuzzer runs this command with flags of its own
    if options.target == "list":
        print("\n".join(targets()))
        return 0
    if options.record:
        return recorded(options, inner)
    if not options.inputs and not options.merge:
        return in_parts(options, inner)[0]
    try:
        import atheris
    except ModuleNotFoundError:
        print("no atheris here; pip install -c constraints.txt -e '.[fuzz]', or use make fuzz", file=sys.stderr)
        return 1

    # Only what is imported inside is instrumented, so nothing of ours may be imported before.
    with atheris.instrument_imports(include=["birkhoff", *_instrumented(options.target)]):
        module = load(options.target)
    checked = keeping(module.check, WORK / options.target)
    command = f"{sys.executable} -m tests.harness.fuzz {options.target} --merge" if options.merge else sys.argv[0]
    atheris.Setup([command, *flags(options.target, module, options), *inner], checked)
    atheris.Fuzz()
    return 0


def _instrumented(target: str) -> tuple[str, ...]:
    """INSTRUMENT of a target, read without importing what the target imports."""
    import ast

    for node in ast.parse((HERE / f"target_{target}.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "INSTRUMENT":
            return tuple(ast.literal_eval(node.value))
    return ()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
