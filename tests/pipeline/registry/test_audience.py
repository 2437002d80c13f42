"""Signatures name the store they were made for, vouch for every byte, and what was seen of an alias is not lost."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import birkhoff
from birkhoff.codec.container import serialise
from birkhoff.codec.profiles import PROFILES, Header
from birkhoff.codec.tensor import encode_tensor
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.artifact.pull import pull
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.artifact.references import find
from birkhoff.pipeline.errors import TrustError
from birkhoff.pipeline.paths import cache_folder
from birkhoff.pipeline.registry.aliases import promote
from birkhoff.pipeline.registry.documents import (
    AliasRecord,
    NameSignature,
    ShardRecord,
    VersionSignatures,
    alias_key,
    blob_key,
    fetch_document,
    sha256,
    shard_key,
    signatures_key,
)
from birkhoff.pipeline.registry.signing import Signer, audience_of, load_signer, new_key
from birkhoff.pipeline.registry.trust import Trust, check_version
from birkhoff.pipeline.registry.versions import is_signed, resolve, sign_published
from birkhoff.pipeline.shard.run import input_key
from birkhoff.pipeline.store.base import Store, store_folder
from birkhoff.pipeline.store.open import open_store
from tests.pipeline.command import captured
from tests.pipeline.publishing import publish_contents


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    new_key(tmp_path / "key")
    return load_signer(tmp_path / "key")


@pytest.fixture
def staging(tmp_path: Path, signer: Signer) -> Store:
    store = open_store((tmp_path / "staging").as_uri())
    for content in ("one", "two", "three"):
        version = publish_contents(store, "net", content, signer=signer)
        promote(store, "net", str(version.name), signer=signer)
    return store


@pytest.fixture
def production(tmp_path: Path, signer: Signer) -> Store:
    store = open_store((tmp_path / "production").as_uri())
    version = publish_contents(store, "net", "real", signer=signer)
    promote(store, "net", str(version.name), signer=signer)
    return store


def read(store: Store, reference: str, signer: Signer, audience: str | None = None) -> str:
    version = resolve(store, reference)
    check_version(store, version, Trust(keys=(signer.public,), audience=audience))
    return version.digest


def copy(source: Store, target: Store) -> None:
    folders = store_folder(source.url), store_folder(target.url)
    assert folders[0] is not None
    assert folders[1] is not None
    for part in ("models", "blobs"):
        shutil.copytree(folders[0] / part, folders[1] / part, dirs_exist_ok=True)


class TestAudience:
    @pytest.mark.parametrize("reference", ["net", "net@stable", "net@v2", "DIGEST"])
    def test_one_store_over_another(self, staging: Store, production: Store, signer: Signer, reference: str) -> None:
        assert read(production, "net@stable", signer)
        if reference == "DIGEST":
            reference = f"net@{resolve(staging, 'net').digest}"
        copy(staging, production)
        with pytest.raises(TrustError, match=f"signed for {staging.url}, not for {production.url}"):
            read(production, reference, signer)
        assert read(staging, reference, signer)

    def test_a_copied_alias_over_a_version_of_this_store(
        self, staging: Store, production: Store, signer: Signer
    ) -> None:
        """The very version, signed here too: the alias's state is another store's all the same."""
        publish_contents(production, "net", "three", signer=signer)
        record = fetch_document(staging, AliasRecord, alias_key("net", "stable"))
        production.put(alias_key("net", "stable"), record.model_copy(update={"version": "v2"}).to_bytes())
        with pytest.raises(TrustError, match=f"alias stable of net .* is signed for {staging.url}, not for"):
            read(production, "net@stable", signer)

    def test_a_mirror_is_read_by_the_name_of_its_source(self, staging: Store, signer: Signer, tmp_path: Path) -> None:
        with open_store((tmp_path / "mirror").as_uri()) as mirror:
            mirror.put("models/x", b"")
            copy(staging, mirror)
            with pytest.raises(TrustError, match="if this is its mirror, name the store it was signed for"):
                read(mirror, "net", signer)
            assert read(mirror, "net", signer, audience=staging.url) == resolve(staging, "net").digest
            with pytest.raises(TrustError, match="not for elsewhere"):
                read(mirror, "net", signer, audience="elsewhere")

    def test_a_version_may_be_signed_for_several(self, staging: Store, production: Store, signer: Signer) -> None:
        """Signing a copied version where it is adds to what the other store's signature says."""
        copy(staging, production)
        sign_published(production, "net@v3", signer)
        assert read(production, "net@v3", signer) == read(production, "net@v3", signer, audience=staging.url)

    def test_what_was_signed_without_a_store_is_signed_again(self, staging: Store, signer: Signer) -> None:
        """Signatures from before there were audiences: refused with the remedy, which works."""
        digest = resolve(staging, "net").digest
        key = signatures_key("net", digest, signer.public.id)
        (held,) = fetch_document(staging, VersionSignatures, key).names
        facts = {"model": "net", "version": "v3", "digest": digest, "signed": held.signed}
        body = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        signature = signer.sign(f"birkhoff version signature 1\n{body}".encode())
        old = NameSignature(version="v3", signed=held.signed, signature=signature)
        staging.put(key, VersionSignatures(key=signer.public.id, names=(old,)).to_bytes())
        record = fetch_document(staging, AliasRecord, alias_key("net", "latest"))
        assert record.signature is not None
        unbound = record.signature.model_copy(update={"audience": None})
        staging.put(alias_key("net", "latest"), record.model_copy(update={"signature": unbound}).to_bytes())
        with pytest.raises(TrustError, match=r"signed before signatures named their store.*sign it again"):
            read(staging, "net", signer)
        assert not is_signed(staging, resolve(staging, "net"), signer)
        sign_published(staging, "net", signer)
        assert read(staging, "net", signer) == digest
        assert [entry.audience for entry in fetch_document(staging, VersionSignatures, key).names] == [staging.url]

    def test_an_audience_that_was_changed_by_hand(self, staging: Store, production: Store, signer: Signer) -> None:
        copy(staging, production)
        digest = resolve(production, "net@v3").digest
        key = signatures_key("net", digest, signer.public.id)
        (held,) = fetch_document(production, VersionSignatures, key).names
        forged = held.model_copy(update={"audience": production.url})
        production.put(key, VersionSignatures(key=signer.public.id, names=(forged,)).to_bytes())
        with pytest.raises(TrustError, match="does not hold"):
            read(production, "net@v3", signer)

    def test_buckets_of_one_name_in_two_services(self, s3_store: Store) -> None:
        assert audience_of(s3_store) == f"{s3_store.url} at {s3_store.address.settings.endpoint}"

    def test_a_pulled_folder_was_checked_when_it_was_pulled(
        self, staging: Store, signer: Signer, tmp_path: Path
    ) -> None:
        cache, trust = BlobCache(tmp_path / "cache"), Trust(keys=(signer.public,))
        pull(find(staging, "net", cache, trust), staging, tmp_path / "folder", cache)
        with open_artifact(tmp_path / "folder", trust=trust):
            pass
        with (
            pytest.raises(TrustError, match="not for elsewhere"),
            open_artifact(tmp_path / "folder", trust=Trust(keys=(signer.public,), audience="elsewhere")),
        ):
            pass


class TestMemory:
    """What a reader has seen of an alias survives full and read-only disks; what cannot be told is refused."""

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))

    def notes(self) -> list[Path]:
        return sorted((cache_folder() / "seen").glob("*.json"))

    def test_it_survives_a_full_disk(self, staging: Store, signer: Signer) -> None:
        old = staging.get(alias_key("net", "stable"))
        read(staging, "net@stable", signer)
        (note,) = self.notes()
        before = note.read_bytes()
        promote(staging, "net", "v1", signer=signer)
        resource_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource_limit[1]))  # every write fails, as on a full disk
        try:
            with pytest.raises(TrustError, match="File too large, so a later step back of alias stable"):
                read(staging, "net@stable", signer)
            assert resolve(staging, "net@stable")
            check_version(staging, resolve(staging, "net@stable"), Trust())  # a warning, where nothing is demanded
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, resource_limit)
            signal.signal(signal.SIGXFSZ, handler)
        assert note.read_bytes() == before
        assert [path.name for path in note.parent.iterdir() if path.name.startswith(".part-")] == []
        read(staging, "net@stable", signer)
        staging.put(alias_key("net", "stable"), old)
        with pytest.raises(TrustError, match="an older state was put back"):
            read(staging, "net@stable", signer)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"gen": "x", "digest": 1}', b"\xff"])
    def test_a_note_that_says_nothing_is_not_a_new_one(self, staging: Store, signer: Signer, body: bytes) -> None:
        read(staging, "net@stable", signer)
        (note,) = self.notes()
        note.write_bytes(body)
        for trust in (Trust(), Trust(keys=(signer.public,))):
            with pytest.raises(TrustError, match=r"cannot be read .* may have gone back; accept .* or delete"):
                check_version(staging, resolve(staging, "net@stable"), trust)
        check_version(staging, resolve(staging, "net@stable"), Trust(accept_older=True))
        assert read(staging, "net@stable", signer)

    def test_where_nothing_can_be_kept_a_demanded_signature_does_not_do(
        self, staging: Store, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "file"))
        with pytest.raises(TrustError, match="point BIRKHOFF_HOME at a folder that can be written"):
            read(staging, "net@stable", signer)
        version = resolve(staging, "net@stable")
        check_version(staging, version, Trust(keys=(signer.public,), accept_older=True))
        check_version(staging, resolve(staging, "net@v1"), Trust(keys=(signer.public,)))


class TestPlantedShards:
    """Whoever writes to a store without a key puts a shard record that leads to other weights before the run."""

    @pytest.fixture
    def honest(self, tmp_path: Path) -> torch.Tensor:
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        save_file({"w.weight": weight}, tmp_path / "m.safetensors")
        (tmp_path / "m.yaml").write_text("allocation: header\nmodels:\n- {name: m, source: m.safetensors}\n")
        return weight

    def plant(self, store: Store, honest: torch.Tensor, evil: torch.Tensor, **lies: object) -> str:
        header = Header("w.weight", tuple(honest.shape), "float32")
        profile = replace(PROFILES["balanced"], allocation="header").of_model([header])
        decision = profile.decide(tuple(honest.shape), "float32")
        key = input_key({"w.weight": honest}, profile.recipe(), {"w.weight": decision})
        blob = serialise([encode_tensor("w.weight", evil, decision).tensor])
        record = ShardRecord(
            key=key, blob=sha256(blob), bytes=len(blob), source_bytes=honest.nbytes, tensors=1, sqnr_db=(30.0,),
            probe_db=(30.0,), probe_error=0.0,
        ).model_copy(update=lies)  # fmt: skip
        store.put(blob_key(sha256(blob)), blob)
        store.put(shard_key(key), record.to_bytes())
        return record.blob

    @pytest.fixture
    def compress(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logged: None
    ) -> Callable[..., str]:
        """Runs `compress --sign`, which must succeed; gives what it wrote on standard error."""
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)

        def run(store: Store) -> str:
            words = ("compress", "m.yaml", "--executor", "inline", "--store", store.url)
            code, _, err = captured(capsys, *words, "--sign", str(tmp_path / "key"))
            assert code == 0, err
            return err

        return run

    def test_a_signed_version_holds_the_publishers_weights(
        self, honest: torch.Tensor, signer: Signer, tmp_path: Path, compress: Callable[..., str]
    ) -> None:
        with open_store((tmp_path / "store").as_uri()) as store:
            planted = self.plant(store, honest, torch.linspace(-1, 1, 4096).reshape(64, 64))
            said = compress(store)
            assert "the stored shard" in said
            assert "is encoded again" in said
            (shard,) = resolve(store, "m").manifest.shards
            assert shard.blob != planted
            found = birkhoff.load_state_dict("m", store.url, require_signature=[tmp_path / "key.pub"])["w.weight"]
        assert (found - honest).norm() / honest.norm() < 0.05

    def test_nor_does_it_hold_what_a_record_claims(
        self, honest: torch.Tensor, signer: Signer, tmp_path: Path, compress: Callable[..., str]
    ) -> None:
        """The honest bytes beside forged figures: those of the version are measured again."""
        with open_store((tmp_path / "store").as_uri()) as store:
            planted = self.plant(store, honest, honest, sqnr_db=(99.0,), source_bytes=7)
            compress(store)
            (shard,) = resolve(store, "m").manifest.shards
            assert (shard.blob, shard.source_bytes) == (planted, honest.nbytes)
            assert 29 < shard.sqnr_db[0] < 40

    def test_what_is_signed_already_is_left_alone(
        self, honest: torch.Tensor, signer: Signer, tmp_path: Path, compress: Callable[..., str]
    ) -> None:
        with open_store((tmp_path / "store").as_uri()) as store:
            compress(store)
            assert "nothing to do" in compress(store)
            assert resolve(store, "m").name == "v1"
