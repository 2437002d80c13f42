"""Copying versions between stores: what travels, in which order, and what a copy never does to its target."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import (
    AliasError,
    ArtifactNotFoundError,
    IntegrityError,
    PreconditionError,
    StoreUnreachableError,
    TrustError,
)
from birkhoff.pipeline.registry import shipping
from birkhoff.pipeline.registry.aliases import aliases, promote
from birkhoff.pipeline.registry.documents import (
    NameSignature,
    ShardRecord,
    VersionSignatures,
    blob_key,
    shard_key,
    signatures_key,
    version_key,
)
from birkhoff.pipeline.registry.gc import collect, remove_version
from birkhoff.pipeline.registry.labels import change_labels, labels_key, read_labels
from birkhoff.pipeline.registry.names import all_names, bury, check_name, claim_name, make_live, names
from birkhoff.pipeline.registry.shipping import Delivery, Installed, copy, pack
from birkhoff.pipeline.registry.signing import (
    KEPT_NAMES,
    Signer,
    add_signatures,
    audience_of,
    load_public,
    load_signer,
    new_key,
)
from birkhoff.pipeline.registry.trust import Trust, check_version
from birkhoff.pipeline.registry.versions import is_whole, load_version, missing_blobs, publish, resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.publishing import publish_contents

pytestmark = pytest.mark.usefixtures("brief_permits")

NOW = timedelta(0)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Store]:
    """A store with three versions of `net`; v1 and v2 share a blob."""
    with open_store((tmp_path / "source").as_uri()) as opened:
        publish_contents(opened, "net", "a", "b")
        publish_contents(opened, "net", "b", "c")
        publish_contents(opened, "net", "d")
        yield opened


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    new_key(tmp_path / "key")
    return load_signer(tmp_path / "key")


def ship(source: Store, reference: str, target: Store, **delivery: object) -> Installed:
    parcel = pack(source, resolve(source, reference))
    return copy(source, parcel, target, Delivery(**delivery))  # type: ignore[arg-type]


def keys(store: Store, prefix: str = "") -> set[str]:
    return {info.key for info in store.list(prefix)}


def check_whole(store: Store) -> None:
    """Whatever a name or an alias leads to is there."""
    models = {key.split("/")[1] for key in keys(store, "models/")}
    for model in models:
        digests = {record.digest for _, record in all_names(store, model) if record.retired is None}
        digests |= {state.digest for state in aliases(store, model).values()}
        for digest in digests:
            assert is_whole(store, load_version(store, model, digest))


class TestWhatTravels:
    def test_all_that_a_version_is(self, source: Store, store: Store, signer: Signer, tmp_path: Path) -> None:
        signed = publish_contents(source, "net", "d", signer=signer)
        change_labels(source, "net", signed.digest, {"licence": "MIT"})
        source.create(f"models/net/versions/{signed.digest}/plan.json", b"{}")
        done = ship(source, "net", store)
        assert (done.version.name, done.version.digest, done.copied) == ("v3", signed.digest, 1)
        there = keys(store)
        for key in keys(source, f"models/net/versions/{signed.digest}/"):
            assert store.get(key) == source.get(key)
            there.discard(key)
        record = signed.manifest.shards[0]
        assert ShardRecord.model_validate_json(store.get(shard_key(record.key))) == record
        assert there == {
            blob_key(record.blob),
            shard_key(record.key),
            "models/net/names/v3.json",
            "models/net/aliases/latest.json",
        }
        trust = Trust(keys=(load_public(tmp_path / "key.pub"),), audience=audience_of(source))
        check_version(store, resolve(store, "net@v3"), trust)
        with pytest.raises(TrustError, match=r"alias latest of net at gen 1 .* is not signed"):
            check_version(store, resolve(store, "net"), trust)

    def test_signatures_name_the_store_they_were_made_for_until_it_is_signed_there(
        self, source: Store, store: Store, signer: Signer, tmp_path: Path
    ) -> None:
        publish_contents(source, "net", "d", signer=signer)
        assert ship(source, "net", store).signed_for == (audience_of(source),)
        keys = (load_public(tmp_path / "key.pub"),)
        with pytest.raises(TrustError, match=r"signed for file://.*source, not for .* with --signed-for"):
            check_version(store, resolve(store, "net@v3"), Trust(keys=keys))
        assert ship(source, "net", store, signer=signer).signed_for == ()
        assert ship(source, "net", store).signed_for == ()
        for audience in (None, audience_of(source)):
            check_version(store, resolve(store, "net@v3"), Trust(keys=keys, audience=audience))

    def test_signatures_for_the_target_outlive_more_from_elsewhere(
        self, source: Store, store: Store, signer: Signer, tmp_path: Path
    ) -> None:
        version = publish_contents(source, "net", "d", signer=signer)
        ship(source, "net", store, signer=signer)
        foreign = [
            NameSignature(version=f"v{n + 1}", audience="file:///x", signed="t", signature="s") for n in range(200)
        ]
        add_signatures(
            store, "net", version.digest, VersionSignatures(key=signer.public.id, names=tuple(foreign)[:KEPT_NAMES])
        )
        check_version(store, resolve(store, "net@v3"), Trust(keys=(load_public(tmp_path / "key.pub"),)))

    def test_aliases_signed_there(self, source: Store, store: Store, signer: Signer, tmp_path: Path) -> None:
        promote(source, "net", "v1", "stable")
        ship(source, "net@stable", store, signer=signer)
        trust = Trust(keys=(load_public(tmp_path / "key.pub"),))
        for alias in ("stable", "latest"):
            check_version(store, resolve(store, f"net@{alias}"), trust)

    def test_only_what_is_missing(self, source: Store, store: Store) -> None:
        assert ship(source, "net@v1", store).copied == 2
        second = ship(source, "net@v2", store)
        assert (second.copied, second.copied_bytes, second.facts()["blobs"]) == (1, 1, 2)
        before = {info.key: info.tag for info in store.list()}
        assert ship(source, "net@v2", store).copied == 0
        assert {info.key: info.tag for info in store.list()} == before

    def test_labels_are_added_to_those_that_are_there(self, source: Store, store: Store) -> None:
        digest = resolve(source, "net").digest
        change_labels(source, "net", digest, {"licence": "MIT", "set": "a"})
        ship(source, "net", store)
        change_labels(store, "net", digest, {"approved-by": "jo"})
        change_labels(source, "net", digest, {"set": "b"})
        assert ship(source, "net", store).labels == {"approved-by": "jo", "licence": "MIT", "set": "b"}
        assert resolve(store, "net").digest == digest

    def test_what_other_keys_said_there_stays(self, source: Store, store: Store, tmp_path: Path) -> None:
        signers = []
        for name in ("one", "two"):
            new_key(tmp_path / name)
            signers.append(load_signer(tmp_path / name))
        digest = publish_contents(source, "net", "d", signer=signers[0]).digest
        ship(source, "net", store, signer=signers[1])
        ship(source, "net", store)
        for signer in signers:
            assert store.head(signatures_key("net", digest, signer.public.id))

    def test_a_version_without_a_name_does_not(self, source: Store, store: Store) -> None:
        digest = resolve(source, "net@v1").digest
        remove_version(source, "net", "v1")
        with pytest.raises(ArtifactNotFoundError, match="has no name"):
            ship(source, f"net@{digest}", store)

    def test_what_is_not_ours_beside_a_manifest_does_not(self, source: Store, store: Store) -> None:
        digest = resolve(source, "net").digest
        source.create(f"models/net/versions/{digest}/a/b/c.json", b"{}")
        with pytest.raises(IntegrityError, match=r"a/b/c\.json' lies beside a manifest and cannot be copied"):
            ship(source, "net", store)

    def test_more_beside_a_manifest_than_can_be_ours(self, source: Store, store: Store) -> None:
        digest = resolve(source, "net").digest
        source.create(f"models/net/versions/{digest}/big.json", b"x" * (MAX_DOCUMENT_BYTES + 1))
        with pytest.raises(IntegrityError, match="larger than"):
            ship(source, "net", store)


class TestNames:
    def test_each_keeps_its_name_in_whatever_order(self, source: Store, store: Store) -> None:
        for name in ("v2", "v3", "v1"):
            assert ship(source, f"net@{name}", store).version.name == name
        assert [name for name, _ in names(store, "net")] == ["v1", "v2", "v3"]
        assert {name: record.digest for name, record in names(store, "net")} == {
            name: record.digest for name, record in names(source, "net")
        }
        assert resolve(store, "net").name == "v3"  # latest went forward only

    def test_a_name_that_is_another_versions_is_refused_before_anything_travels(
        self, source: Store, store: Store
    ) -> None:
        publish_contents(store, "net", "its own")
        before = keys(store, "blobs/")
        with pytest.raises(PreconditionError, match=r"v1 of net is version \w{12} there, .*--rename"):
            ship(source, "net@v1", store)
        assert keys(store, "blobs/") == before
        done = ship(source, "net@v1", store, rename=True)
        assert (done.version.name, done.facts()["renamed_from"]) == ("v2", "v1")

    def test_a_name_that_was_given_up_there_stays_given_up(self, source: Store, store: Store) -> None:
        ship(source, "net@v1", store)
        ship(source, "net@v2", store)
        remove_version(store, "net", "v1")
        with pytest.raises(PreconditionError, match="v1 of net was retired on"):
            ship(source, "net@v1", store)

    @pytest.mark.parametrize("which", ["itself", "another version"])
    def test_it_stays_given_up_when_its_record_is_gone(self, source: Store, store: Store, which: str) -> None:
        ship(source, "net@v1", store)
        ship(source, "net@v3", store)
        remove_version(store, "net", "v1")
        for _ in range(2):  # the first buries, the second deletes
            collect(store, grace=NOW, delete=True)
        assert [name for name, _ in all_names(store, "net")] == ["v3"]
        digest = resolve(source, "net@v1" if which == "itself" else "net@v2").digest
        before = keys(store, "")
        with pytest.raises(PreconditionError, match=r"v1 of net was given up and collected there.*--rename"):
            check_name(store, "net", "v1", digest)
        with pytest.raises(PreconditionError, match="v1 of net was given up"):
            ship(source, "net@v1", store)
        assert keys(store, "") == before
        assert ship(source, "net@v2", store).version.name == "v2"  # that number was never given here

    def test_a_claim_that_came_to_nothing_gives_its_name_back(self, source: Store, store: Store) -> None:
        ship(source, "net@v3", store)
        claim_name(store, "net", resolve(source, "net@v1").digest, "dies", wanted="v1")
        for _ in range(2):
            collect(store, grace=NOW, delete=True)
        assert ship(source, "net@v1", store).version.name == "v1"

    def test_two_that_bring_the_same_version_both_succeed(self, source: Store, store: Store) -> None:
        found: list[str | None] = []
        threads = [
            threading.Thread(target=lambda: found.append(ship(source, "net@v2", store).version.name)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["v2"] * 4
        check_whole(store)

    def test_publishing_goes_on_above_what_was_brought(self, source: Store, store: Store) -> None:
        ship(source, "net@v3", store)
        assert publish_contents(store, "net", "new").name == "v4"


class TestAliases:
    def test_the_one_that_was_asked_for_travels_and_others_on_demand(self, source: Store, store: Store) -> None:
        promote(source, "net", "v2", "stable", protect=True)
        assert ship(source, "net@stable", store, aliases=("canary",)).aliases == ("stable", "canary")
        found = aliases(store, "net")
        assert {alias: state.version for alias, state in found.items()} == dict.fromkeys(
            ("canary", "latest", "stable"), "v2"
        )
        assert not found["stable"].protected  # whether it is protected is each store's own

    def test_a_protected_one_is_refused_before_anything_travels(self, source: Store, store: Store) -> None:
        ship(source, "net@v1", store, aliases=("stable",))
        promote(store, "net", "v1", "stable", protect=True)
        before = keys(store)
        with pytest.raises(AliasError, match="alias stable of net is protected at v1; --force"):
            ship(source, "net@v2", store, aliases=("stable",))
        assert {key for key in keys(store) if not key.startswith("runs/")} == before
        ship(source, "net@v1", store, aliases=("stable",))  # it is there already
        ship(source, "net@v2", store, aliases=("stable",), force=True)
        assert aliases(store, "net")["stable"].version == "v2"

    def test_what_cannot_be_an_alias(self, source: Store, store: Store) -> None:
        with pytest.raises(AliasError, match="expected 1 to 100 letters"):
            ship(source, "net@v1", store, aliases=("v7",))
        assert keys(store, "blobs/") == set()


class TestDamage:
    def test_a_blob_that_is_wrong_in_the_source_is_named_and_nothing_published(
        self, source: Store, store: Store
    ) -> None:
        record = resolve(source, "net@v1").manifest.shards[1]
        source.put(blob_key(record.blob), b"x")
        with pytest.raises(IntegrityError, match=f"net@v1: blob {record.blob} is damaged in file://.*: 1 bytes"):
            ship(source, "net@v1", store)
        assert keys(store, "models/") == set()

    def test_a_blob_that_is_missing_in_the_source(self, source: Store, store: Store) -> None:
        record = resolve(source, "net@v1").manifest.shards[1]
        source.delete(blob_key(record.blob))
        with pytest.raises(IntegrityError, match=f"net@v1: blob {record.blob} is missing from file://"):
            ship(source, "net@v1", store)
        assert keys(store, "models/") == set()

    def test_a_byte_that_flipped_on_the_way_costs_a_request(
        self, source: Store, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        get, flipped = source.get, set[str]()

        def once(key: str, **span: int) -> bytes:
            body = get(key, **span)
            if key.startswith("blobs/") and key not in flipped:
                flipped.add(key)
                return bytes([body[0] ^ 1]) + body[1:]
            return body

        monkeypatch.setattr(source, "get", once)
        assert ship(source, "net@v1", store).copied == 2
        for record in load_version(store, "net", resolve(store, "net").digest).stored:
            assert hashlib.sha256(store.get(blob_key(record.blob))).hexdigest() == record.blob

    def test_a_cut_blob_of_the_target_is_replaced(self, source: Store, store: Store) -> None:
        record = resolve(source, "net@v1").manifest.shards[0]
        store.put(blob_key(record.blob), b"")
        assert ship(source, "net@v1", store).copied == 2
        assert store.get(blob_key(record.blob)) == b"a"

    def test_shard_records_of_the_target_stay(self, source: Store, store: Store) -> None:
        record = resolve(source, "net@v3").manifest.shards[0]
        other = record.model_copy(update={"blob": "f" * 64}).to_bytes()
        store.create(shard_key(record.key), other)
        ship(source, "net@v3", store)
        assert store.get(shard_key(record.key)) == other


def watch(store: Store, patch: pytest.MonkeyPatch, *, most: int | None = None, late: bool = False) -> list[str]:
    """Keys in the order in which they are written; from write number `most` on, the store is cut off.

    `late`: that write takes effect, and its answer is lost. Leases do not count.
    """
    written: list[str] = []
    lock = threading.Lock()

    def watched(method: Callable[..., object]) -> Callable[..., object]:
        def write(key: str, *arguments: object, **options: object) -> object:
            if key.startswith("runs/"):
                return method(key, *arguments, **options)
            with lock:
                if most is not None and len(written) >= most:
                    if late and len(written) == most:
                        method(key, *arguments, **options)
                        written.append(key)
                    raise StoreUnreachableError("cut off")
                written.append(key)
            return method(key, *arguments, **options)

        return write

    for name in ("put", "create", "replace", "delete"):
        patch.setattr(store, name, watched(getattr(store, name)))
    return written


class TestOrder:
    def test_each_refers_only_to_what_is_there(
        self, source: Store, directory_store: Store, signer: Signer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = publish_contents(source, "net", "d", "e", signer=signer).digest
        change_labels(source, "net", digest, {"licence": "MIT"})
        promote(source, "net", "v4", "stable")
        written = watch(directory_store, monkeypatch)
        ship(source, "net@stable", directory_store)
        order = [
            ("blobs/", 2),
            ("shards/", 2),
            (version_key("net", digest), 1),
            (signatures_key("net", digest, signer.public.id), 1),
            ("models/net/names/v4.json", 1),
            ("models/net/aliases/latest.json", 1),
            (labels_key("net", digest), 1),
            ("models/net/aliases/stable.json", 1),
        ]
        first_seen = list(dict.fromkeys(written))
        for prefix, count in order:
            part, first_seen = first_seen[:count], first_seen[count:]
            assert [key.startswith(prefix) for key in part] == [True] * count, (prefix, part)
        assert first_seen == []

    @pytest.mark.parametrize("late", [False, True], ids=["lost", "answer-lost"])
    def test_a_copy_that_dies_anywhere_leaves_whole_versions_and_goes_on(
        self, source: Store, tmp_path: Path, signer: Signer, late: bool
    ) -> None:
        digest = publish_contents(source, "net", "d", "e", signer=signer).digest
        change_labels(source, "net", digest, {"licence": "MIT"})
        promote(source, "net", "v4", "stable")
        for survived in range(40):
            with open_store((tmp_path / f"target-{survived}").as_uri()) as target:
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        watch(target, patch, most=survived, late=late)
                        ship(source, "net@stable", target)
                except StoreUnreachableError:
                    check_whole(target)
                else:
                    break
                done = ship(source, "net@stable", target)
                assert (done.version.name, done.version.digest) == ("v4", digest)
                assert read_labels(target, "net", digest) == {"licence": "MIT"}
                assert {alias: state.version for alias, state in aliases(target, "net").items()} == {
                    "latest": "v4",
                    "stable": "v4",
                }
                check_whole(target)
        assert survived > 8


class TestCollections:
    def test_no_collection_of_the_target_gets_between(
        self, source: Store, directory_store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without grace: what nobody refers to yet would go at once, and what was found there before, too."""
        store = directory_store
        ship(source, "net@v1", store)
        ship(source, "net@v3", store)
        remove_version(store, "net", "v1")  # the blob that v2 shares is garbage now
        bring = shipping._bring_one

        def slow(*arguments: object) -> int:
            with pytest.raises(Exception, match="open runs"):
                collect(store, grace=NOW, delete=True)
            return bring(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(shipping, "_bring_one", slow)
        assert ship(source, "net@v2", store).copied == 1
        check_whole(store)
        collect(store, grace=NOW, delete=True)
        assert missing_blobs(store, resolve(store, "net@v2").manifest.stored) == []

    def test_labels_go_with_their_version(self, source: Store) -> None:
        digest = resolve(source, "net@v1").digest
        change_labels(source, "net", digest, {"licence": "MIT"})
        remove_version(source, "net", "v1")
        collect(source, grace=NOW, delete=True)
        assert keys(source, f"models/net/versions/{digest}/") == set()
        assert read_labels(source, "net", digest) == {}


def test_publishing_under_a_name_that_is_there_is_no_second_name(source: Store) -> None:
    version = resolve(source, "net@v1")
    again = publish(source, version.manifest, name="v1")
    assert (again.name, [name for name, _ in names(source, "net")]) == ("v1", ["v1", "v2", "v3"])


@pytest.mark.parametrize("buried", [False, True], ids=["claimed", "buried"])
def test_a_name_that_a_dead_copy_had_claimed_is_claimed_again(
    source: Store, directory_store: Store, buried: bool
) -> None:
    version = resolve(source, "net@v2")
    claim = claim_name(directory_store, "net", version.digest, "dead", wanted="v2")
    if buried:
        assert bury(directory_store, "net", "v2", claim.record, claim.tag)
    assert ship(source, "net@v2", directory_store).version.name == "v2"
    check_whole(directory_store)
    assert not make_live(directory_store, "net", claim) or not buried


def test_a_name_that_another_version_has_claimed_is_not(source: Store, directory_store: Store) -> None:
    claim_name(directory_store, "net", resolve(source, "net@v1").digest, "alive", wanted="v2")
    with pytest.raises(PreconditionError, match="v2 of net"):
        ship(source, "net@v2", directory_store)
