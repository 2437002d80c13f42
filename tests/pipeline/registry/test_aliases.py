"""Aliases: promoting, rolling back, protection, and what happens when several do it at once."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import AliasError, ArtifactNotFoundError, PreconditionError
from birkhoff.pipeline.registry.aliases import KEPT_STATES, Move, advance, aliases, promote, remove, rollback, trail
from birkhoff.pipeline.registry.documents import AliasRecord, AliasState, alias_key
from birkhoff.pipeline.registry.gc import retire
from birkhoff.pipeline.registry.names import names
from birkhoff.pipeline.registry.versions import Version, publish, resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_contents as make


def versions(store: Store, count: int) -> list[Version]:
    return [make(store, "net", f"content {number}") for number in range(1, count + 1)]


def at(store: Store, alias: str = "stable") -> str:
    return aliases(store, "net")[alias].version


def before_first(store: Store, method: str, action: Callable[[], object], key: str, patch: pytest.MonkeyPatch) -> None:
    """Let `action` happen just before the first call of a method for a key: the worst moment for a race."""
    original, pending = getattr(store, method), [action]

    def call(found: str, *arguments: object, **options: object) -> object:
        if found == key and pending:
            pending.pop()()
        return original(found, *arguments, **options)

    patch.setattr(store, method, call)


def test_promote_makes_and_moves_an_alias_and_keeps_its_states(store: Store) -> None:
    published = versions(store, 3)
    first = promote(store, "net", "v1")
    assert (first.before, first.after.version, first.after.gen) == (None, "v1", 1)
    second = promote(store, "net", "v3")
    assert second.facts() == {
        "model": "net",
        "alias": "stable",
        "version": "v3",
        "from": "v1",
        "digest": published[2].digest,
        "gen": 2,
        "protected": False,
        "changed": True,
    }
    again = promote(store, "net", "v3")
    assert (again.facts()["changed"], again.after.gen) == (False, 2)
    assert [(state.version, state.gen) for state in aliases(store, "net")["stable"].previous] == [("v1", 1)]
    assert resolve(store, "net@stable").digest == published[2].digest
    assert at(store, "latest") == "v3"


def test_rolling_back_again_goes_back_one_more_and_leaves_the_history(store: Store) -> None:
    versions(store, 4)
    for name in ("v1", "v2", "v3"):
        promote(store, "net", name)
    assert [rollback(store, "net").after.version for _ in range(2)] == ["v2", "v1"]
    with pytest.raises(AliasError, match="points at v1 and came from nowhere else"):
        rollback(store, "net")
    promote(store, "net", "v4")
    assert rollback(store, "net").after.version == "v1"
    record = aliases(store, "net")["stable"]
    assert [state.version for state in record.previous] == ["v1", "v2", "v3", "v2", "v1", "v4"]
    assert [state.gen for state in record.previous] == [1, 2, 3, 4, 5, 6]
    assert record.gen == 7


def test_rollback_to_a_named_version(store: Store) -> None:
    versions(store, 3)
    promote(store, "net", "v2")
    assert rollback(store, "net", to="v3").after.version == "v3"
    assert rollback(store, "net", to="v3").facts()["changed"] is False
    assert rollback(store, "net").after.version == "v2"
    with pytest.raises(ArtifactNotFoundError, match=r"has no version v9; it has: v1, v2, v3"):
        rollback(store, "net", to="v9")
    with pytest.raises(ArtifactNotFoundError, match="no alias 'canary'; it has: latest, stable"):
        rollback(store, "net", "canary")


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("v1", "v1"),
        ("v1 v2 v3", "v1 v2 v3"),
        ("v1 v2 v1", "v1 v2 v1"),
        ("v1 v2 v3 <v2", "v1 v2"),
        ("v1 v2 v3 <v2 <v1 v4", "v1 v4"),
        ("v1 v2 <v9", "v1 v2 v9"),
        ("v1 v2 v2", "v1 v2"),
        ("v1 v2 v1 v3 <v1", "v1 v2 v1"),
    ],
)
def test_the_trail_of_an_alias(moves: str, expected: str) -> None:
    states = [
        AliasState(version=move.lstrip("<"), digest="0" * 64, gen=gen, moved="", back=move.startswith("<") or None)
        for gen, move in enumerate(moves.split(), 1)
    ]
    *previous, last = states
    record = AliasRecord(**last.model_dump(), publisher="", previous=tuple(previous))
    assert trail(record) == expected.split()


def test_an_alias_remembers_a_bounded_number_of_states(directory_store: Store) -> None:
    versions(directory_store, 2)
    for turn in range(KEPT_STATES + 5):
        promote(directory_store, "net", f"v{turn % 2 + 1}")
    record = aliases(directory_store, "net")["stable"]
    assert [state.gen for state in record.previous] == list(range(5, KEPT_STATES + 5))
    assert len(record.to_bytes()) < 250 * KEPT_STATES


def test_a_protected_alias_moves_by_force_only(store: Store) -> None:
    versions(store, 2)
    promote(store, "net", "v1")
    promote(store, "net", "v2", protect=True)
    for move in (
        lambda: promote(store, "net", "v1"),
        lambda: rollback(store, "net"),
        lambda: promote(store, "net", "v2", protect=False),
    ):
        with pytest.raises(AliasError, match="stable of net is protected at v2; --force"):
            move()
    assert promote(store, "net", "v2").facts()["changed"] is False
    assert rollback(store, "net", force=True).facts()["protected"] is True
    assert promote(store, "net", "v1", protect=False, force=True).facts()["protected"] is False
    assert promote(store, "net", "v2").after.gen == 5


def test_publishing_leaves_a_protected_latest_alone_and_says_so(
    directory_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    make(directory_store, "net", "one")
    promote(directory_store, "net", "v1", "latest", protect=True)
    assert make(directory_store, "net", "two").name == "v2"
    assert at(directory_store, "latest") == "v1"
    assert "latest of net is protected and stays at v1" in caplog.text


@pytest.mark.parametrize("alias", ["v3", "0" * 64, "", "a/b", "..", "x" * 101])
def test_what_cannot_be_an_alias(directory_store: Store, alias: str) -> None:
    make(directory_store, "net", "one")
    with pytest.raises(AliasError, match="expected 1 to 100 letters"):
        promote(directory_store, "net", "v1", alias)


def test_latest_that_was_rolled_back_waits_for_a_new_version(store: Store) -> None:
    _, second = versions(store, 2)
    rollback(store, "net", "latest")
    assert publish(store, second.manifest).name == "v2"
    assert at(store, "latest") == "v1"
    advance(store, "net", "v1", "late")
    assert aliases(store, "net")["latest"].gen == 3
    make(store, "net", "content 3")
    assert at(store, "latest") == "v3"


def test_an_alias_written_before_it_had_a_history(directory_store: Store) -> None:
    first, _ = versions(directory_store, 2)
    old = f'{{"version":"v1","digest":"{first.digest}","gen":7,"moved":"2026-01-01T00:00:00+00:00","publisher":"x"}}'
    directory_store.create(alias_key("net", "stable"), old.encode())
    assert promote(directory_store, "net", "v2").after.gen == 8
    assert rollback(directory_store, "net").after.version == "v1"


def test_two_rollbacks_that_meet_go_back_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(store, 3)
    for name in ("v1", "v2", "v3"):
        promote(store, "net", name)
    before_first(store, "replace", lambda: rollback(store, "net"), alias_key("net", "stable"), monkeypatch)
    assert rollback(store, "net").facts()["changed"] is False
    assert at(store) == "v2"


def test_a_rollback_that_meets_a_promotion_does_not_undo_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(store, 3)
    for name in ("v1", "v2"):
        promote(store, "net", name)
    before_first(store, "replace", lambda: promote(store, "net", "v3"), alias_key("net", "stable"), monkeypatch)
    with pytest.raises(PreconditionError, match="stable of net moved to v3 meanwhile"):
        rollback(store, "net")
    assert at(store) == "v3"


def test_a_promotion_that_meets_the_retirement_of_its_version(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(store, 3)
    promote(store, "net", "v3")
    before_first(store, "replace", lambda: retire(store, "net", 1), alias_key("net", "stable"), monkeypatch)
    promote(store, "net", "v1")
    assert [name for name, _ in names(store, "net")] == ["v1", "v3"]


def test_a_retirement_that_meets_a_promotion_to_its_version(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(store, 3)
    key = "models/net/names/v1.json"
    before_first(store, "replace", lambda: promote(store, "net", "v1"), key, monkeypatch)
    assert retire(store, "net", 1) == ["v2"]
    assert [name for name, _ in names(store, "net")] == ["v1", "v3"]


def test_the_way_back_to_a_retired_version_is_barred(store: Store) -> None:
    versions(store, 3)
    for name in ("v1", "v2"):
        promote(store, "net", name)
    assert retire(store, "net", 1) == ["v1"]
    with pytest.raises(ArtifactNotFoundError, match=r"version v1 was retired on .*; it has: v2, v3"):
        rollback(store, "net")
    with pytest.raises(ArtifactNotFoundError, match=r"v1 was retired on"):
        resolve(store, "net@v1")


def test_threads_that_promote_and_roll_back_at_once(store: Store) -> None:
    versions(store, 4)
    promote(store, "net", "v1")
    done = threading.Event()
    seen: list[AliasRecord] = []

    def work(seed: int) -> list[Move]:
        rng, moves = random.Random(seed), []
        for _ in range(8):
            try:
                if rng.random() < 0.5:
                    moves.append(promote(store, "net", f"v{rng.randint(1, 4)}"))
                else:
                    moves.append(rollback(store, "net"))
            except (AliasError, PreconditionError):
                continue  # nothing to go back to, or somebody else moved it
        return moves

    def watch() -> None:
        key = alias_key("net", "stable")
        while not done.is_set():
            seen.append(read_document(AliasRecord, key, store.get(key)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        moves = [move for found in pool.map(work, range(4)) for move in found if move.facts()["changed"]]
    done.set()
    watcher.join()
    last = aliases(store, "net")["stable"]
    # Every change is in the history once, in one order that everybody agrees on.
    assert sorted(move.after.gen for move in moves) == list(range(2, last.gen + 1))
    states = {state.gen: state.version for state in (*last.previous, last)}
    assert all(states[move.after.gen] == move.after.version for move in moves)
    assert all(move.before is not None and move.before.gen == move.after.gen - 1 for move in moves)
    gens = [record.gen for record in seen]
    assert gens == sorted(gens)
    assert all(states[record.gen] == record.version for record in seen)


def test_a_removed_alias_refers_to_nothing_and_goes_on_where_it_was(store: Store) -> None:
    published = versions(store, 3)
    promote(store, "net", "v1")
    promote(store, "net", "v2")
    done = remove(store, "net", "stable")
    assert (done.before and done.before.version, done.after.gen) == ("v2", 3)
    assert list(aliases(store, "net")) == ["latest"]
    with pytest.raises(ArtifactNotFoundError, match="no version or alias 'stable'"):
        resolve(store, "net@stable")
    for again in (lambda: remove(store, "net", "stable"), lambda: rollback(store, "net")):
        with pytest.raises(ArtifactNotFoundError, match="has no alias 'stable'; it has: latest"):
            again()
    back = promote(store, "net", "v3")
    # Readers that have seen gen 3 take it: a state they know cannot come again.
    assert (back.before, back.after.gen, back.after.digest) == (None, 4, published[2].digest)
    assert [state.version for state in back.after.previous] == ["v1", "v2", "v2"]
    assert rollback(store, "net").after.version == "v2"


def test_a_protected_alias_is_removed_by_force_only(store: Store) -> None:
    versions(store, 1)
    promote(store, "net", "v1", protect=True)
    with pytest.raises(AliasError, match="alias stable of net is protected at v1; --force"):
        remove(store, "net", "stable")
    assert at(store) == "v1"
    remove(store, "net", "stable", force=True)
    assert "stable" not in aliases(store, "net")
    assert not promote(store, "net", "v1").after.protected


def test_publishing_makes_a_removed_latest_again(store: Store) -> None:
    versions(store, 2)
    remove(store, "net", "latest")
    make(store, "net", "content 3")
    found = aliases(store, "net")["latest"]
    assert (found.version, found.gen) == ("v3", 4)


def test_what_an_alias_that_was_removed_pointed_at_can_be_retired(store: Store) -> None:
    versions(store, 3)
    promote(store, "net", "v1")
    assert retire(store, "net", 1) == ["v2"]
    remove(store, "net", "stable")
    assert retire(store, "net", 1) == ["v1"]


def test_a_removal_that_meets_a_promotion_takes_the_alias_away_from_where_it_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(store, 2)
    promote(store, "net", "v1")
    key = alias_key("net", "stable")
    before_first(store, "replace", lambda: promote(store, "net", "v2"), key, monkeypatch)
    remove(store, "net", "stable")
    assert "stable" not in aliases(store, "net")
    state = aliases(store, "net", removed=True)["stable"]
    assert ([old.version for old in state.previous], state.gen) == (["v1", "v2"], 3)
