"""Send this clone to a Ray cluster and run one tick of a manifest there: `make submit`.

What goes is what git tracks below `SENT`, and the manifest; never what looks private, tracked or not. It is listed
before a byte leaves: folders with their files and bytes, every file with --dry-run, which sends nothing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

SENT = ("codec", "kernels", "pipeline", "src", "manifests", "pyproject.toml", "constraints.txt", "LICENSE")
"""What a job runs. Tests and pages stay here."""

PRIVATE = (
    *(
        ".*",
        "*.key",
        "*.key.pub",
        "*.pem",
        "*.p12",
        "*.pfx",
        "id_*",
        "*credential*",
        "*secret*",
        "*token*",
        "auth.json",
    ),
    *("kubeconfig", "environment", "service-account*.json", "pulled", "runs", "blobs", "store"),
)
"""Names that never go: hidden ones (.git, .venv, .birkhoff, .env), keys, stores, pulled artifacts."""

_NEEDLESS = ("manifests/*.png",)


def chosen(root: Path) -> list[PurePosixPath]:
    """The files of a clone that go, relative to it, sorted. Raises SystemExit where git does not say."""
    asked = ["git", "-C", str(root), "ls-files", "-z", "--", *SENT]
    ended = subprocess.run(asked, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"submit: {root} is no clone, so nothing says what belongs to it: {ended.stderr.strip()}")
    tracked = [PurePosixPath(name) for name in ended.stdout.split("\0") if name]
    there = [path for path in tracked if (root / path).exists() and not is_private(root, path)]
    return sorted(path for path in there if not any(fnmatch(str(path), one) for one in _NEEDLESS))


def is_private(root: Path, path: PurePosixPath) -> bool:
    """Whether a part of its name says so, or a link that leads out of the clone."""
    if any(fnmatch(part.lower(), one) for part in path.parts for one in PRIVATE):
        # Code about tokens and secrets is no secret: what is imported or shown has these endings.
        return path.suffix not in (".py", ".pyi", ".md") or any(part.startswith(".") for part in path.parts)
    return not (root / path).resolve().is_relative_to(root.resolve())


def listing(root: Path, paths: list[PurePosixPath], *, every: bool) -> list[str]:
    """What goes, in lines: each file, or each folder with its number of files and bytes."""
    sizes = {path: (root / path).stat().st_size if (root / path).is_file() else 0 for path in paths}
    if every:
        lines = [f"  {path} ({size} bytes)" for path, size in sizes.items()]
    else:
        folders, numbers = Counter[str](), Counter[str]()
        for path, size in sizes.items():
            folder = "/".join(path.parts[:-1][:2]) or "."
            folders[folder] += size
            numbers[folder] += 1
        lines = [f"  {folder}: {numbers[folder]} files, {size} bytes" for folder, size in sorted(folders.items())]
    return [f"submit: {len(paths)} files, {sum(sizes.values())} bytes of {root} go to the cluster:", *lines]


def main(arguments: list[str]) -> int:
    """Exit code of the job, or 0 of a dry run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, help="the dashboard of a Ray cluster: http://HEAD:8265")
    parser.add_argument("--dry-run", action="store_true", help="list every file, and send nothing")
    parser.add_argument("manifest", help="in this clone, or a path that the cluster sees")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options of `birkhoff compress`")
    given = parser.parse_args(arguments)
    root = Path(__file__).parents[2]
    paths = chosen(root)
    manifest = Path(given.manifest)
    if manifest.resolve().is_relative_to(root.resolve()):
        manifest = manifest.resolve().relative_to(root.resolve())
        if PurePosixPath(manifest) not in paths:  # named, so meant, though git does not track it
            paths = sorted([*paths, PurePosixPath(manifest)])
    print("\n".join(listing(root, paths, every=given.dry_run)), flush=True)
    if given.dry_run:
        return 0
    with tempfile.TemporaryDirectory(prefix="birkhoff-submit-") as name:
        for path in paths:
            (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, Path(name) / path, follow_symlinks=False)
        command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", given.address]
        command += ["--working-dir", name, "--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": "src"}}), "--"]
        command += ["python", "-m", "birkhoff", "compress", str(manifest), "--address", "auto", "--scheduled"]
        return subprocess.run([*command, *given.rest]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
