"""Manifests: any bytes are either a manifest or refused in one line of bounded length."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from birkhoff.pipeline.errors import ManifestError
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.store.keys import NAME_PATTERN

INSTRUMENT = ("yaml",)
TOKENS = (
    *(b"store: ", b"profile: ", b"models:\n", b"- name: ", b"  source: ", b"urls: ", b"sha256: ", b"allow_http: true"),
    *(b"shard_mib: ", b"in_flight_mib: ", b"keep: ", b"&a ", b"*a", b"<<: ", b"!!python/object:", b"!!binary ", b"? "),
    *(
        b"s3://",
        b"https://",
        b"file:///",
        b"../",
        b"balanced",
        b"paper",
        b"[",
        b"]",
        b"{",
        b"}",
        b"|\n",
        b">\n",
        b"---\n",
    ),
    *(
        b"0x7fffffffffffffff",
        b"1_000",
        b"1e308",
        b".nan",
        b"2001-12-14t21:59:43.10-05:00",
        b"~",
        b"\xef\xbb\xbf",
        b"%YAML 1.1\n",
    ),
)

_FILE = Path(tempfile.mkdtemp(prefix="fuzz-manifest-")) / "m.yaml"


def seeds() -> Iterator[bytes]:
    """The forms that the manifest's page shows."""
    yield b"models:\n- name: a\n  source: a.pth\n"
    yield b"store: s3://b/p\nprofile: fine\nshard_mib: 8\nin_flight_mib: 64\nkeep: 2\nmodels: [{name: a, source: x}]\n"
    yield b"models:\n- name: a\n  source: {urls: [https://h/a.pth, s3://m/a.pth], sha256: " + b"0" * 64 + b"}\n"
    yield b"models:\n- name: a\n  profile: small\n  source: [a.pth, {path: b.pth, prefix: p.}]\n"


def check(data: bytes) -> None:
    """Load the bytes as a manifest."""
    _FILE.write_bytes(data)
    try:
        manifest = load_manifest(_FILE)
    except ManifestError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 2000 + len(str(_FILE)), len(text)
        return
    assert manifest.models
    assert all(NAME_PATTERN.fullmatch(entry.name) for entry in manifest.models)
