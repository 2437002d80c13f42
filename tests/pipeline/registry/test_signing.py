"""Signatures, and what a reader notices without them: forged, moved, replayed and older states of a store."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from birkhoff.codec.errors import BirkhoffError
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.artifact.references import find, recall
from birkhoff.pipeline.documents import read_document
from birkhoff.pipeline.errors import IntegrityError, OutputError, PreconditionError, TrustError, exit_code
from birkhoff.pipeline.registry import names as names_module
from birkhoff.pipeline.registry import versions as publish_module
from birkhoff.pipeline.registry.aliases import aliases, promote, rollback
from birkhoff.pipeline.registry.documents import (
    AliasRecord,
    NameRecord,
    ShardRecord,
    VersionManifest,
    VersionSignatures,
    alias_key,
    blob_key,
    name_key,
    sha256,
    shard_key,
    signatures_key,
    version_key,
)
from birkhoff.pipeline.registry.gc import collect
from birkhoff.pipeline.registry.names import claim_name
from birkhoff.pipeline.registry.signing import Signer, load_public, load_signer, new_key, sign_version, signed_names
from birkhoff.pipeline.registry.trust import Trust, check_version
from birkhoff.pipeline.registry.versions import Version, is_signed, resolve, sign_published
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.publishing import publish_contents


@pytest.fixture
def store(directory_store: Store) -> Store:
    """A directory: what is tested here lies above the stores; `test_on_s3` goes through the other one."""
    return directory_store


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    new_key(tmp_path / "key")
    return load_signer(tmp_path / "key")


@pytest.fixture
def other(tmp_path: Path) -> Signer:
    new_key(tmp_path / "other")
    return load_signer(tmp_path / "other")


def make(store: Store, content: str, signer: Signer | None = None, model: str = "net") -> Version:
    """Publish a version of one shard with these bytes."""
    return publish_contents(store, model, content, signer=signer)


def trusted(store: Store, reference: str, *signers: Signer, accept_older: bool = False) -> str:
    """Digest of what a reader who demands a signature by one of the signers gets."""
    trust = Trust(keys=tuple(signer.public for signer in signers), accept_older=accept_older)
    version = resolve(store, reference)
    check_version(store, version, trust)
    return version.digest


def refused(store: Store, reference: str, match: str, *signers: Signer) -> None:
    with pytest.raises(TrustError, match=match) as caught:
        trusted(store, reference, *signers)
    assert exit_code(caught.value) == 20
    assert len(str(caught.value).splitlines()) == 1


def test_on_s3(s3_store: Store, signer: Signer, other: Signer) -> None:
    first, second = make(s3_store, "one", signer), make(s3_store, "two", signer)
    assert trusted(s3_store, "net", signer) == second.digest
    rollback(s3_store, "net", "latest", signer=signer)
    assert trusted(s3_store, "net", signer) == first.digest
    refused(s3_store, "net", "not signed by key", other)


class TestSignedVersions:
    def test_are_had_by_alias_name_and_digest(self, store: Store, signer: Signer, other: Signer) -> None:
        version = make(store, "one", signer)
        for reference in ("net", "net@latest", "net@v1", f"net@{version.digest}"):
            assert trusted(store, reference, signer) == version.digest
            assert trusted(store, reference, other, signer) == version.digest

    def test_missing(self, store: Store, signer: Signer) -> None:
        make(store, "one")
        refused(
            store,
            "net@v1",
            r"net@v1: not signed by key [0-9a-f]{16}; ask its publisher to sign it with `birk",
            signer,
        )

    def test_wrong_key(self, store: Store, signer: Signer, other: Signer) -> None:
        make(store, "one", other)
        refused(store, "net@v1", f"not signed by key {signer.public.id[:16]}", signer)

    def test_signature_of_another_key_under_this_ones_name(self, store: Store, signer: Signer, other: Signer) -> None:
        version = make(store, "one", other)
        forged = store.get(signatures_key("net", version.digest, other.public.id))
        forged = forged.replace(other.public.id.encode(), signer.public.id.encode())
        store.put(signatures_key("net", version.digest, signer.public.id), forged)
        refused(store, "net@v1", "does not hold for model net and digest", signer)

    def test_signature_of_another_digest(self, store: Store, signer: Signer) -> None:
        signed, plain = make(store, "one", signer), make(store, "two")
        body = store.get(signatures_key("net", signed.digest, signer.public.id))
        store.put(signatures_key("net", plain.digest, signer.public.id), body)
        refused(store, "net@v2", f"does not hold for model net and digest {plain.digest}", signer)

    def test_replay_under_another_model(self, store: Store, signer: Signer) -> None:
        version = make(store, "one", signer)
        for info in list(store.list("models/net/")):
            store.put(info.key.replace("models/net/", "models/other/"), store.get(info.key))
        with pytest.raises(IntegrityError, match="a version of model 'net', not of 'other': misplaced"):
            resolve(store, "other@v1")
        record = read_document(
            VersionSignatures, "s", store.get(signatures_key("net", version.digest, signer.public.id))
        )
        assert signed_names(signer.public, "net", version.digest, record) == ["v1"]
        assert signed_names(signer.public, "other", version.digest, record) == []

    def test_replay_under_another_name(self, store: Store, signer: Signer) -> None:
        first, _ = make(store, "one", signer), make(store, "two", signer)
        record = NameRecord(digest=first.digest, created="x", publisher="mallory")
        store.put(name_key("net", "v2"), record.to_bytes())
        refused(store, "net@v2", "is signed as v1, not as v2: a name moved or replayed", signer)

    def test_content_that_comes_back_is_signed_under_both_names(self, store: Store, signer: Signer) -> None:
        first = make(store, "one", signer)
        make(store, "two", signer)
        again = make(store, "one", signer)
        assert again.name == "v3"
        assert trusted(store, "net@v1", signer) == trusted(store, "net@v3", signer) == first.digest

    def test_content_that_comes_back_says_under_which_name_it_was_there(self, store: Store) -> None:
        assert [make(store, content).same_as for content in ("one", "one", "two", "one", "two", "two")] == [
            None,
            None,
            None,
            "v1",
            "v2",
            None,
        ]

    def test_what_is_published_is_signed_in_place(self, store: Store, signer: Signer, other: Signer) -> None:
        first, second = make(store, "one"), make(store, "two")
        promote(store, "net", "v1", protect=True)
        before = {info.key: store.get(info.key) for info in store.list("models/")}
        assert sign_published(store, "net@v1", signer).digest == first.digest
        assert trusted(store, "net@v1", signer) == first.digest
        refused(store, "net@stable", "alias stable .* is not signed, .* `birkhoff sign net@stable`", signer)
        for _ in range(2):
            assert sign_published(store, "net@stable", signer).alias == "stable"
        assert trusted(store, "net@stable", signer) == first.digest
        sign_published(store, "net", signer)
        assert trusted(store, "net", signer) == second.digest
        after = {info.key: store.get(info.key) for info in store.list("models/")}
        new = {key for key, body in after.items() if before.get(key) != body}
        assert new == {
            *(signatures_key("net", digest, signer.public.id) for digest in (first.digest, second.digest)),
            *(alias_key("net", alias) for alias in ("stable", "latest")),
        }
        states = {alias: record.model_dump(exclude={"signature"}) for alias, record in aliases(store, "net").items()}
        assert states == {
            alias: read_document(AliasRecord, alias, before[alias_key("net", alias)]).model_dump(exclude={"signature"})
            for alias in states
        }
        sign_published(store, "net@stable", other)
        assert trusted(store, "net@stable", other) == first.digest

    def test_a_digest_is_signed_under_each_of_its_names(self, store: Store, signer: Signer) -> None:
        first, _ = make(store, "one"), make(store, "two")
        make(store, "one")
        sign_published(store, f"net@{first.digest}", signer)
        assert trusted(store, "net@v1", signer) == trusted(store, "net@v3", signer) == first.digest

    def test_an_alias_that_moves_while_it_is_signed(
        self, store: Store, signer: Signer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(store, "one")
        usual = publish_module.sign_version
        monkeypatch.setattr(publish_module, "sign_version", lambda *given: (usual(*given), make(store, "two")))
        with pytest.raises(PreconditionError, match="alias latest of net moved to v2 meanwhile"):
            sign_published(store, "net", signer)

    def test_two_keys_sign_one_version(self, store: Store, signer: Signer, other: Signer) -> None:
        make(store, "one", signer)
        make(store, "one", other)
        assert trusted(store, "net@v1", signer) == trusted(store, "net@v1", other)
        refused(store, "net", f"alias latest .* is signed by {other.public.id[:16]}, expected", signer)

    def test_an_unsigned_version_is_signed_by_publishing_it_again(self, store: Store, signer: Signer) -> None:
        make(store, "one")
        assert not is_signed(store, resolve(store, "net"), signer)
        make(store, "one", signer)
        assert is_signed(store, resolve(store, "net"), signer)
        before = store.get(alias_key("net", "latest"))
        make(store, "one", signer)
        assert store.get(alias_key("net", "latest")) == before
        assert [name for name, _ in names_module.names(store, "net")] == ["v1"]

    def test_damage(self, store: Store, signer: Signer) -> None:
        version = make(store, "one", signer)
        store.put(signatures_key("net", version.digest, signer.public.id), b'{"key": 3}')
        with pytest.raises(IntegrityError, match="not a VersionSignatures"):
            trusted(store, "net@v1", signer)

    def test_does_not_change_the_version(self, store: Store, signer: Signer) -> None:
        plain, signed = make(store, "one"), make(store, "one", signer)
        assert (signed.digest, signed.stored_bytes) == (plain.digest, plain.stored_bytes)


class TestOrder:
    def test_the_signature_is_there_before_the_name_and_the_name_before_the_alias(
        self, directory_store: Store, signer: Signer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[str] = []
        for method in ("create", "replace"):
            original = getattr(directory_store, method)

            def call(key: str, body: bytes, _original: object = original, **options: str) -> str:
                written.append(key)
                return _original(key, body, **options)  # type: ignore[operator]

            monkeypatch.setattr(directory_store, method, call)
        make(directory_store, "one", signer)
        steps = ("/manifest.json", "/signatures/", "/names/", "/aliases/")
        places = [next(n for n, key in enumerate(written) if step in key) for step in steps]
        assert places == sorted(places)

    def test_a_lost_name_is_withdrawn(self, store: Store, signer: Signer) -> None:
        first = make(store, "one", signer)
        rival = NameRecord(digest=first.digest, created="x", publisher="rival")

        def announce(name: str, lost: str | None) -> None:
            sign_version(store, signer, "net", name, sha256(b"d"), withdraw=lost)
            if name == "v2":
                store.create(name_key("net", "v2"), rival.to_bytes())

        assert claim_name(store, "net", sha256(b"d"), "me", announce=announce).name == "v3"
        body = store.get(signatures_key("net", sha256(b"d"), signer.public.id))
        record = read_document(VersionSignatures, "s", body)
        assert signed_names(signer.public, "net", sha256(b"d"), record) == ["v3"]


class TestSignedAliases:
    @pytest.fixture
    def two(self, store: Store, signer: Signer) -> tuple[Version, Version]:
        first, second = make(store, "one", signer), make(store, "two", signer)
        promote(store, "net", "v1", signer=signer)
        promote(store, "net", "v2", signer=signer)
        return first, second

    def test_promote_and_rollback_are_signed(self, store: Store, signer: Signer, two: tuple[Version, Version]) -> None:
        assert trusted(store, "net@stable", signer) == two[1].digest
        rollback(store, "net", signer=signer)
        assert trusted(store, "net@stable", signer) == two[0].digest
        assert aliases(store, "net")["stable"].gen == 3

    def test_an_unsigned_move(self, store: Store, signer: Signer, two: tuple[Version, Version]) -> None:
        rollback(store, "net")
        refused(
            store,
            "net@stable",
            r"alias stable of net at gen 3 \(v1\) is not signed, expected .*signs it with `birk",
            signer,
        )
        promote(store, "net", "v1", signer=signer)  # signs what is there
        assert trusted(store, "net@stable", signer) == two[0].digest

    @pytest.mark.parametrize("field", ["version and digest", "gen", "back", "moved"])
    def test_a_forged_state(self, store: Store, signer: Signer, two: tuple[Version, Version], field: str) -> None:
        record = aliases(store, "net")["stable"]
        forged: dict[str, object] = {
            "version and digest": {"version": "v1", "digest": two[0].digest},
            "gen": {"gen": 99},
            "back": {"back": True},
            "moved": {"moved": "2030-01-01T00:00:00+00:00"},
        }[field]
        store.put(alias_key("net", "stable"), record.model_copy(update=forged).to_bytes())
        refused(store, "net@stable", "signature by [0-9a-f]{16} that does not hold", signer)

    def test_one_alias_put_in_the_place_of_another(
        self, store: Store, signer: Signer, two: tuple[Version, Version]
    ) -> None:
        promote(store, "net", "v1", "canary", signer=signer)
        store.put(alias_key("net", "stable"), store.get(alias_key("net", "canary")))
        refused(store, "net@stable", "does not hold", signer)

    def test_history_keeps_no_signatures_and_a_rollback_follows_it(
        self, store: Store, two: tuple[Version, Version]
    ) -> None:
        body = json.loads(store.get(alias_key("net", "stable")))
        assert "signature" in body
        assert all("signature" not in state for state in body["previous"])


class TestGenerations:
    """`gen` never goes back unless somebody moves the alias: what a reader has seen, it remembers."""

    def test_an_older_state_is_noticed_with_and_without_signatures(self, store: Store, signer: Signer) -> None:
        make(store, "one", signer)
        old = store.get(alias_key("net", "latest"))
        second = make(store, "two", signer)
        assert trusted(store, "net") == second.digest
        store.put(alias_key("net", "latest"), old)
        where = r"alias latest of net is at gen 1 \(v1, [0-9a-f]{12}\), and this machine has seen gen 2 .*put back"
        refused(store, "net", where)
        refused(store, "net", where, signer)
        with pytest.raises(TrustError, match="accept it with --accept-older, or delete"):
            trusted(store, "net")

    def test_accepted_once_it_is_what_was_seen(self, store: Store) -> None:
        first = make(store, "one")
        old = store.get(alias_key("net", "latest"))
        make(store, "two")
        trusted(store, "net")
        store.put(alias_key("net", "latest"), old)
        assert trusted(store, "net", accept_older=True) == first.digest
        assert trusted(store, "net") == first.digest

    def test_two_states_of_one_generation(self, store: Store) -> None:
        first = make(store, "one")
        make(store, "two")
        trusted(store, "net")
        record = aliases(store, "net")["latest"]
        store.put(alias_key("net", "latest"), record.model_copy(update={"digest": first.digest}).to_bytes())
        refused(store, "net", "is at gen 2 .*has seen gen 2")

    def test_a_rollback_is_a_step_forward(self, store: Store) -> None:
        first, _ = make(store, "one"), make(store, "two")
        trusted(store, "net")
        rollback(store, "net", "latest")
        assert trusted(store, "net") == first.digest

    def test_stores_models_and_aliases_are_told_apart(self, store: Store, tmp_path: Path) -> None:
        for content in ("one", "two", "three"):
            make(store, content)
        trusted(store, "net")
        promote(store, "net", "v1")
        assert trusted(store, "net@stable")
        make(store, "one", model="other")
        assert trusted(store, "other")
        with open_store((tmp_path / "elsewhere").as_uri()) as elsewhere:
            make(elsewhere, "one")
            assert trusted(elsewhere, "net")

    def test_names_and_digests_are_read_whatever_was_seen(self, store: Store) -> None:
        first = make(store, "one")
        old = store.get(alias_key("net", "latest"))
        make(store, "two")
        trusted(store, "net")
        store.put(alias_key("net", "latest"), old)
        assert trusted(store, "net@v1") == trusted(store, f"net@{first.digest}") == first.digest

    def test_a_memory_that_cannot_be_kept_is_said(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "file"))
        make(store, "one")
        assert trusted(store, "net")
        assert "a later step back of alias latest of net will go unnoticed" in caplog.text


class TestPulled:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> BlobCache:
        return BlobCache(tmp_path / "cache")

    def test_a_folder_carries_the_signatures_that_were_asked_for(
        self, store: Store, signer: Signer, other: Signer, cache: BlobCache, tmp_path: Path
    ) -> None:
        make(store, "one", signer)
        trust = Trust(keys=(signer.public,))
        pull(find(store, "net", cache, trust), store, tmp_path / "signed", cache)
        pull(find(store, "net", cache, Trust()), store, tmp_path / "plain", cache)
        with open_artifact(tmp_path / "signed", trust=trust) as artifact:
            assert artifact.manifest.model == "net"
        for folder, key in (("signed", other), ("plain", signer)):
            with (
                pytest.raises(TrustError, match=rf"{folder}: net@v1: not signed by key {key.public.id[:16]}"),
                open_artifact(tmp_path / folder, trust=Trust(keys=(key.public,))),
            ):
                pass

    def test_a_folder_of_other_bytes(self, store: Store, signer: Signer, cache: BlobCache, tmp_path: Path) -> None:
        make(store, "one", signer)
        plain = make(store, "two")
        trust = Trust(keys=(signer.public,))
        pull(find(store, "net@v1", cache, trust), store, tmp_path / "net", cache)
        pointer = json.loads((tmp_path / "net/version.json").read_text())
        (tmp_path / "net/manifest.json").write_bytes(plain.manifest.to_bytes())
        with pytest.raises(IntegrityError, match="does not match its digest"), open_artifact(tmp_path / "net"):
            pass
        (tmp_path / "net/version.json").write_text(json.dumps({**pointer, "digest": plain.digest}))
        with pytest.raises(TrustError, match="does not hold"), open_artifact(tmp_path / "net", trust=trust):
            pass

    def test_offline(self, store: Store, signer: Signer, cache: BlobCache) -> None:
        make(store, "one", signer)
        trust = Trust(keys=(signer.public,))
        find(store, "net", cache, Trust())
        with pytest.raises(TrustError, match="not signed by"):
            recall(store.url, "net", cache, trust)
        find(store, "net", cache, trust)
        assert recall(store.url, "net", cache, trust).name == "v1"


class TestChain:
    def test_source_to_shards_to_manifest_to_alias(self, store: Store, signer: Signer) -> None:
        """Every link names the digest of the next, and a change of any byte on the way breaks one."""
        version = make(store, "one", signer)
        links = _chain(store, signer)
        assert links["blob"] == b"one"
        for key in (
            blob_key(sha256(b"one")),
            version_key("net", version.digest),
            signatures_key("net", version.digest, signer.public.id),
        ):
            whole = store.get(key)
            for place in range(0, len(whole), max(1, len(whole) // 20)):
                store.put(key, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
                with pytest.raises((BirkhoffError, AssertionError)):
                    _chain(store, signer)
            store.put(key, whole)
        assert _chain(store, signer) == links


def _chain(store: Store, signer: Signer) -> dict[str, bytes]:
    """Walk from an alias to the bytes with plain hashes; AssertionError where a link does not hold."""
    trusted(store, "net", signer)
    alias = read_document(AliasRecord, "alias", store.get(alias_key("net", "latest")))
    name = read_document(NameRecord, "name", store.get(name_key("net", alias.version)))
    assert name.digest == alias.digest
    body = store.get(version_key("net", alias.digest))
    assert sha256(body) == alias.digest
    manifest = read_document(VersionManifest, "manifest", body)
    (shard,) = manifest.shards
    record = read_document(ShardRecord, "shard", store.get(shard_key(shard.key)))
    assert record == shard
    blob = store.get(blob_key(shard.blob))
    assert sha256(blob) == shard.blob
    assert manifest.source.sha256 == sha256(b"one")
    return {"manifest": body, "blob": blob}


class TestCollection:
    def test_signatures_stay_and_go_with_their_version(self, directory_store: Store, signer: Signer) -> None:
        for content in ("one", "two", "three"):
            make(directory_store, content, signer)
        collect(directory_store, keep=2, grace=timedelta(0), delete=True)
        collect(directory_store, grace=timedelta(0), delete=True)
        left = [info.key for info in directory_store.list("models/net/versions/")]
        assert len(left) == 4
        assert sum("/signatures/" in key for key in left) == 2
        assert trusted(directory_store, "net@v2", signer)

    def test_a_young_signature_of_an_old_version_does_not_hold_it(self, directory_store: Store, signer: Signer) -> None:
        old = make(directory_store, "one", signer)
        for key in (version_key("net", old.digest), name_key("net", "v1"), alias_key("net", "latest")):
            directory_store.delete(key)
        found = collect(directory_store, grace=timedelta(days=7), delete=True)
        assert [item.info.key for item in found.garbage if item.kind == "version"] == [
            signatures_key("net", old.digest, signer.public.id)
        ]


class TestKeyFiles:
    def test_modes_and_representation(self, tmp_path: Path) -> None:
        public = new_key(tmp_path / "k")
        assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "k.pub").stat().st_mode & 0o777 == 0o644
        signer = load_signer(tmp_path / "k")
        assert signer.public.id == public.id == load_public(tmp_path / "k.pub").id
        assert "PRIVATE" not in repr(signer)
        assert "_key" not in repr(signer)

    @pytest.mark.parametrize("taken", ["k", "k.pub"])
    def test_nothing_is_overwritten(self, tmp_path: Path, taken: str) -> None:
        (tmp_path / taken).write_text("mine")
        with pytest.raises(OutputError, match="File exists; name a new file"):
            new_key(tmp_path / "k")
        assert [path.name for path in tmp_path.iterdir()] == [taken]
        assert (tmp_path / taken).read_text() == "mine"

    def test_a_private_key_that_others_can_read(self, tmp_path: Path) -> None:
        new_key(tmp_path / "k")
        (tmp_path / "k").chmod(0o640)
        with pytest.raises(TrustError, match=r"others can read this signing key \(mode 640\); chmod 600"):
            load_signer(tmp_path / "k")

    def test_wrong_files(self, tmp_path: Path) -> None:
        new_key(tmp_path / "k")
        key = load_signer(tmp_path / "k").key
        encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        curve = generate_private_key(SECP256R1())
        for body in (
            b"",
            b"nonsense",
            encrypted,
            curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        ):
            (tmp_path / "bad").write_bytes(body)
            (tmp_path / "bad").chmod(0o600)
            with pytest.raises(TrustError, match="expected an unencrypted Ed25519 private key"):
                load_signer(tmp_path / "bad")
        other = curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for body in (b"", b"-----BEGIN", other):
            (tmp_path / "bad").write_bytes(body)
            with pytest.raises(TrustError, match="expected an Ed25519 public key"):
                load_public(tmp_path / "bad")
        with pytest.raises(TrustError, match=r"that of a private key lies beside it as k\.pub"):
            load_public(tmp_path / "k")
        with pytest.raises(TrustError, match="No such file or directory; name a key file"):
            load_public(tmp_path / "missing")
        (tmp_path / "bad").write_bytes(bytes(5000))
        with pytest.raises(TrustError, match="larger than 4096 bytes: not a key"):
            load_public(tmp_path / "bad")
