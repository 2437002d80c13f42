"""Statistics in a store: Hessians as blobs, then the record that names them.

Readers never need them. If something is missing or damaged, a warning says so and the statistics are taken again.
"""

import logging

from birkhoff.codec.output.hessian import Hessian
from birkhoff.codec.output.packing import pack, packed_bytes
from birkhoff.pipeline.errors import IntegrityError, ObjectNotFoundError
from birkhoff.pipeline.registry.documents import (
    HessianRecord,
    StatisticsRecord,
    blob_key,
    fetch_document,
    keep_object,
    sha256,
    statistics_key,
)
from birkhoff.pipeline.registry.parallel import each
from birkhoff.pipeline.store.base import Store

log: logging.Logger = logging.getLogger("birkhoff.statistics")


def find_statistics(store: Store, key: str) -> StatisticsRecord | None:
    """Return the statistics of a key, after reading all Hessians and finding them whole in the store.

    This touches all of them, so a new grace period begins for what is reused.
    """
    try:
        record = fetch_document(store, StatisticsRecord, statistics_key(key))
        if record.key != key:
            raise IntegrityError(f"{statistics_key(key)}: statistics of another key ({record.key}): misplaced")
        hessians = {hessian.blob: hessian for hessian in record.hessians.values()}
        each(lambda hessian: _check(store, hessian), hessians.values())
        each(store.touch, [*map(blob_key, hessians), statistics_key(key)])
        return record
    except ObjectNotFoundError:
        return None
    except IntegrityError as error:
        log.warning("%s; the statistics %s are taken anew", error, key)
        return None


def _check(store: Store, hessian: HessianRecord) -> None:
    """Read a Hessian, but never more than its recorded size. Raises IntegrityError."""
    try:
        body = store.get(blob_key(hessian.blob), length=hessian.bytes + 1)
    except ObjectNotFoundError:
        raise IntegrityError(f"blob {hessian.blob}, a Hessian, is missing in {store.url}") from None
    if sha256(body) != hessian.blob or len(body) != packed_bytes(hessian.columns, hessian.rows):
        raise IntegrityError(f"blob {hessian.blob}, a Hessian, is damaged in {store.url}")


def keep_hessian(store: Store, hessian: Hessian) -> HessianRecord:
    """Store a Hessian. Raises as `pack`."""
    packed = pack(hessian)
    digest = sha256(packed)
    keep_object(store, blob_key(digest), packed)
    rows = 0 if hessian.rows is None else len(hessian.rows)
    return HessianRecord(blob=digest, bytes=len(packed), columns=len(hessian.columns), rows=rows)


def keep_statistics(store: Store, record: StatisticsRecord) -> None:
    """Store the record of statistics. All their Hessians must be stored already."""
    keep_object(store, statistics_key(record.key), record.to_bytes())
