"""What lies in a store, and under which key.

    blobs/sha256/ab/<hex>                   a shard (a codec container) or a model's small file, named by its digest
    shards/ab/<key>.json                    which blob a shard key has led to, and what its validation measured
    statistics/ab/<key>.json                what a model's outputs feel of its weights; its Hessians are blobs
    models/M/versions/<digest>/manifest.json   a version: inputs, recipe, shards; named by the digest of this document
    models/M/versions/<digest>/signatures/<key>.json   under which names a key has signed it (see signing.py)
    models/M/versions/<digest>/labels.json   what people say of it (see labels.py)
    models/M/names/v<N>.json                human names, created once, never reused, changed by compare-and-swap
    models/M/given.json                     numbers whose names are gone, so that no copy brings one back
    models/M/aliases/<alias>.json           movable pointers with their history, changed by compare-and-swap
    runs/<id>/report.json, runs/<id>/report.html   what became of a run (see report.py); ids sort by time
    runs/open/<id>.json, runs/sweep/<id>.json   leases of running publishers and of garbage collection (see leases.py)
    runs/condemned.json                     what a collection is about to delete, while it does (see fencing.py)

Each object refers only to objects that were durable before it was written, so a reader never meets a dangling one,
whenever a writer dies. What a name or an alias refers to is held while it does (see PROTOCOL.md).
"""

import hashlib
import math
import re
from collections.abc import Iterable
from statistics import median
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveInt, field_validator, model_validator

from birkhoff.codec.profiles import Override
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES, D, Digest, Document, parse_bounded
from birkhoff.pipeline.errors import PreconditionError
from birkhoff.pipeline.registry import clock
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.keys import DIGEST

VersionName = Annotated[str, Field(pattern=r"^v[1-9][0-9]{0,8}$")]

FLOOR_DB = -99.0
"""Recorded for a source of zeros that came back as something else: JSON has no minus infinity."""


class BaseBlob(Document):
    """A container of another version, to whose tensors those of a shard are differences."""

    blob: Digest
    """sha256 of the container."""
    bytes: Annotated[int, Field(ge=0)]


class BaseRecord(Document):
    """The version that a version was made as a difference to. What it needs of that are the `bases` of its shards."""

    model: str
    version: VersionName | None = None
    """The name that it had then."""
    digest: Digest

    @property
    def label(self) -> str:
        """For messages: `sam-b@v3`."""
        return f"{self.model}@{self.version or self.digest[:12]}"


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
    bases: Annotated[tuple[BaseBlob, ...] | None, Field(min_length=1)] = None
    """Containers without which it cannot be decoded: those that its tensors are differences to."""

    @property
    def needs(self) -> tuple[str, ...]:
        """sha256 of every blob that it takes to decode it: its own first."""
        return (self.blob, *(base.blob for base in self.bases or ()))


Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Finite and not below 0."""


class HessianRecord(Document):
    """The Hessian of a matrix, as `codec.output.packing` writes it; stored as a blob."""

    blob: Digest
    """sha256 of its bytes."""
    bytes: Annotated[int, Field(ge=2)]
    columns: Annotated[int, Field(ge=1)]
    """Of the matrix as the codec holds it."""


class StatisticsRecord(Document):
    """What the outputs of a model feel of its weights on synthetic pictures, by names of its tensors.

    Shards are made by it. Nobody who reads a version needs it, and it can be made again: no version's blobs or bytes
    count it, and no copy takes it along.
    """

    key: Digest
    """H(versions, counts and seed, source, and what the model was run as)."""
    adapter: str | None = None
    """The member of the family as which it was run; None for a model that the user's builder makes."""
    pictures: Annotated[int, Field(ge=1)]
    """Or batches of the user's inputs."""
    probes: Annotated[int, Field(ge=1)]
    """Of each."""
    device: str
    """Kind of device that took it: `cpu` or `cuda`."""
    sensitivities: dict[str, Positive]
    """Mean squared share of the outputs by the square of the weights' unit; 0 for what no output feels."""
    left: dict[str, Positive] = Field(default_factory=dict)
    """Share of the outputs' error that feedback leaves, of each tensor with a Hessian."""
    rms: dict[str, Positive]
    """Root mean square of the bulk of each tensor's weights."""
    hessians: dict[str, HessianRecord]


class SourceRecord(Document):
    """Where a version came from."""

    file: str
    """Name of the source file, without its folder."""
    sha256: Digest
    bytes: int
    format: str
    nesting: tuple[str, ...] = ()
    """Keys that led to the state dict in the source: `("model",)`."""
    origin: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    """Where files of it are for everybody, at a commit each: `hf://ORG/REPO@COMMIT/FILE`."""


BUDGET_FLOOR_DB = 15.0
"""The least target that a budget may give a coded tensor, unless the manifest's `floor_db` says another: 3 % of the
weights' energy lost, which is about where ten times smaller than float32 is. A tensor at 9 dB has lost an eighth of
it."""


class BudgetRecord(Document):
    """What the recipe's target was found for, one of these.

    Bytes: the least ratio of source bytes to the version's `stored_bytes`, or the most of them. Outputs: the least mean
    agreement of masks with the original's, or the least SQNR of outputs in dB, with as few bytes as that takes.
    """

    target_ratio: float | None = None
    max_bytes: int | None = None
    target_agreement: float | None = None
    target_output_db: float | None = None
    floor_db: float | None = None
    """The least target of a coded tensor, dB, if the manifest says another one than `BUDGET_FLOOR_DB`."""

    @property
    def least_db(self) -> float:
        """The least target that a coded tensor gets, dB."""
        return BUDGET_FLOOR_DB if self.floor_db is None else self.floor_db

    @property
    def by_output(self) -> bool:
        """Whether outputs decide, not bytes."""
        return self.target_agreement is not None or self.target_output_db is not None

    @property
    def label(self) -> str:
        """What stands where a profile's name would: `ratio 7`, `64.0MiB`, `agreement 0.97`, `output 30 dB`."""
        if self.target_agreement is not None:
            return f"agreement {self.target_agreement:g}"
        if self.target_output_db is not None:
            return f"output {self.target_output_db:g} dB"
        if self.target_ratio is not None:
            return f"ratio {self.target_ratio:g}"
        return ByteSize(self.max_bytes or 0).human_readable()

    def limit(self, source_bytes: int) -> int:
        """The most bytes that a version of so large a source may take; of a budget in bytes."""
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


BlobRecord = ShardRecord | BaseBlob | FileRecord
"""What names a blob, and says how large it is."""


class Agreement(Document):
    """How much the outputs of two models agree on some pictures, or on some inputs; dB is None for no error at all."""

    inputs: Annotated[int, Field(ge=1)]
    """Pictures, or batches of another model's inputs."""
    prompts: Annotated[int, Field(ge=0)] | None = None
    """Prompts at which the original finds anything, by box and by point; None for a model without masks."""
    agreement_mean: float | None = None
    """IoU of the masks with the original's, over the prompts."""
    agreement_p5: float | None = None
    """The same at the 5th percentile of the prompts."""
    embedding_db: float | None = None
    """SQNR of the image embedding, dB."""
    output_db: float | None = None
    """SQNR of the mask logits, or of another model's outputs, dB."""
    cosine: float | None = None
    """Mean cosine of another model's outputs with the original's."""
    metrics: dict[str, float] | None = None
    """What the user's own metric gives."""


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
    """The final bytes of a version, decoded and run beside the original, before it was published."""

    adapter: str | None = None
    """The member of the family as which both were run; None for a model that the user's builder makes."""
    pictures_version: int | None = None
    """Of the synthetic pictures."""
    shapes_iou: float | None = None
    """Of the original's masks with drawn shapes: whether it is run as it wants to be."""
    measured: Agreement
    """On synthetic pictures, or the user's inputs."""
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
"""`ProofRecord.figures` of a version without a proof."""

FIGURES = ("source_bytes", "stored_bytes", "ratio", "sqnr_db_min", "sqnr_db_median", *NO_FIGURES)
"""The keys of `VersionManifest.figures`."""


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
    gains_db: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    """Under allocation by output: what tensors get over the recipe's target, which is their mean, dB."""
    adapter: str | None = None
    """The member of the Segment Anything family that the weights are, where the manifest names it: what their pictures
    and prompts look like cannot be read off them."""
    code: str
    """Version of birkhoff-compression that made it."""
    shards: Annotated[tuple[ShardRecord, ...], Field(min_length=1)]
    """In the order of the checkpoint."""
    files: Annotated[tuple[FileRecord, ...] | None, Field(min_length=1, max_length=MAX_FILES)] = None
    """What goes with the weights, by name."""
    proof: ProofRecord | None = None
    """What its outputs were measured to be before it was published; None where no proof was made."""
    base: BaseRecord | None = None
    """The version that its tensors could be differences to."""

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: tuple[FileRecord, ...] | None) -> tuple[FileRecord, ...] | None:
        names = [file.name.lower() for file in files or ()]  # some file systems do not tell A from a
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
        """The record of every blob that the version needs: shards, then what they are differences to, then files."""
        return (*self.shards, *self.bases, *(self.files or ()))

    @property
    def own(self) -> tuple[BlobRecord, ...]:
        """Those of `stored` that would not be there without this version, or one that has the same."""
        return (*self.shards, *(self.files or ()))

    @property
    def bases(self) -> tuple[BaseBlob, ...]:
        """Containers of the base that shards are differences to, each once, without those that are its own shards."""
        own = {shard.blob for shard in self.shards}
        found = (base for shard in self.shards for base in shard.bases or ())
        return tuple({base.blob: base for base in found if base.blob not in own}.values())

    @property
    def allocation(self) -> str | None:
        """How the recipe's target was shared among tensors; None where there was none."""
        return None if self.recipe.get("target_db") is None else str(self.recipe.get("allocation") or "uniform")

    @property
    def statistics_keys(self) -> tuple[str, ...]:
        """Key in the store of the statistics that it was made by, if it was."""
        key = self.recipe.get("statistics")
        return (statistics_key(key),) if isinstance(key, str) and DIGEST.fullmatch(key) else ()

    @property
    def stored_bytes(self) -> int:
        """Every byte that the digest stands for: this document, blobs, shard records.

        Names, aliases and signatures, some hundred bytes each, point at a version and change while it does not. What a
        base holds is the base's: see `base_bytes`.
        """
        records = sum(len(shard.to_bytes()) for shard in self.shards)
        return len(self.to_bytes()) + sum(record.bytes for record in self.own) + records

    @property
    def base_bytes(self) -> int:
        """Bytes of its base's containers that it needs besides `stored_bytes`; 0 if it stands for itself."""
        return sum(base.bytes for base in self.bases)

    @property
    def ratio(self) -> float:
        """Bytes of the source over `stored_bytes`."""
        return round(self.source.bytes / self.stored_bytes, 3)

    def figures(self) -> dict[str, int | float | None]:
        """Sizes in bytes, their ratio, SQNR in dB, and what its proof measured, under the keys of every `--json`."""
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
        """sha256 of the document, by which the version is known."""
        return sha256(self.to_bytes())


def sqnr_summary(shards: Iterable[ShardRecord]) -> tuple[float | None, float | None]:
    """(least, median) SQNR of the coded tensors of shards, dB; None where there are none."""
    values = [value for shard in shards for value in shard.sqnr_db]
    return (min(values), round(median(values), 2)) if values else (None, None)


NOTHING = "0" * 64
"""The digest of no version: in a name that is dead, and in an alias that is being made or was removed."""


class NameRecord(Document):
    """A human name of a version: `v3`. PROTOCOL.md has its states and who may change them."""

    digest: Digest
    """`NOTHING` in a dead name: it refers to no version, and never will again."""
    created: str
    """UTC, ISO 8601."""
    publisher: str
    """A random name of the writer: two publishers never write equal bodies."""
    single_publisher: bool | None = None
    """Set where the store has no conditional writes, so that only one publisher at a time is safe."""
    retired: str | None = None
    """When the name was given up (UTC, ISO 8601): it resolves no more, and its number is not given again.

    In a claim, which its publisher has yet to make live, the time of its creation."""

    @property
    def live(self) -> bool:
        """Whether it resolves."""
        return self.retired is None

    @property
    def dead(self) -> bool:
        """Whether it refers to nothing."""
        return self.digest == NOTHING

    @property
    def claimed(self) -> bool:
        """Whether it was never live: its publisher is at work, or died."""
        return self.never_live and not self.dead

    @property
    def never_live(self) -> bool:
        """Whether it was claimed and no more."""
        return self.retired == self.created


class GivenNames(Document):
    """Numbers of a model's names that resolved once and were given up; the records of the names may be gone."""

    ranges: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(max_length=65536)] = ()
    """First and last of each, ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> "GivenNames":
        ends = [end for pair in self.ranges for end in pair]
        if ends != sorted(ends):
            raise ValueError("expected ascending ranges")
        return self

    def holds(self, number: int) -> bool:
        """Whether that number was given."""
        return any(first <= number <= last for first, last in self.ranges)

    def with_numbers(self, numbers: Iterable[int]) -> "GivenNames":
        """These numbers too."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted((*self.ranges, *((number, number) for number in numbers))):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return GivenNames(ranges=tuple(merged))


class NameSignature(Document):
    """One statement of a key: this version was published under this name in this store."""

    version: VersionName
    audience: Annotated[str, Field(max_length=1024)] | None = None
    """The store it was signed for (`signing.audience_of`); signatures from before there were audiences name none."""
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
    audience: Annotated[str, Field(max_length=1024)] | None = None
    """As in `NameSignature`."""
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
    """A movable pointer at a named version, and the states it was in before.

    One whose digest is `NOTHING` is not there for readers: it is being made, or, with states in `previous`, was
    removed. That one stays, so that the alias goes on from its `gen` if it comes back.
    """

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


def keep_object(store: Store, key: str, body: bytes) -> None:
    """Store what is named by what is in it, or what it was made from.

    What stands there otherwise is damaged, or another worker's equal claim: replaced.
    """
    try:
        store.create(key, body)
    except PreconditionError:
        store.put(key, body)


def statistics_key(key: str) -> str:
    """Key of a model's statistics."""
    return f"statistics/{key[:2]}/{key}.json"


def version_key(model: str, digest: str) -> str:
    """Key of a version's manifest."""
    return f"models/{model}/versions/{digest}/manifest.json"


def signatures_key(model: str, digest: str, key: str) -> str:
    """Key of what one key has signed of a version."""
    return f"models/{model}/versions/{digest}/signatures/{key}.json"


def name_key(model: str, name: str) -> str:
    """Key of a human name."""
    return f"models/{model}/names/{name}.json"


def given_key(model: str) -> str:
    """Key of the numbers that are not given again."""
    return f"models/{model}/given.json"


def alias_key(model: str, alias: str) -> str:
    """Key of an alias."""
    return f"models/{model}/aliases/{alias}.json"


def report_key(run: str, file: str) -> str:
    """Key of a file of a run's report."""
    return f"runs/{run}/{file}"


def utc_now() -> str:
    """The time as records hold it: UTC, ISO 8601, whole seconds."""
    return clock.utc().isoformat(timespec="seconds")


def fetch_document(store: Store, kind: type[D], key: str) -> D:
    """Read and parse a stored document, no more of it than one can have.

    Raises:
        ObjectNotFoundError, StoreError: there is none, or the store failed.
        IntegrityError: the object is not such a document, or larger than any.
    """
    return parse_bounded(kind, key, store.get(key, length=MAX_DOCUMENT_BYTES + 1))
