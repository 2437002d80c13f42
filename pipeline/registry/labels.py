"""Labels of versions, such as a licence, a data set, or who approved them.

    models/M/versions/<digest>/labels.json    all labels of one version

They lie beside the manifest: changing them leaves the version and its digest alone, and they are collected with it. No
signature covers them, so anybody who can write to the store can change them (SIGNING.md).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field, field_validator

from birkhoff.pipeline.documents import Document
from birkhoff.pipeline.errors import LabelError, ObjectNotFoundError
from birkhoff.pipeline.registry.documents import fetch_document
from birkhoff.pipeline.registry.leases import open_run
from birkhoff.pipeline.registry.swaps import change_document
from birkhoff.pipeline.registry.versions import Version, resolve
from birkhoff.pipeline.store.base import Store

LABELS_FILE = "labels.json"
MAX_LABELS = 32
MAX_VALUE = 256

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def check_label(key: str, value: str) -> None:
    """Raise ValueError if this is not a valid label."""
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"label {key[:80]!r}: expected 1 to 63 of a-z, 0-9, '.', '_' and '-', the first a letter or a digit"
        )
    if not 1 <= len(value) <= MAX_VALUE or not value.isprintable():
        raise ValueError(f"label {key}: expected 1 to {MAX_VALUE} printable characters, got {value[:80]!r}")


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return labels if each is valid and there are not too many. Raises ValueError."""
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{len(labels)} labels; a version has at most {MAX_LABELS}")
    for key, value in labels.items():
        check_label(key, value)
    return labels


class LabelRecord(Document):
    """The labels of one version, by key."""

    labels: Annotated[dict[str, str], Field(max_length=MAX_LABELS)]

    _labels = field_validator("labels")(check_labels)


def licence_of(labels: Mapping[str, str]) -> str | None:
    """Return the licence that labels name, in either spelling."""
    return labels.get("licence") or labels.get("license")


def labels_key(model: str, digest: str) -> str:
    """Return the key of a version's labels."""
    return f"models/{model}/versions/{digest}/{LABELS_FILE}"


def read_labels(store: Store, model: str, digest: str) -> dict[str, str]:
    """Return the labels of a version by key; empty if it has none. Raises StoreError, IntegrityError."""
    try:
        return fetch_document(store, LabelRecord, labels_key(model, digest)).labels
    except ObjectNotFoundError:
        return {}


def change_labels(
    store: Store, model: str, digest: str, labels: Mapping[str, str], *, drop: Iterable[str] = ()
) -> dict[str, str]:
    """Set labels of a version, remove those in `drop`, and keep the others; return all labels.

    The caller holds an open run, or knows that a name refers to the version.

    Raises:
        LabelError: A label is not valid, or there would be too many.
        StoreError, IntegrityError: The store failed.
    """
    gone, wanted = set(drop), dict[str, str]()

    def change(found: LabelRecord | None) -> LabelRecord | None:
        nonlocal wanted
        held = {} if found is None else found.labels
        wanted = {**held, **labels}
        wanted = {name: wanted[name] for name in sorted(wanted) if name not in gone}
        try:
            check_labels(wanted)
        except ValueError as error:
            raise LabelError(str(error)) from None
        return None if wanted == held else LabelRecord(labels=wanted)

    change_document(store, LabelRecord, labels_key(model, digest), change)
    return wanted


def label(
    store: Store, reference: str, labels: Mapping[str, str], *, drop: Iterable[str] = ()
) -> tuple[Version, dict[str, str]]:
    """Change labels of the version that a reference resolves to; return the version and its labels.

    Raises:
        ArtifactNotFoundError: There is no such version.
        LabelError, StoreError, IntegrityError: As `change_labels`.
    """
    with open_run(store):
        version = resolve(store, reference)
        return version, change_labels(store, version.model, version.digest, labels, drop=drop)
