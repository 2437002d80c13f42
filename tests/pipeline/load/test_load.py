"""Loading: what ends up where, from where, and that a failure leaves the model as it was."""

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import birkhoff
from birkhoff.codec import container
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifact import readers as artifacts
from birkhoff.pipeline.artifact.cache import BlobCache
from birkhoff.pipeline.errors import ArtifactNotFoundError, IntegrityError, ModelMismatchError
from birkhoff.pipeline.load import changes, decode, load
from birkhoff.pipeline.load.name_maps import sam_names
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_tensors


class Tied(nn.Module):
    """Two names for one parameter, a buffer that is not saved, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 96), nn.Linear(96, 128, bias=False)
        self.embedding = nn.Parameter(torch.randn(40, 128))
        self.head = nn.Module()
        self.head.register_parameter("embedding", self.embedding)
        self.register_buffer("mean", torch.arange(3.0), persistent=False)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) @ self.head.embedding.T + self.mean.sum()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory_store: Store) -> Store:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", directory_store.url)
    return directory_store


@pytest.fixture
def tied(home: Store) -> Tied:
    torch.manual_seed(0)
    model = Tied()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name != "head.embedding"}
    publish_tensors(home, "tied", stored, shard_weights=5000)
    return model


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tied_parameters_stay_tied_and_floats_take_the_type(tied: Tied, meta: bool, dtype: torch.dtype | None) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Tied()
    assert birkhoff.load_into(model, "tied", dtype=dtype) == ["first", "second"]
    assert model.embedding is model.head.embedding
    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert set(kinds.values()) == {dtype or torch.float32}
    assert (model.steps.dtype, int(model.steps)) == (torch.int64, 7)
    assert torch.allclose(model.first.bias.float(), tied.first.bias, atol=1e-2)
    wanted = birkhoff.load_state_dict("tied")
    assert torch.equal(model.first.dense_weight(torch.float32), wanted["first.weight"])
    assert torch.equal(model.embedding, wanted["embedding"].to(dtype or torch.float32))
    if not meta:
        x = torch.randn(2, 128, dtype=dtype)
        assert model(x).shape == (2, 40)


def test_the_order_of_arrival_does_not_show(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = birkhoff.load_state_dict("tied")
    arriving = decode.Artifact.arriving
    monkeypatch.setattr(
        "birkhoff.pipeline.artifact.readers.CachedArtifact.arriving", lambda self: reversed([*arriving(self)])
    )
    again = birkhoff.load_state_dict("tied")
    assert list(again) == list(plain) == [name for name in tied.state_dict() if name != "head.embedding"]
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_damage_met_half_way_leaves_the_model_as_it_was(tied: Tied, home: Store) -> None:
    from birkhoff.pipeline.registry.versions import resolve

    last = resolve(home, "tied").manifest.shards[-1]
    body = bytearray(home.get(blob_key(last.blob)))
    body[random.Random(0).randrange(len(body))] ^= 1
    home.put(blob_key(last.blob), bytes(body))
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IntegrityError, match=last.blob):
        birkhoff.load_into(model, "tied")
    assert type(model.first) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_second_load_needs_no_store(tied: Tied, home: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="without --offline"):
        birkhoff.load_state_dict("tied", offline=True)
    first = birkhoff.load_state_dict("tied")
    shutil.rmtree(tmp_path / "store")
    again = birkhoff.load_state_dict("tied", offline=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert BlobCache().usage().blobs > 1


def test_each_header_is_parsed_once_and_read_by_no_thread(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    birkhoff.load_into(Tied(), "tied")
    parsed, readers = [], set()
    parse_head, read = container.parse_head, artifacts.CachedArtifact.read_head
    for module in (container, artifacts):
        monkeypatch.setattr(module, "parse_head", lambda start: parsed.append(start) or parse_head(start))

    def read_head(self: Any, *words: Any) -> bytes:
        readers.add(threading.current_thread())
        return bytes(read(self, *words))

    monkeypatch.setattr(artifacts.CachedArtifact, "read_head", read_head)
    model = Tied()
    birkhoff.load_into(model, "tied")
    with artifacts.open_artifact("tied") as artifact:
        assert len(parsed) == len(artifact.manifest.shards) > 1
    assert readers == {threading.current_thread()}
    assert torch.equal(model.first.dense_weight(torch.float32), birkhoff.load_state_dict("tied")["first.weight"])


def test_headers_of_many_tensors_are_not_kept(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    decode_shards = load.decode_shards

    def counted(*words: Any) -> Any:
        kept.append(len(words[3]))
        return decode_shards(*words)

    monkeypatch.setattr(load, "decode_shards", counted)
    for most in (5, 4):
        monkeypatch.setattr(load, "_MOST_ENTRIES", most)
        birkhoff.load_into(Tied(), "tied")
    assert (kept[0] > 1, kept[1]) == (True, 0)


@pytest.mark.parametrize("stored", [True, False])
def test_a_bias_is_zeros_only_if_none_is_stored(
    stored: bool, tied: Tied, home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not stored:
        publish_tensors(home, "tied", {"first.weight": tied.first.weight.detach()})
    made = []
    bias_for = changes._bias_for
    monkeypatch.setattr(changes, "_bias_for", lambda old, *words: made.append(old.bias) or bias_for(old, *words))
    with torch.device("meta"):
        model = Tied()
    birkhoff.load_into(model, "tied", strict=False)
    assert [bias is not None for bias in made] == ([False] if stored else [True])
    assert torch.equal(model.first.bias, tied.first.bias if stored else torch.zeros(96))


def test_what_does_not_fit_is_named(tied: Tied) -> None:
    model = Tied()
    model.first = nn.Linear(64, 96)
    model.extra = nn.Linear(2, 2)
    del model.second
    with pytest.raises(ModelMismatchError) as caught:
        birkhoff.load_into(model, "tied")
    text = str(caught.value)
    assert "first.weight is [96, 128], the model has [96, 64]" in text
    assert "2 missing: extra.weight, extra.bias" in text
    assert "1 unexpected: second.weight" in text
    assert "\n" not in text
    with pytest.raises(ModelMismatchError, match="of another shape"):
        birkhoff.load_into(model, "tied", strict=False)
    model.first = nn.Linear(128, 96)
    assert birkhoff.load_into(model, "tied", strict=False) == ["first"]
    assert isinstance(model.first, HyperLinear)


def test_threads_of_torch_are_as_before(tied: Tied) -> None:
    before = torch.get_num_threads()
    birkhoff.load_state_dict("tied")
    assert torch.get_num_threads() == before


MEMORY = """
import json, torch, birkhoff
from pathlib import Path
from torch import nn
from birkhoff.pipeline.load import load  # imports are no part of what is measured
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(12)))
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss would be that of the parent
before = peak()
birkhoff.load_into(model, "big")
print(json.dumps(peak() - before))
"""


def test_host_memory_is_bounded_by_the_compressed_model(home: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 1024, generator=generator)
    version = publish_tensors(home, "big", {f"{i}.weight": weight.roll(i, 0) for i in range(12)})
    largest = max(shard.source_bytes for shard in version.manifest.shards)
    stored = sum(shard.bytes for shard in version.manifest.shards)
    loaded = 12 * 2048 * 1024  # 8 bits a weight
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) <= loaded + stored + largest + (16 << 20)


@pytest.mark.parametrize(
    ("published", "transformers"),
    [
        ("image_encoder.patch_embed.proj.weight", "vision_encoder.patch_embed.projection.weight"),
        ("image_encoder.blocks.11.norm2.bias", "vision_encoder.layers.11.layer_norm2.bias"),
        ("image_encoder.neck.2.weight", "vision_encoder.neck.conv2.weight"),
        ("mask_decoder.transformer.norm_final_attn.weight", "mask_decoder.transformer.layer_norm_final_attn.weight"),
        (
            "mask_decoder.output_hypernetworks_mlps.3.layers.2.bias",
            "mask_decoder.output_hypernetworks_mlps.3.proj_out.bias",
        ),
        ("some.other.name", "some.other.name"),
    ],
)
def test_names_of_published_sam(published: str, transformers: str) -> None:
    assert sam_names(published) == (transformers,)
