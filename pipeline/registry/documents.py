"""The documents in a store, and their keys.

    blobs/sha256/ab/<hex>                   a shard (a codec container) or a model's small file, named by its digest
    shards/ab/<key>.json                    the blob of a shard key, and the measurements of its validation
    statistics/ab/<key>.json                sensitivity of a model's outputs to its weights; Hessians are blobs
    models/M/versions/<digest>/manifest.json   a version: source, recipe, shards; named by the digest of this document
    models/M/versions/<digest>/signatures/<key>.json   the names under which a key has signed it (see signing.py)
    models/M/versions/<digest>/labels.json   its labels (see labels.py)
    models/M/names/v<N>.json                version names, created once, never reused, changed by compare-and-swap
    models/M/given.json                     numbers of names that are gone, so that no copy reuses one
    models/M/aliases/<alias>.json           movable pointers with their history, changed by compare-and-swap
    runs/<id>/report.json, runs/<id>/report.html   the report of a run (see report/document.py); ids sort by time
    runs/open/<id>.json, runs/sweep/<id>.json   leases of running publishers and of garbage collection (see leases.py)
    runs/condemned.json                     the keys that a collection is about to delete (see fencing.py)

Each object refers only to objects that were durable before it was written. So a reader never meets a dangling
reference, whenever a writer dies. Garbage collection spares whatever a name or an alias refers to (see PROTOCOL.md).
"""

import hashlib
import math
import re
from collections.abc import Iterable
from statistics import median
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveInt, field_validator, model_validator

from birkhoff.codec.profiles import BUDGET_FLOOR_DB, Override
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, D, Digest, Document, parse_bounded
from birkhoff.pipeline.errors import PreconditionError
from birkhoff.pipeline.registry import clock
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import DIGEST

VersionName = Annotated[str, Field(pattern=r"^v[1-9][0-9]{0,8}$")]

FLOOR_DB = -99.0
"""Recorded if a source of zeros did not decode to zeros: JSON has no minus infinity."""


class BaseBlob(Document):
    """A container of another version, to which tensors of a shard are stored as differences."""

    blob: Digest
    """sha256 of the container."""
    bytes: Annotated[int, Field(ge=0)]


class BaseRecord(Document):
    """The base of a version. The `bases` of its shards list what it needs of that version."""

    model: str
    version: VersionName | None = None
    """Its name when the version was made."""
    digest: Digest

    @property
    def label(self) -> str:
        """For messages: `sam-b@v3`."""
        return f"{self.model}@{self.version or self.digest[:12]}"


class ShardRecord(Document):
    """A shard that was encoded, validated and uploaded."""

    key: Digest
    """H(format, recipe, and names, dtypes, shapes and bytes of its source tensors)."""
    blob: Digest
    """sha256 of the container."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of the container."""
    source_bytes: Annotated[int, Field(ge=0)]
    """Bytes of its tensors before coding."""
    tensors: Annotated[int, Field(ge=1)]
    sqnr_db: tuple[float, ...]
    """SQNR in dB of every coded tensor, in the container's order, measured on the container's bytes."""
    probe_db: tuple[float, ...]
    """SQNR in dB of HyperLinear's output on random inputs, against the source weight, for every coded matrix."""
    probe_error: float
    """Greatest relative error of HyperLinear's output against `F.linear` with the decoded weight."""
    fallbacks: dict[str, str] | None = None
    """Tensors stored lossless because of their values, with the `reason` stored with each."""
    bases: Annotated[tuple[BaseBlob, ...] | None, Field(min_length=1)] = None
    """Containers needed to decode it, because its tensors are differences to theirs."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The sha256 of every blob needed to decode it, its own first."""
        return (self.blob, *(base.blob for base in self.bases or ()))


Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Finite and at least 0."""


class HessianRecord(Document):
    """The Hessian of a matrix, stored as a blob in the form of `codec.output.packing`."""

    blob: Digest
    """sha256 of its bytes."""
    bytes: Annotated[int, Field(ge=2)]
    columns: Annotated[int, Field(ge=1)]
    """Columns of the matrix as the codec holds it."""
    rows: Annotated[int, Field(ge=0)] = 0
    """Its rows; 0 if they have no Hessian of their own."""


class StatisticsRecord(Document):
    """The sensitivity of a model's outputs to its weights on synthetic pictures, by tensor name.

    It is an input of encoding. Readers do not need it and it can be made again, so it is no part of a version's blobs
    or bytes, and copies leave it out.
    """

    key: Digest
    """H(versions, counts and seed, source, and how the model was run)."""
    adapter: str | None = None
    """The member of the family that it was run as; None if the user's builder made the model."""
    pictures: Annotated[int, Field(ge=1)]
    """Number of pictures, or of batches of the user's inputs."""
    probes: Annotated[int, Field(ge=1)]
    """Per picture or batch."""
    device: str
    """Kind of device that computed it: `cpu` or `cuda`."""
    sensitivities: dict[str, Positive]
    """Mean squared relative change of the outputs, per squared unit of the weights; 0 if no output depends on the
    tensor."""
    left: dict[str, Positive] = Field(default_factory=dict)
    """Fraction of the outputs' error that remains with error feedback, for each tensor with a Hessian."""
    rms: dict[str, Positive]
    """Root mean square of the bulk of each tensor's weights."""
    hessians: dict[str, HessianRecord]


class SourceRecord(Document):
    """The source of a version."""

    file: str
    """Name of the source file, without its folder."""
    sha256: Digest
    bytes: int
    format: str
    nesting: tuple[str, ...] = ()
    """Keys that lead to the state dict in the source: `("model",)`."""
    origin: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    """Public addresses of its files, each pinned to a commit: `hf://ORG/REPO@COMMIT/FILE`."""


class BudgetRecord(Document):
    """The budget that the recipe's target was found for. One field is set, besides `floor_db`.

    In bytes: the least ratio of source bytes to `stored_bytes`, or the most `stored_bytes`. In outputs: the least mean
    agreement of masks with the original's, or the least SQNR of outputs in dB, at the smallest size that reaches it.
    """

    target_ratio: float | None = None
    max_bytes: int | None = None
    target_agreement: float | None = None
    target_output_db: float | None = None
    floor_db: float | None = None
    """The least target of a coded tensor, dB, if it differs from `BUDGET_FLOOR_DB`."""

    @property
    def least_db(self) -> float:
        """The least target of a coded tensor, dB."""
        return BUDGET_FLOOR_DB if self.floor_db is None else self.floor_db

    @property
    def by_output(self) -> bool:
        """Whether the budget is about outputs and not about bytes."""
        return self.target_agreement is not None or self.target_output_db is not None

    @property
    def label(self) -> str:
        """The budget for people, in place of a profile's name: `ratio 7`, `64.0MiB`, `agreement 0.97`, `output 30
        dB`."""
        if self.target_agreement is not None:
            return f"agreement {self.target_agreement:g}"
        if self.target_output_db is not None:
            return f"output {self.target_output_db:g} dB"
        if self.target_ratio is not None:
            return f"ratio {self.target_ratio:g}"
        return ByteSize(self.max_bytes or 0).human_readable()

    def limit(self, source_bytes: int) -> int:
        """Return the most bytes that a version of a source may take, for a budget in bytes."""
        if self.target_ratio is not None:
            return math.floor(source_bytes / self.target_ratio)
        return self.max_bytes or 0


FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.(json|txt|md|ya?ml)")
MAX_FILE_NAME = 100
MAX_FILES = 16
MAX_FILE_BYTES = 8 << 20
"""The tokenizers of published segmentation models, the largest such files, are smaller."""


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


BlobRecord = ShardRecord | BaseBlob | FileRecord
"""A record that names a blob and its size."""


class Agreement(Document):
    """How well the outputs of two models agree on some inputs. A dB figure is None if there is no error."""

    inputs: Annotated[int, Field(ge=1)]
    """Number of pictures, or of batches for other models."""
    prompts: Annotated[int, Field(ge=0)] | None = None
    """Box and point prompts for which the original finds a mask; None for a model without masks."""
    agreement_mean: float | None = None
    """Mean IoU of masks with the original's, over the prompts."""
    agreement_p5: float | None = None
    """The 5th percentile of that IoU."""
    embedding_db: float | None = None
    """SQNR of the image embedding, dB."""
    output_db: float | None = None
    """SQNR of the mask logits, or of other outputs, dB."""
    cosine: float | None = None
    """Mean cosine of other outputs with the original's."""
    metrics: dict[str, float] | None = None
    """Results of the user's own metric."""


class Int8Record(Document):
    """How a version's linear layers compute on int8 tensor cores, and what that costs, as its proof measured it."""

    layers: Annotated[int, Field(ge=0)]
    """Layers whose inputs are rounded to int8."""
    least_db: float | None = None
    """Of those, the least SQNR that the rounding leaves of a layer's outputs, dB; None for no error at all."""
    in_float: dict[str, float] = Field(default_factory=dict)
    """Weights whose layers compute in float, and what rounding would leave of their outputs, dB."""
    measured: Agreement
    """On synthetic pictures, or the user's inputs."""
    own: Agreement | None = None
    """On the user's own pictures."""

    @property
    def figures(self) -> dict[str, float | None]:
        """The worse of both sets, as `ProofRecord.figures`."""
        return _worse(self.measured, self.own)


class ProofRecord(Document):
    """The comparison of a version with its original: its final bytes were decoded and run before it was published."""

    adapter: str | None = None
    """The member of the family that both were run as; None if the user's builder makes the model."""
    pictures_version: int | None = None
    """Version of the synthetic pictures."""
    shapes_iou: float | None = None
    """IoU of the original's masks with the drawn shapes: low if the model was run in the wrong way."""
    measured: Agreement
    """On synthetic pictures, or on the user's inputs."""
    own: Agreement | None = None
    """On the user's own pictures."""
    int8: Int8Record | None = None
    """The same bytes computed on int8 tensor cores, if the manifest asks for that."""

    @property
    def figures(self) -> dict[str, float | None]:
        """The worse of both sets, under the keys of every `--json`."""
        return _worse(self.measured, self.own)


def _worse(measured: Agreement, own: Agreement | None) -> dict[str, float | None]:
    sets = [measured, *([own] if own else [])]
    known = {key: [value for one in sets if (value := getattr(one, key)) is not None] for key in NO_FIGURES}
    return {key: min(values, default=None) for key, values in known.items()}


NO_FIGURES: dict[str, float | None] = dict.fromkeys(("agreement_mean", "agreement_p5", "output_db"))
"""The `figures` of a version without a proof."""

FIGURES = ("source_bytes", "stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median", *NO_FIGURES)
"""The keys of `VersionManifest.figures`."""


class VersionManifest(Document):
    """One immutable version of a model. Its digest is the sha256 of `to_bytes()`."""

    version: Literal[1] = 1
    """Version of this document's layout."""
    model: str
    source: SourceRecord
    profile: str
    recipe: dict[str, str | float | int | None]
    """The resolved profile. With `overrides` it determines the coded bytes."""
    budget: BudgetRecord | None = None
    """The budget that the recipe's target follows from, if any."""
    overrides: dict[str, Override] | None = None
    """Targets of single tensors that override the recipe: dB, or `lossless`."""
    gains_db: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    """Under allocation by output and by scale: dB by which a tensor's target differs from the recipe's, which is their
    mean."""
    adapter: str | None = None
    """The member of the Segment Anything family, if the manifest names it: the weights do not tell how pictures and
    prompts are prepared."""
    code: str
    """Version of birkhoff-compression that made it."""
    shards: Annotated[tuple[ShardRecord, ...], Field(min_length=1)]
    """In the order of the checkpoint."""
    files: Annotated[tuple[FileRecord, ...] | None, Field(min_length=1, max_length=MAX_FILES)] = None
    """Files that go with the weights."""
    proof: ProofRecord | None = None
    """Measurements of its outputs, made before it was published; None if no proof was made."""
    base: BaseRecord | None = None
    """The version that its tensors could be stored as differences to."""

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: tuple[FileRecord, ...] | None) -> tuple[FileRecord, ...] | None:
        names = [file.name.lower() for file in files or ()]  # some file systems ignore case
        if len(set(names)) < len(names):
            raise ValueError("two files have one name")
        return files

    @model_validator(mode="after")
    def _bases_have_one_size(self) -> "VersionManifest":
        sizes: dict[str, int] = {shard.blob: shard.bytes for shard in self.shards}
        for base in (base for shard in self.shards for base in shard.bases or ()):
            if sizes.setdefault(base.blob, base.bytes) != base.bytes:
                raise ValueError(f"blob {base.blob} is named with {sizes[base.blob]} and with {base.bytes} bytes")
        return self

    @property
    def stored(self) -> tuple[BlobRecord, ...]:
        """The record of every blob that the version needs: shards, base containers, files."""
        return (*self.shards, *self.bases, *(self.files or ()))

    @property
    def own(self) -> tuple[BlobRecord, ...]:
        """The records of `stored` that belong to this version and not to its base."""
        return (*self.shards, *(self.files or ()))

    @property
    def bases(self) -> tuple[BaseBlob, ...]:
        """Containers of the base that its shards are differences to, each once, except those that are its own shards
        too."""
        own = {shard.blob for shard in self.shards}
        found = (base for shard in self.shards for base in shard.bases or ())
        return tuple({base.blob: base for base in found if base.blob not in own}.values())

    @property
    def allocation(self) -> str | None:
        """How the recipe's target was allocated to tensors; None if it has no target."""
        return None if self.recipe.get("target_db") is None else str(self.recipe.get("allocation") or "uniform")

    @property
    def statistics_keys(self) -> tuple[str, ...]:
        """The store key of the statistics that it was made with, if any."""
        key = self.recipe.get("statistics")
        return (statistics_key(key),) if isinstance(key, str) and DIGEST.fullmatch(key) else ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that the digest covers: this document, blobs, shard records.

        Names, aliases and signatures are not counted: they take some hundred bytes and change while the version does
        not. Containers of a base are counted in `base_bytes`.
        """
        records = sum(len(shard.to_bytes()) for shard in self.shards)
        return len(self.to_bytes()) + sum(record.bytes for record in self.own) + records

    @property
    def base_bytes(self) -> int:
        """Bytes of base containers that it needs besides `stored_bytes`; 0 without a base."""
        return sum(base.bytes for base in self.bases)

    @property
    def ratio(self) -> float:
        """Source bytes over `stored_bytes`."""
        return round(self.source.bytes / self.stored_bytes, 3)

    def figures(self) -> dict[str, int | float | None]:
        """Return sizes in bytes, ratio, SQNR in dB, and the results of its proof, under the keys of `--json`."""
        least, median = sqnr_summary(self.shards)
        return {
            "source_bytes": self.source.bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "sqnr_db_min": least,
            "sqnr_db_median": median,
            **(self.proof.figures if self.proof else NO_FIGURES),
        }

    @property
    def digest(self) -> str:
        """The sha256 of this document, which identifies the version."""
        return sha256(self.to_bytes())


def sqnr_summary(shards: Iterable[ShardRecord]) -> tuple[float | None, float | None]:
    """Return (least, median) SQNR in dB of the coded tensors of shards; None if there are none."""
    values = [value for shard in shards for value in shard.sqnr_db]
    return (min(values), round(median(values), 2)) if values else (None, None)


NOTHING = "0" * 64
"""The digest in records that refer to no version: a buried name, or an alias that is being made or was removed."""


class NameRecord(Document):
    """A version name, such as `v3`. PROTOCOL.md has its states and who may change them."""

    digest: Digest
    """`NOTHING` in a buried name, which never refers to a version again."""
    created: str
    """UTC, ISO 8601."""
    publisher: str
    """A random id of the writer, so that two publishers never write equal bodies."""
    single_publisher: bool | None = None
    """Set if the store has no conditional writes, so that only one publisher at a time is safe."""
    retired: str | None = None
    """When the name was retired (UTC, ISO 8601). It does not resolve any more, and its number is not reused.

    In a claim, which its publisher has not made live yet, this is the time of creation.
    """

    @property
    def live(self) -> bool:
        """Whether it resolves."""
        return self.retired is None

    @property
    def dead(self) -> bool:
        """Whether it is buried."""
        return self.digest == NOTHING

    @property
    def claimed(self) -> bool:
        """Whether it is a claim: its publisher is at work, or died."""
        return self.never_live and not self.dead

    @property
    def never_live(self) -> bool:
        """Whether it was claimed but never made live."""
        return self.retired == self.created


class GivenNames(Document):
    """Numbers of a model's names that once resolved and were retired. The records of the names may be gone."""

    ranges: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(max_length=65536)] = ()
    """First and last number of each range, ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> "GivenNames":
        ends = [end for pair in self.ranges for end in pair]
        if ends != sorted(ends):
            raise ValueError("expected ascending ranges")
        return self

    def holds(self, number: int) -> bool:
        """Return whether this number is among them."""
        return any(first <= number <= last for first, last in self.ranges)

    def with_numbers(self, numbers: Iterable[int]) -> "GivenNames":
        """Return a record with these numbers added."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((*self.ranges, *((number, number) for number in numbers))):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return GivenNames(ranges=tuple(merged))


class NameSignature(Document):
    """A key's statement that a version was published under a name in a store."""

    version: VersionName
    audience: Annotated[str, Field(max_length=1024)] | None = None
    """The store that it was signed for (`signing.audience_of`); None in signatures older than audiences."""
    signed: str
    """UTC, ISO 8601."""
    signature: Annotated[str, Field(max_length=128)]
    """Ed25519, base64, of `signing.version_statement`."""


class VersionSignatures(Document):
    """All statements of one key about one version."""

    key: Digest
    """sha256 of the public key's 32 bytes."""
    names: Annotated[tuple[NameSignature, ...], Field(min_length=1, max_length=64)]


class AliasSignature(Document):
    """A signature of an alias's state."""

    key: Digest
    audience: Annotated[str, Field(max_length=1024)] | None = None
    """As in `NameSignature`."""
    signature: Annotated[str, Field(max_length=128)]
    """Ed25519, base64, of `signing.alias_statement`."""


class AliasState(Document):
    """A version that an alias pointed at, and since when."""

    version: VersionName
    digest: Digest
    gen: Annotated[int, Field(ge=1)]
    """Number of changes of the alias; only grows."""
    moved: str
    """UTC, ISO 8601."""
    back: bool | None = None
    """Set if a rollback led here."""
    protected: bool | None = None
    """Set if the alias moves only with `force`."""


class AliasRecord(AliasState):
    """A movable pointer at a named version, with its earlier states.

    Readers ignore a record whose digest is `NOTHING`: the alias is being made, or was removed if `previous` holds
    states. The record of a removed alias stays, so that its `gen` continues if it is made again.
    """

    publisher: str
    """A random id of the writer, so that two writers never write equal bodies."""
    signature: AliasSignature | None = None
    """Signature of this state by whoever moved the alias, if it was signed."""
    previous: tuple[AliasState, ...] = ()
    """Oldest first; at most `aliases.KEPT_STATES`."""


def sha256(data: bytes | memoryview) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


def blob_key(digest: str) -> str:
    """Return the key of a blob."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def shard_key(key: str) -> str:
    """Return the key of a shard's record."""
    return f"shards/{key[:2]}/{key}.json"


def keep_object(store: Store, key: str, body: bytes) -> None:
    """Store an object whose key is derived from its content or its inputs.

    An object that is there already is replaced: it is damaged, or another worker's equal result.
    """
    try:
        store.create(key, body)
    except PreconditionError:
        store.put(key, body)


def statistics_key(key: str) -> str:
    """Return the key of a model's statistics."""
    return f"statistics/{key[:2]}/{key}.json"


def version_key(model: str, digest: str) -> str:
    """Return the key of a version's manifest."""
    return f"models/{model}/versions/{digest}/manifest.json"


def signatures_key(model: str, digest: str, key: str) -> str:
    """Return the key of one key's signatures of a version."""
    return f"models/{model}/versions/{digest}/signatures/{key}.json"


def name_key(model: str, name: str) -> str:
    """Return the key of a version name."""
    return f"models/{model}/names/{name}.json"


def given_key(model: str) -> str:
    """Return the key of the numbers that are not reused."""
    return f"models/{model}/given.json"


def alias_key(model: str, alias: str) -> str:
    """Return the key of an alias."""
    return f"models/{model}/aliases/{alias}.json"


def report_key(run: str, file: str) -> str:
    """Return the key of a file of a run's report."""
    return f"runs/{run}/{file}"


def utc_now() -> str:
    """Return the present time as records hold it: UTC, ISO 8601, whole seconds."""
    return clock.utc().isoformat(timespec="seconds")


def fetch_document(store: Store, kind: type[D], key: str) -> D:
    """Read and parse a stored document, up to the size limit of documents.

    Raises:
        ObjectNotFoundError, StoreError: There is none, or the store failed.
        IntegrityError: The object is not such a document, or is too large.
    """
    return parse_bounded(kind, key, store.get(key, length=MAX_DOCUMENT_BYTES + 1))
