"""hf:// sources through huggingface_hub, against a hub on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save

from birkhoff.pipeline.checkpoint.descriptors import Checkpoint
from birkhoff.pipeline.checkpoint.open import read_tensor
from birkhoff.pipeline.download.check import check_addresses
from birkhoff.pipeline.download.resolve import NotDownloaded, peek, resolve
from birkhoff.pipeline.download.spec import SourcePart, hub_place
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.registry.versions import resolve as find
from birkhoff.pipeline.store.base import Store
from tests.pipeline.command import captured, execute
from tests.pipeline.download.hub import Hub, serving

WEIGHTS = save({"w": torch.arange(4096.0).view(64, 64)})
OTHER = save({"w": torch.ones(64, 64)})
CONFIG = json.dumps({"model_type": "sam"}).encode()
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
FILES = {"model.safetensors": WEIGHTS, "config.json": CONFIG, "README.md": CARD, "other.bin": b"not asked for"}
URL = "hf://org/net/model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        served.of("org/net").commit(FILES)
        yield served


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def opened(tmp_path: Path, url: str = URL, **more: str) -> Checkpoint:
    return resolve([SourcePart(urls=(url,), **more)], cache=tmp_path / "cache", downloads=tmp_path / "downloads")


def test_a_file_comes_with_its_commit_and_what_lies_beside_it(hub: Hub, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    part = SourcePart(urls=(URL,))
    found = resolve([part], cache=tmp_path, downloads=tmp_path / "downloads", report=lambda *facts: told.append(facts))
    commit = hub.of("org/net").names["main"]
    assert found.origin == (f"hf://org/net@{commit}/model.safetensors",)
    assert found.path.is_relative_to(tmp_path / "hub")  # the hub's cache keeps it, and no second one
    assert torch.equal(read_tensor(found.tensors[0]), torch.arange(4096.0).view(64, 64))
    assert {path.name for path in found.path.parent.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert told[-1] == ("model.safetensors", len(WEIGHTS), len(WEIGHTS))
    downloads = [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]
    assert len(downloads) == 3
    assert opened(tmp_path).path == found.path
    assert [line for line in hub.log if line.startswith("GET") and "/resolve/" in line] == downloads


def test_a_revision_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    first = opened(tmp_path)
    repository = hub.of("org/net")
    one = repository.names["main"]
    repository.commit({**FILES, "README.md": b"another card"})
    assert opened(tmp_path).origin == first.origin  # the file is the same
    two = repository.commit({**FILES, "model.safetensors": OTHER})
    with pytest.raises(SourceError, match=f"it was that of commit {one}, and is another since {two}: name one of them"):
        opened(tmp_path)
    assert opened(tmp_path, f"hf://org/net@{one}/model.safetensors").path == first.path
    other = opened(tmp_path, f"hf://org/net@{two}/model.safetensors")
    assert torch.equal(read_tensor(other.tensors[0]), torch.ones(64, 64))
    before = list(hub.log)
    opened(tmp_path, f"hf://org/net@{two}/model.safetensors")
    assert hub.log == before  # a commit is asked for once


def test_tags_branches_and_pull_requests_are_revisions(hub: Hub, tmp_path: Path) -> None:
    repository = hub.of("org/net")
    main = repository.names["main"]
    tag = repository.commit({"sub/x.safetensors": OTHER}, name="refs/pr/1")
    repository.names["main"] = main
    found = opened(tmp_path, "hf://org/net@refs%2Fpr%2F1/sub/x.safetensors")
    assert found.origin == (f"hf://org/net@{tag}/sub/x.safetensors",)


def test_without_a_network_the_cache_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path)
    offline(monkeypatch)
    before = list(hub.log)
    assert opened(tmp_path).origin == first.origin
    assert "using the copy of" in caplog.text
    assert isinstance(peek([SourcePart(urls=(URL,))], cache=tmp_path, downloads=tmp_path / "downloads"), Checkpoint)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE asks no server; unset it once"):
        opened(tmp_path, "hf://org/net/absent.safetensors")
    assert hub.log == before
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(SourceError, match="not in the hub's cache"):
        opened(tmp_path)


def test_a_cleaned_cache_is_filled_from_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    first = opened(tmp_path)
    hub.of("org/net").commit({**FILES, "README.md": b"another card"})
    shutil.rmtree(tmp_path / "hub")
    assert opened(tmp_path).origin == first.origin


def test_a_damaged_copy_is_not_used(hub: Hub, tmp_path: Path) -> None:
    path = opened(tmp_path).path
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(OTHER)
    with pytest.raises(SourceError, match="has changed since it was first seen"):
        opened(tmp_path)


def test_shards_come_from_the_commit_of_their_index(hub: Hub, tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    shards = {names[0]: save({"a": torch.ones(4)}), names[1]: save({"b": torch.zeros(4)})}
    files = {"model.safetensors.index.json": index, **shards, "config.json": CONFIG}
    commit = hub.of("org/big").commit(files)
    found = opened(tmp_path, "hf://org/big/model.safetensors.index.json")
    assert [tensor.name for tensor in found.tensors] == ["a", "b"]
    assert found.origin == (f"hf://org/big@{commit}/model.safetensors.index.json",)
    assert (found.path.parent / "config.json").read_bytes() == CONFIG
    asked = {line.rpartition("/resolve/")[2] for line in hub.log if names[0] in line and line.startswith("GET")}
    assert asked == {f"{commit}/{names[0]}"}


def test_a_download_that_breaks_off_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 1000
    assert torch.equal(read_tensor(opened(tmp_path).tensors[0]), torch.arange(4096.0).view(64, 64))
    assert len([line for line in hub.log if line.startswith("GET") and "model.safetensors" in line]) == 2


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("hf://org/absent/x.safetensors", "the hub has no org/absent, or hides it; .* give a token"),
        ("hf://org/gated/x.safetensors", "org/gated is gated; accept its terms"),
        ("hf://org/net@v9/model.safetensors", "org/net has no revision 'v9'"),
        ("hf://org/net/absent.safetensors", "org/net has no file absent.safetensors"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path, url: str, line: str) -> None:
    hub.of("org/gated").gated = True
    with pytest.raises(SourceError, match=line):
        opened(tmp_path, url)
    (state,) = check_addresses({"m": [SourcePart(urls=(url,))]})
    assert not state.good
    assert state.state == ("fails" if "gated" in url else "gone")


def test_a_token_opens_what_is_private(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.of("org/secret").commit(FILES)
    hub.of("org/secret").private = True
    url = "hf://org/secret/model.safetensors"
    with pytest.raises(SourceError, match="or hides it"):
        opened(tmp_path, url)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert opened(tmp_path, url).origin
    assert "Bearer hf_right" in hub.tokens


def test_an_endpoint_on_another_machine_is_encrypted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.example.org")
    with pytest.raises(SourceError, match=r"HF_ENDPOINT: http://hub\.example\.org: plain http"):
        opened(tmp_path)


def test_a_digest_is_held_to_and_a_mirror_comes_first(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="as the manifest says"):
        opened(tmp_path, sha256="0" * 64)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "model.safetensors").write_bytes(WEIGHTS)
    before = list(hub.log)
    found = resolve([SourcePart(urls=(URL,))], cache=tmp_path, downloads=tmp_path / "fresh", mirror=mirror)
    assert (found.path, found.origin) == (mirror / "model.safetensors", ())
    assert hub.log == before
    waiting = peek([SourcePart(urls=(URL,))], cache=tmp_path, downloads=tmp_path / "fresh")
    assert isinstance(waiting, NotDownloaded)
    assert waiting.nbytes == len(WEIGHTS)


@pytest.mark.parametrize(
    "url",
    ["hf://", "hf://org", "hf://org/net", "hf://org/net/", "hf://org/net@/x", "hf://org/net/../x", "hf://o/n/a//b",
     "hf://user:secret@org/net/x", "hf://org/net/x?token=1"],
)  # fmt: skip
def test_addresses_that_name_no_file(url: str) -> None:
    with pytest.raises(ValidationError, match=r"expected hf://ORG/REPO/FILE"):
        SourcePart(urls=(url,))


def test_an_address_has_one_form() -> None:
    place = hub_place("hf://org/net@refs%2fpr%2f1/a/b.pth")
    assert (place.repository, place.revision, place.path) == ("org/net", "refs/pr/1", "a/b.pth")
    assert SourcePart(urls=("HF://org/net@refs%2fpr%2f1/a/b.pth",)).urls == ("hf://org/net@refs%2Fpr%2F1/a/b.pth",)


def test_a_version_records_where_it_came_from(
    hub: Hub, tmp_path: Path, directory_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.yaml").write_text(f"models: [{{name: net, source: '{URL}', proof: false}}]\n")
    words = ("compress", str(tmp_path / "m.yaml"), "--executor", "inline", "--store", directory_store.url)
    assert execute(*words) == 0
    manifest = find(directory_store, "net").manifest
    commit = hub.of("org/net").names["main"]
    assert manifest.source.origin == (f"hf://org/net@{commit}/model.safetensors",)
    assert [file.name for file in manifest.files or ()] == ["README.md", "config.json"]
    code, _, err = captured(capsys, *words)
    assert (code, "nothing to do" in err) == (0, True)
