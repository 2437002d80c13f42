"""Statistics in a store: what is missing or damaged is said and never taken."""

from datetime import timedelta

import pytest
import torch

from birkhoff.codec.output.hessian import Hessian
from birkhoff.pipeline.registry.documents import HessianRecord, StatisticsRecord, blob_key, statistics_key
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.statistics.stored import find_statistics, keep_hessian, keep_statistics
from birkhoff.pipeline.store.base import Store

KEY = "5" * 64


def kept(store: Store) -> StatisticsRecord:
    hessians = {
        name: keep_hessian(store, Hessian(columns=torch.eye(size), rows=torch.eye(3)))
        for name, size in (("a", 4), ("b", 6))
    }
    record = StatisticsRecord(
        key=KEY,
        pictures=1,
        probes=1,
        device="cpu",
        sensitivities={"a": 1.0, "b": 0.0},
        rms={"a": 0.1, "b": 0.2},
        hessians=hessians,
    )
    keep_statistics(store, record)
    return record


def test_they_come_back_and_nothing_is_said_of_those_that_never_were(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_statistics(store, KEY) is None
    record = kept(store)
    assert find_statistics(store, KEY) == record
    assert caplog.text == ""
    kept(store)  # once more, by another worker
    assert find_statistics(store, KEY) == record


DAMAGES = {
    "a Hessian gone": "is missing",
    "a Hessian flipped": "is damaged",
    "a Hessian longer": "is damaged",
    "another size": "is damaged",
    "no document": "not a StatisticsRecord",
    "another key": "misplaced",
    "a number that is none": "not a StatisticsRecord",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_what_is_taken_anew_replaces_it(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = kept(store)
    hessian, place = record.hessians["b"], statistics_key(KEY)
    if damage == "a Hessian gone":
        store.delete(blob_key(hessian.blob))
    elif damage.startswith("a Hessian"):
        body = store.get(blob_key(hessian.blob))
        store.put(blob_key(hessian.blob), body + b"0" if damage.endswith("longer") else b"0" + body[1:])
    elif damage == "another size":
        wrong = HessianRecord(blob=hessian.blob, bytes=hessian.bytes, columns=5, rows=3)
        store.put(place, record.model_copy(update={"hessians": {"b": wrong}}).to_bytes())
    elif damage == "a number that is none":
        store.put(place, record.to_bytes().replace(b'"rms":{"a":0.1', b'"rms":{"a":-0.1'))
    else:
        store.put(place, b"{}" if damage == "no document" else record.model_copy(update={"key": "6" * 64}).to_bytes())
    assert find_statistics(store, KEY) is None
    assert DAMAGES[damage] in caplog.text
    assert "are taken anew" in caplog.text
    kept(store)
    assert find_statistics(store, KEY) == record


def test_what_is_found_is_young_again(directory_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = directory_store
    kept(store)
    touched: list[str] = []
    touch = store.touch
    monkeypatch.setattr(store, "touch", lambda key: (touched.append(key), touch(key)))
    record = find_statistics(store, KEY)
    assert record is not None
    assert set(touched) == {statistics_key(KEY), *(blob_key(one.blob) for one in record.hessians.values())}
    assert collect(store, grace=timedelta(hours=1), delete=True).garbage == []
