"""What lies in a store, and under which key.

    blobs/sha256/ab/<hex>                   a shard (a codec container) or a model's small file, named by its digest
    shards/ab/<key>.json                    which blob a shard key has led to, and what its validation measured
    models/M/versions/<digest>/manifest.json   a version: inputs, recipe, shards; named by the digest of this document
    models/M/versions/<digest>/signatures/<key>.json   under which names a key has signed it (see signing.py)
    models/M/names/v<N>.json                human names, created once, never reused; `retired` is all that may change
    models/M/aliases/<alias>.json           movable pointers with their history, changed by compare-and-swap
    runs/<id>/report.json, runs/<id>/report.html   what became of a run (see report.py); ids sort by time
    runs/open/<id>.json, runs/sweep/<id>.json   leases of running publishers and of garbage collection (see leases.py)

Each object refers only to objects that were durable before it was written, so a reader never meets a dangling one,
whenever a writer dies.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from statistics import median
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from birkhoff.codec.profiles import Override
from birkhoff.pipeline.errors import IntegrityError
from birkhoff.pipeline.store import Store

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, Field(pattern=r"^v[1-9][0-9]{0,8}$")]

FLOOR_DB = -99.0
"""Recorded for a source of zeros that came back as something else: JSON has no minus infinity."""

MAX_DOCUMENT_BYTES = 16 << 20
"""More than any document has (a manifest of 10,000 shards: 6 MB), and no burden for who reads it."""


class Document(BaseModel):
    """A stored document: unknown fields are refused, nothing changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_bytes(self) -> bytes:
        """Compact JSON in field order: equal documents are equal bytes."""
        data = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


class ShardRecord(Document):
    """A shard that was encoded, validated and uploaded."""

    key: Digest
    """H(format, recipe, names, dtypes, shapes and bytes of its source tensors)."""
    blob: Digest
    """sha256 of the container."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of the container."""
    source_bytes: Annotated[int, Field(ge=0)]
    """Bytes of its tensors before coding."""
    tensors: Annotated[int, Field(ge=1)]
    sqnr_db: tuple[float, ...]
    """SQNR of every coded tensor, dB, measured on the container's bytes, in its order."""
    probe_db: tuple[float, ...]
    """Output SQNR of HyperLinear on random inputs against the source weight, dB, of every coded matrix."""
    probe_error: float
    """Greatest relative error of HyperLinear's output against `F.linear` with the decoded weight."""
    fallbacks: dict[str, str] | None = None
    """Tensors that are lossless for what their weights are, with the `reason` stored with each."""


class SourceRecord(Document):
    """Where a version came from."""

    file: str
    """Name of the source file, without its folder."""
    sha256: Digest
    bytes: int
    format: str
    nesting: tuple[str, ...] = ()
    """Keys that led to the state dict in the source: `("model",)`."""


class BudgetRecord(Document):
    """A budget, one of both: the least ratio of source bytes to the version's `stored_bytes`, or the most of them."""

    target_ratio: float | None = None
    max_bytes: int | None = None

    @property
    def label(self) -> str:
        """What stands where a profile's name would: `ratio 7`, `64.0MiB`."""
        if self.target_ratio is not None:
            return f"ratio {self.target_ratio:g}"
        return ByteSize(self.max_bytes or 0).human_readable()

    def limit(self, source_bytes: int) -> int:
        """The most bytes that a version of so large a source may take."""
        if self.target_ratio is not None:
            return math.floor(source_bytes / self.target_ratio)
        return self.max_bytes or 0


FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.(json|txt|md|ya?ml)")
MAX_FILE_NAME = 100
MAX_FILES = 16
MAX_FILE_BYTES = 8 << 20
"""More than any tokenizer of a published segmentation model has, which is the largest of such files."""


class FileRecord(Document):
    """A small text file that goes with the weights, such as transformers' `config.json`; stored as a blob."""

    name: Annotated[str, Field(max_length=MAX_FILE_NAME)]
    blob: Digest
    """sha256 of its bytes."""
    bytes: Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not FILE_NAME.fullmatch(name):
            raise ValueError(
                "expected letters, digits, '.', '_' or '-', and .json, .txt, .md, .yaml or .yml at its end"
            )
        return name


BlobRecord = ShardRecord | FileRecord
"""What names a blob, and says how large it is."""


class VersionManifest(Document):
    """One immutable version of a model. Its digest is the sha256 of `to_bytes()`."""

    version: Literal[1] = 1
    """Version of this document's form."""
    model: str
    source: SourceRecord
    profile: str
    recipe: dict[str, str | float | int | None]
    """The profile resolved: with `overrides` everything that decided the coded bytes."""
    budget: BudgetRecord | None = None
    """Where the recipe's target comes from, if not from the profile."""
    overrides: dict[str, Override] | None = None
    """What single tensors got over the recipe: a target in dB, or `lossless`."""
    code: str
    """Version of birkhoff-compression that made it."""
    shards: Annotated[tuple[ShardRecord, ...], Field(min_length=1)]
    """In the order of the checkpoint."""
    files: Annotated[tuple[FileRecord, ...] | None, Field(min_length=1, max_length=MAX_FILES)] = None
    """What goes with the weights, by name."""

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: tuple[FileRecord, ...] | None) -> tuple[FileRecord, ...] | None:
        names = [file.name.lower() for file in files or ()]  # some file systems do not tell A from a
        if len(set(names)) < len(names):
            raise ValueError("two files have one name")
        return files

    @property
    def stored(self) -> tuple[BlobRecord, ...]:
        """The record of every blob that the version refers to, shards first."""
        return (*self.shards, *(self.files or ()))

    @property
    def stored_bytes(self) -> int:
        """Every byte that the digest stands for: this document, blobs, shard records.

        Names, aliases and signatures, some hundred bytes each, point at a version and change while it does not.
        """
        records = sum(len(shard.to_bytes()) for shard in self.shards)
        return len(self.to_bytes()) + sum(record.bytes for record in self.stored) + records

    @property
    def ratio(self) -> float:
        """Bytes of the source over `stored_bytes`."""
        return round(self.source.bytes / self.stored_bytes, 3)

    def figures(self) -> dict[str, int | float | None]:
        """Its sizes in bytes, their ratio, and its SQNR in dB, under the keys of every `--json`."""
        least, median = sqnr_summary(self.shards)
        return {
            "source_bytes": self.source.bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "sqnr_db_min": least,
            "sqnr_db_median": median,
        }

    @property
    def digest(self) -> str:
        """sha256 of the document, by which the version is known."""
        return sha256(self.to_bytes())


def sqnr_summary(shards: Iterable[ShardRecord]) -> tuple[float | None, float | None]:
    """(least, median) SQNR of the coded tensors of shards, dB; None where there are none."""
    values = [value for shard in shards for value in shard.sqnr_db]
    return (min(values), round(median(values), 2)) if values else (None, None)


class NameRecord(Document):
    """A human name of a version: `v3`."""

    digest: Digest
    created: str
    """UTC, ISO 8601."""
    publisher: str
    """A random name of the writer: two publishers never write equal bodies."""
    single_publisher: bool | None = None
    """Set where the store has no conditional writes, so that only one publisher at a time is safe."""
    retired: str | None = None
    """When the name was given up (UTC, ISO 8601): it resolves no more, and its number is not given again."""


class NameSignature(Document):
    """One statement of a key: this version was published under this name."""

    version: VersionName
    signed: str
    """UTC, ISO 8601."""
    signature: Annotated[str, Field(max_length=128)]
    """Ed25519, base64, of `signing.version_statement`."""


class VersionSignatures(Document):
    """What one key has said of one version."""

    key: Digest
    """sha256 of the public key's 32 bytes."""
    names: Annotated[tuple[NameSignature, ...], Field(min_length=1, max_length=64)]


class AliasSignature(Document):
    """A signature of the state of an alias."""

    key: Digest
    signature: Annotated[str, Field(max_length=128)]
    """Ed25519, base64, of `signing.alias_statement`."""


class AliasState(Document):
    """What an alias pointed at, and since when."""

    version: VersionName
    digest: Digest
    gen: Annotated[int, Field(ge=1)]
    """Counts the alias's changes; never goes back."""
    moved: str
    """UTC, ISO 8601."""
    back: bool | None = None
    """Set where a rollback led here."""
    protected: bool | None = None
    """Set where the alias moves by force only."""


class AliasRecord(AliasState):
    """A movable pointer at a named version, and the states it was in before."""

    publisher: str
    """A random name of the writer: two writers never write equal bodies."""
    signature: AliasSignature | None = None
    """Of this state, by who moved it, where it was signed."""
    previous: tuple[AliasState, ...] = ()
    """Oldest first, the last `aliases.KEPT_STATES` of them."""


def sha256(data: bytes | memoryview) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def blob_key(digest: str) -> str:
    """Key of a blob."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def shard_key(key: str) -> str:
    """Key of a shard's record."""
    return f"shards/{key[:2]}/{key}.json"


def version_key(model: str, digest: str) -> str:
    """Key of a version's manifest."""
    return f"models/{model}/versions/{digest}/manifest.json"


def signatures_key(model: str, digest: str, key: str) -> str:
    """Key of what one key has signed of a version."""
    return f"models/{model}/versions/{digest}/signatures/{key}.json"


def name_key(model: str, name: str) -> str:
    """Key of a human name."""
    return f"models/{model}/names/{name}.json"


def alias_key(model: str, alias: str) -> str:
    """Key of an alias."""
    return f"models/{model}/aliases/{alias}.json"


def report_key(run: str, file: str) -> str:
    """Key of a file of a run's report."""
    return f"runs/{run}/{file}"


def utc_now() -> str:
    """The time as records hold it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


D = TypeVar("D", bound=Document)


def read_document(kind: type[D], key: str, body: bytes) -> D:
    """Parse a stored document.

    Raises:
        IntegrityError: the object is not such a document.
    """
    try:
        return kind.model_validate(json.loads(body, object_pairs_hook=_unique))
    except (ValidationError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{key}: not a {kind.__name__}: {reason}; the stored object is damaged") from None


def fetch_document(store: Store, kind: type[D], key: str) -> D:
    """Read and parse a stored document, no more of it than one can have.

    Raises:
        ObjectNotFoundError, StoreError: there is none, or the store failed.
        IntegrityError: the object is not such a document, or larger than any.
    """
    return parse_bounded(kind, key, store.get(key, length=MAX_DOCUMENT_BYTES + 1))


def parse_bounded(kind: type[D], key: str, body: bytes) -> D:
    """`read_document`, unless the body is larger than any document. Raises IntegrityError."""
    check_size(key, body)
    return read_document(kind, key, body)


def check_size(key: str, body: bytes) -> None:
    """Refuse the body of a document of which more than `MAX_DOCUMENT_BYTES` were read. Raises IntegrityError."""
    if len(body) > MAX_DOCUMENT_BYTES:
        raise IntegrityError(f"{key}: larger than {MAX_DOCUMENT_BYTES} bytes: not a document of ours")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
