"""Documents read from a store or a pulled folder: either what they should be, or one IntegrityError in one line.

The first byte picks the kind; the rest is the stored object. What parses must mean the same when written again.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.artifact.pull import MANIFEST_FILE, VERSION_FILE
from birkhoff.pipeline.artifact.readers import PulledArtifact, inspect
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.registry.aliases import aliases, trail
from birkhoff.pipeline.registry.documents import (
    AliasRecord,
    AliasState,
    GivenNames,
    HessianRecord,
    NameRecord,
    ShardRecord,
    SourceRecord,
    StatisticsRecord,
    VersionManifest,
    VersionSignatures,
    alias_key,
    name_key,
    sha256,
    shard_key,
    statistics_key,
    version_key,
)
from birkhoff.pipeline.registry.history import history_rows
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.shard.run import find_record
from birkhoff.pipeline.statistics.stored import find_statistics
from birkhoff.pipeline.store.open import open_store

INSTRUMENT = ("json", "pydantic")
TOKENS = (
    *(b'"version"', b'"digest"', b'"gen"', b'"moved"', b'"back"', b'"protected"', b'"publisher"', b'"previous"'),
    *(b'"created"', b'"retired"', b'"single_publisher"', b'"key"', b'"blob"', b'"bytes"', b'"source_bytes"'),
    *(b'"tensors"', b'"sqnr_db"', b'"probe_db"', b'"probe_error"', b'"model"', b'"source"', b'"file"', b'"sha256"'),
    *(b'"format"', b'"nesting"', b'"profile"', b'"recipe"', b'"code"', b'"shards"', b"NaN", b"Infinity", b"-1"),
    *(b"1e999", b"null", b"true", b"[[", b"{}", b'"v1"', b'"../"', b'"\\ud800"', b'"\\u0000"', b"18446744073709551616"),
)

_HEX = "ab" * 32
_ROOT = Path(tempfile.mkdtemp(prefix="fuzz-documents-"))
_STORE = open_store(f"file://{_ROOT / 'store'}")
_FOLDER = _ROOT / "pulled"
_FOLDER.mkdir()

_SHARD = ShardRecord(
    key=_HEX, blob=_HEX, bytes=3, source_bytes=9, tensors=1, sqnr_db=(30.0,), probe_db=(30.0,), probe_error=0.0
)
_STATISTICS = StatisticsRecord(
    key=_HEX,
    adapter="sam",
    pictures=1,
    probes=1,
    device="cpu",
    sensitivities={"w": 1.0},
    rms={"w": 0.1},
    hessians={"w": HessianRecord(blob=_HEX, bytes=4, columns=1, rows=1)},
)
_SOURCE = SourceRecord(file="a.pth", sha256=_HEX, bytes=9, format="torch-zip", nesting=("model",))
_VERSION = VersionManifest(
    model="m", source=_SOURCE, profile="fine", recipe={"target_db": 36.0, "path": 1}, code="0.1.0", shards=(_SHARD,)
)
_STATE = AliasState(version="v1", digest=_VERSION.digest, gen=1, moved="2026-01-01T00:00:00+00:00")
_ALIAS = AliasRecord(
    **{**_STATE.model_dump(), "version": "v2", "gen": 2, "back": True, "protected": True},
    publisher="p",
    previous=(_STATE,),
)
_NAME = NameRecord(digest=_VERSION.digest, created="2026-01-01T00:00:00+00:00", publisher="p")


def _alias(body: bytes) -> None:
    _STORE.put(alias_key("m", "latest"), body)
    for record in aliases(_STORE, "m").values():
        trail(record)
    resolve(_STORE, "m@latest")


def _name(body: bytes) -> None:
    _STORE.put(name_key("m", "v1"), body)
    history_rows(_STORE, "m")


def _shard(body: bytes) -> None:
    _STORE.put(shard_key(_HEX), body)
    find_record(_STORE, _HEX)


def _statistics(body: bytes) -> None:
    _STORE.put(statistics_key(_HEX), body)
    find_statistics(_STORE, _HEX)


def _version(body: bytes) -> None:
    digest = sha256(body)
    _STORE.put(version_key("m", digest), body)
    try:
        resolve(_STORE, f"m@{digest}")
    finally:
        _STORE.delete(version_key("m", digest))


def _pulled(body: bytes) -> None:
    (_FOLDER / MANIFEST_FILE).write_bytes(body)
    (_FOLDER / VERSION_FILE).write_bytes(b'{"digest":"%s"}' % sha256(body).encode())
    list(inspect(PulledArtifact(_FOLDER)))


def _pointer(body: bytes) -> None:
    (_FOLDER / MANIFEST_FILE).write_bytes(_VERSION.to_bytes())
    (_FOLDER / VERSION_FILE).write_bytes(body)
    list(inspect(PulledArtifact(_FOLDER)))


def _again(body: bytes) -> None:
    for kind in (
        VersionManifest,
        VersionSignatures,
        AliasRecord,
        NameRecord,
        GivenNames,
        ShardRecord,
        StatisticsRecord,
    ):
        try:
            written = read_document(kind, "key", body).to_bytes()
        except IntegrityError:
            continue
        assert read_document(kind, "key", written).to_bytes() == written


_KINDS: tuple[Callable[[bytes], None], ...] = (_alias, _name, _shard, _version, _pulled, _pointer, _again, _statistics)


def seeds() -> Iterator[bytes]:
    """A valid document of each kind."""
    for kind, document in enumerate((_ALIAS, _NAME, _SHARD, _VERSION, _VERSION)):
        yield bytes([kind]) + document.to_bytes()
    yield b'\x05{"model": "m", "version": "v1", "digest": "%s"}' % _VERSION.digest.encode()
    yield b"\x06" + _VERSION.to_bytes()
    yield b"\x06" + _STATISTICS.to_bytes()
    yield b"\x07" + _STATISTICS.to_bytes()
    yield b"\x06" + b'{"key":"%s","names":[{"version":"v1","signed":"x","signature":"AA=="}]}' % _HEX.encode()


def check(data: bytes) -> None:
    """Put the bytes where such a document lies and read it as the commands do."""
    if not data:
        return
    try:
        _KINDS[data[0] % len(_KINDS)](data[1:])
    except BirkhoffError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 2000 + 2 * len(str(_ROOT)), len(text)
