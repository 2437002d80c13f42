"""`birkhoff.pull`, `push`, `list` and `open_store`: what the commands do, with types."""

import inspect
import json
from pathlib import Path

import pytest
import torch

import birkhoff
from birkhoff.codec.errors import BirkhoffWarning
from birkhoff.pipeline.errors import ArtifactNotFoundError, PreconditionError, StoreError, TrustError
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from birkhoff.pipeline.store.memory import MemoryStore
from tests.pipeline.command import captured, execute
from tests.pipeline.publishing import publish_tensors


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory_store: Store) -> Store:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", directory_store.url)
    torch.manual_seed(0)
    publish_tensors(directory_store, "net", {"w": torch.randn(64, 64), "v": torch.randn(8)})
    publish_tensors(directory_store, "other", {"w": torch.randn(32, 64)})
    return directory_store


def test_list_is_what_the_command_shows(published: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("net",)):
        _, text, _ = captured(capsys, "list", *words, "--json")
        assert [version.row() for version in birkhoff.list(*words)] == json.loads(text)
    (net, other) = birkhoff.list(store=published)
    assert (net.reference, net.aliases, net.missing_blobs) == ("net@v1", ("latest",), 0)
    with pytest.raises(ArtifactNotFoundError, match="did you mean 'other'"):
        birkhoff.list("othr")
    assert other.manifest is not None
    assert other.digest == other.manifest.digest


def test_pull_is_what_the_command_does(published: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = birkhoff.pull("net@latest", tmp_path / "here")
    _, text, _ = captured(capsys, "pull", "net", "-o", str(tmp_path / "there"), "--json")
    facts = json.loads(text)
    assert {**done.facts(), "output": 0} == {**facts, "output": 0, "fetched_bytes": done.fetched_bytes}
    assert done.fetched_bytes > 0 == facts["fetched_bytes"]  # the second found all of it in the cache
    names = {path.name for path in done.folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "there").iterdir()}
    again = birkhoff.pull("net", tmp_path / "offline", offline=True)
    assert (again.fetched_bytes, again.missing_blobs) == (0, None)
    with pytest.raises(ArtifactNotFoundError, match="pull it once without"):
        birkhoff.pull("other", tmp_path / "other", offline=True)


def test_blobs_that_the_store_lacks_are_warned_of(published: Store, tmp_path: Path) -> None:
    birkhoff.pull("net", tmp_path / "first")
    (shard,) = resolve(published, "net").manifest.shards
    published.delete(blob_key(shard.blob))
    with pytest.warns(BirkhoffWarning, match="1 of its 1 blobs are missing"):
        done = birkhoff.pull("net", tmp_path / "second")
    assert (done.missing_blobs, done.missing_bytes) == (1, shard.bytes)


def test_push_is_copy_with_types(published: Store, tmp_path: Path) -> None:
    with MemoryStore() as target:
        done = birkhoff.push("net@latest", target, aliases=["stable"])
        assert (done.copied, done.aliases, done.version.reference) == (1, ("stable",), "net@v1")
        assert birkhoff.push("net", target).copied == 0
        assert done.version.digest == resolve(published, "net").digest
        (listed,) = birkhoff.list(store=target)
        assert listed.aliases == ("latest", "stable")
        publish_tensors(target, "other", {"w": torch.zeros(64, 64)})
        with pytest.raises(PreconditionError):
            birkhoff.push("other", target)
        assert birkhoff.push("other", target, rename=True).version.name == "v2"
    with pytest.raises(StoreError, match="the store it comes from"):
        birkhoff.push("net", published.url)
    made = birkhoff.push("net", (tmp_path / "new").as_uri())
    assert made.copied == 1
    assert "net@v1" in made._repr_html_()


def test_signatures_are_asked_for(published: Store, tmp_path: Path) -> None:
    key = tmp_path / "release.key"
    assert execute("key", "new", str(key)) == 0
    with pytest.raises(TrustError):
        birkhoff.pull("net", tmp_path / "unsigned", require_signature=[f"{key}.pub"])
    with MemoryStore() as target:
        birkhoff.push("net", target, sign=key)
        birkhoff.pull("net", tmp_path / "signed", store=target, require_signature=[f"{key}.pub"])
        with pytest.raises(TrustError):
            birkhoff.push("net", target, require_signature=[f"{key}.pub"], store=published)


def test_a_store_is_closed_by_who_opened_it(published: Store, tmp_path: Path) -> None:
    with birkhoff.open_store(published.url) as store:
        assert birkhoff.list(store=store)[0].reference == "net@v1"
        birkhoff.pull("net", tmp_path / "a", store=store)
        assert set(birkhoff.load_state_dict("net", store)) == {"w", "v"}
        assert set(birkhoff.load_state_dict("net", store, offline=True)) == {"w", "v"}
        assert birkhoff.list(store=store)[1].reference == "other@v1"
    with pytest.raises(StoreError, match="there is no folder"):
        birkhoff.open_store((tmp_path / "absent").as_uri())


def test_a_version_and_a_list_are_tables(published: Store) -> None:
    listed = birkhoff.list()
    assert listed._repr_html_().count("<tr>") == 3
    assert "<caption>net@v1</caption>" in listed[0]._repr_html_()
    assert "<caption>net@v1</caption>" in resolve(published, "net")._repr_html_()


def test_the_package_offers_what_it_says() -> None:
    for name in birkhoff.__all__:
        found = getattr(birkhoff, name)
        assert name == "__version__" or (inspect.isfunction(found) and found.__doc__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        birkhoff.nothing  # noqa: B018
