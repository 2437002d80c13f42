"""Versions in OCI registries, as images of the CNCF's ModelPack specification (github.com/modelpack/model-spec).

A version is one manifest. Its layers are files as `pull` lays them out, byte for byte, so registries store each blob
once, and a mounted image is a pulled folder:

    shard-00001-of-00002.safetensors    application/vnd.cncf.model.weight.v1.raw
    manifest.json, version.json         application/vnd.cncf.model.weight.config.v1.raw
    files/config.json, ...              the same; texts as application/vnd.cncf.model.doc.v1.raw
    model.sig                           if the version has an OMS signature

The config states format, precision and quantisation. Labels are an annotation of the manifest. `OciStore` presents such
a manifest as a read-only store with one version.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from birkhoff.pipeline.artifact.oci_client import MANIFEST_TYPE, OciReference, Registry
from birkhoff.pipeline.artifact.oms import OMS_FILE, oms_key
from birkhoff.pipeline.artifact.pull import MANIFEST_FILE, SIGNATURE_FILE, VERSION_FILE, blob_files, blob_id
from birkhoff.pipeline.artifact.references import Found, noted_signatures
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError, StoreDeniedError
from birkhoff.pipeline.registry.documents import (
    BlobRecord,
    FileRecord,
    NameRecord,
    blob_key,
    name_key,
    sha256,
    signatures_key,
    version_key,
)
from birkhoff.pipeline.registry.labels import LABELS_FILE, labels_key, licence_of
from birkhoff.pipeline.registry.shipping import Parcel, read_blob
from birkhoff.pipeline.store.base import ObjectInfo, Store, StoreAddress

CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
SETTINGS_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
PATH_KEY = "org.cncf.model.filepath"
TITLE_KEY = "org.opencontainers.image.title"
"""Besides ModelPack's own annotation: ORAS names pulled files by this one."""
LABELS_KEY = "org.birkhoff.labels"

_MAX_LAYERS = 100_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class OciPushed:
    """A version that was pushed to a registry. `copied` counts blobs that the repository lacked."""

    model: str
    version: str
    digest: str
    """Digest of the version."""
    to: str
    manifest: str
    """Digest of the registry's manifest, by which other tools name it."""
    blobs: int
    copied: int
    copied_bytes: int

    def facts(self) -> dict[str, object]:
        """Return the result under the keys of `--json`."""
        return {
            "model": self.model,
            "version": self.version,
            "digest": self.digest,
            "to": self.to,
            "manifest": self.manifest,
            "blobs": self.blobs,
            "copied_blobs": self.copied,
            "copied_bytes": self.copied_bytes,
        }


def push_oci(
    source: Store,
    parcel: Parcel,
    reference: OciReference,
    *,
    allow_http: bool = False,
    report: Callable[[int], None] = lambda _: None,
) -> OciPushed:
    """Push a version to a registry: blobs that its repository lacks, the config, and the manifest last.

    Raises:
        IntegrityError: A blob of the source is missing or damaged; nothing was named.
        StoreError: The source or the registry failed.
    """
    registry = Registry(reference, allow_http=allow_http)
    manifest, copied, copied_bytes = parcel.manifest, 0, 0
    try:
        for record in parcel.blobs:
            digest = f"sha256:{record.blob}"
            if not registry.has_blob(digest, record.bytes):
                registry.put_blob(digest, read_blob(source, parcel, record))
                copied, copied_bytes = copied + 1, copied_bytes + record.bytes
            report(record.bytes)
        layers = [_layer(_media_type(record), record, path) for record, path in _paths(parcel)]
        for path, kind, body in _documents(parcel):
            layers.append(_kept(registry, kind, body, _named(path)))
        config = json.dumps(_config(parcel, layers), separators=(",", ":")).encode()
        labels = parcel.beside.get(LABELS_FILE)
        whole = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": MODEL_TYPE,
            "config": _kept(registry, CONFIG_TYPE, config, None),
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": manifest.model,
                "org.opencontainers.image.version": parcel.name,
                **({} if labels is None else {LABELS_KEY: labels.decode()}),
            },
        }
        body = json.dumps(whole, separators=(",", ":")).encode()
        digest = registry.put_manifest(reference.name, body)
    finally:
        registry.close()
    return OciPushed(
        model=manifest.model,
        version=parcel.name,
        digest=manifest.digest,
        to=reference.url,
        manifest=digest,
        blobs=len(parcel.blobs),
        copied=copied,
        copied_bytes=copied_bytes,
    )


class OciStore(Store):
    """The version of one manifest in a registry, as a read-only store; `reference` names it there."""

    def __init__(self, reference: OciReference, *, allow_http: bool = False) -> None:
        """Read the manifest. Raises StoreError, ObjectNotFoundError, and IntegrityError if it is not a version of
        ours."""
        super().__init__(StoreAddress(url=reference.url))
        self._registry = Registry(reference, allow_http=allow_http)
        self.reference: str = ""
        """`MODEL@NAME` of the version."""
        try:
            body, _ = self._registry.manifest(reference.name)
            self._objects = self._open(body)
        except BaseException:
            self._registry.close()
            raise

    def _open(self, body: bytes) -> dict[str, bytes | tuple[str, int]]:
        """Return the content of each key: its bytes, or digest and size of a layer."""
        where = self.url
        try:
            whole = json.loads(body)
            layers = {layer["annotations"][PATH_KEY]: _checked(layer) for layer in whole["layers"][:_MAX_LAYERS]}
            labels = (whole.get("annotations") or {}).get(LABELS_KEY)
            manifest = self._layer(*layers[MANIFEST_FILE])
            note = json.loads(self._layer(*layers[VERSION_FILE]))
            model, name, digest = str(note["model"]), str(note["version"]), sha256(manifest)
            signatures = noted_signatures(note)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(
                f"{where}: not a version of birkhoff ({type(error).__name__}: {error}); expected an image that "
                "`birkhoff push` wrote"
            ) from None
        self.reference = f"{model}@{name}"
        record = NameRecord(digest=digest, created=str(note.get("created", _EPOCH.isoformat())), publisher="oci")
        objects: dict[str, bytes | tuple[str, int]] = {
            version_key(model, digest): manifest,
            name_key(model, name): record.to_bytes(),
            **{signatures_key(model, digest, one.key): one.to_bytes() for one in signatures},
        }
        if isinstance(labels, str):
            objects[labels_key(model, digest)] = labels.encode()
        if SIGNATURE_FILE in layers:
            objects[oms_key(model, digest)] = self._layer(*layers[SIGNATURE_FILE])
        for path, (layer, size) in layers.items():
            if path not in (MANIFEST_FILE, VERSION_FILE, SIGNATURE_FILE):
                objects[blob_key(layer.removeprefix("sha256:"))] = (layer, size)
        return objects

    def _layer(self, digest: str, size: int) -> bytes:
        """Return a small layer, checked."""
        body = self._registry.blob(digest, length=min(size, MAX_DOCUMENT_BYTES))
        if f"sha256:{sha256(body)}" != digest:
            raise IntegrityError(f"{self.url}: layer {digest} is damaged; push the version again")
        return body

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        found = self._find(key)
        if isinstance(found, tuple):
            return self._registry.blob(found[0], start=start, length=length)
        return found[start:] if length is None else found[start : start + length]

    def read(self, key: str, *, length: int | None = None) -> tuple[bytes, str]:
        """See Store."""
        return self.get(key, length=length), self.head(key).tag

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        found = self._find(key)
        size, tag = (found[1], found[0]) if isinstance(found, tuple) else (len(found), sha256(found))
        return ObjectInfo(key=key, size=size, tag=tag, modified=_EPOCH)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store."""
        return (self.head(key) for key in sorted(self._objects) if key.startswith(prefix))

    def _find(self, key: str) -> bytes | tuple[str, int]:
        if key not in self._objects:
            raise ObjectNotFoundError(f"{self.url}: no object {key}")
        return self._objects[key]

    def _refuse(self) -> NoReturn:
        raise StoreDeniedError(f"{self.url}: a registry accepts whole versions only; use `birkhoff push`")

    def put(self, key: str, body: bytes) -> str:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def create(self, key: str, body: bytes) -> str:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def replace(self, key: str, body: bytes, *, tag: str) -> str:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def touch(self, key: str) -> None:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def delete(self, key: str, *, permit: str | None = None) -> None:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def permit(self, now: datetime, *, witness: str) -> str:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def revoke(self, permit: str) -> datetime | None:  # noqa: ARG002
        """Refuse."""
        self._refuse()

    def close(self) -> None:
        """See Store."""
        self._registry.close()


def _paths(parcel: Parcel) -> Iterator[tuple[BlobRecord, str]]:
    files = blob_files(parcel.manifest)
    return ((record, files[blob_id(record)]) for record in parcel.manifest.stored)


def _documents(parcel: Parcel) -> Iterator[tuple[str, str, bytes]]:
    """Yield (path, media type, bytes) of the documents in a pulled folder."""
    manifest = parcel.manifest
    signature = parcel.beside.get(OMS_FILE)
    found = Found(
        model=manifest.model,
        name=parcel.name,
        digest=manifest.digest,
        manifest=manifest,
        signatures=tuple(parcel.signatures()),
    )
    names = [path for _, path in _paths(parcel)] + ([] if signature is None else [SIGNATURE_FILE])
    yield MANIFEST_FILE, SETTINGS_TYPE, manifest.to_bytes()
    yield VERSION_FILE, SETTINGS_TYPE, json.dumps({**found.note(), "files": names}).encode()
    if signature is not None:
        yield SIGNATURE_FILE, DOC_TYPE, signature


def _media_type(record: BlobRecord) -> str:
    if not isinstance(record, FileRecord):
        return WEIGHT_TYPE
    return DOC_TYPE if Path(record.name).suffix in (".md", ".txt") else SETTINGS_TYPE


def _kept(registry: Registry, kind: str, body: bytes, annotations: dict[str, str] | None) -> dict[str, Any]:
    """Store a document in the repository unless it is there; return its descriptor."""
    digest = f"sha256:{sha256(body)}"
    if not registry.has_blob(digest, len(body)):
        registry.put_blob(digest, body)
    return _descriptor(kind, digest, len(body), annotations)


def _layer(kind: str, record: BlobRecord, path: str) -> dict[str, Any]:
    return _descriptor(kind, f"sha256:{record.blob}", record.bytes, _named(path))


def _named(path: str) -> dict[str, str]:
    return {PATH_KEY: path, TITLE_KEY: path}


def _descriptor(kind: str, digest: str, size: int, annotations: dict[str, str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"mediaType": kind, "digest": digest, "size": size}
    return found if annotations is None else {**found, "annotations": annotations}


def _config(parcel: Parcel, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model's config by ModelPack: facts of the model, and the digests of its layers, which are not
    compressed."""
    manifest, labels = parcel.manifest, parcel.labels()
    licence = licence_of(labels)
    origin = (manifest.source.origin or ("",))[0]
    descriptor = {
        "name": manifest.model,
        "version": parcel.name,
        "title": manifest.model,
        **({"licenses": [licence]} if licence else {}),
        **({"sourceURL": origin} if origin else {}),
        **({"family": manifest.adapter} if manifest.adapter else {}),
    }
    return {
        "descriptor": descriptor,
        "config": {
            "format": "safetensors",
            "precision": "int8",
            "quantization": f"birkhoff-{manifest.profile.replace(' ', '-')}",
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }


def _checked(layer: Any) -> tuple[str, int]:
    """Return digest and size of a layer. Raises ValueError, KeyError, TypeError."""
    digest, size = layer["digest"], layer["size"]
    if not isinstance(digest, str) or not digest.startswith("sha256:") or len(digest) != 71 or type(size) is not int:
        raise ValueError(f"layer {str(digest)[:80]!r} has no SHA-256 or size")
    return digest, size
