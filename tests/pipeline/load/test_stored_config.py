"""Configurations that come with weights: hyperparameters of known architectures, and no way to code or network."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants

from birkhoff.pipeline.errors import BuilderError
from birkhoff.pipeline.load import builders, stored_config
from birkhoff.pipeline.load.builders import from_settings, stored_settings
from birkhoff.pipeline.plan.sidecars import settings_in
from birkhoff.pipeline.registry.documents import FileRecord, blob_key, sha256
from birkhoff.pipeline.registry.versions import publish
from birkhoff.pipeline.store.open import open_store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import execute
from tests.pipeline.publishing import publish_tensors

SAM: dict[str, Any] = {
    "model_type": "sam",
    "vision_config": {"image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "global_attn_indexes": [0], "output_channels": 16, "num_pos_feats": 8},
    "prompt_encoder_config": {"image_size": 64, "patch_size": 8, "hidden_size": 16},
    "mask_decoder_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32,
                            "iou_head_hidden_dim": 16},
}  # fmt: skip
ELSEWHERE = "attacker/evil"
REACHING: dict[str, dict[str, Any]] = {
    "dpt": {"backbone": ELSEWHERE, "use_pretrained_backbone": True, "use_timm_backbone": False, "is_hybrid": False},
    "maskformer": {"backbone": ELSEWHERE, "use_pretrained_backbone": True},
    "detr": {"backbone": ELSEWHERE, "use_pretrained_backbone": True, "use_timm_backbone": False},
    "timm_wrapper": {"architecture": f"hf-hub:{ELSEWHERE}", "model_args": {"pretrained": True}},
    "timm_backbone": {"backbone": f"hf-hub:{ELSEWHERE}", "use_pretrained_backbone": True},
    "edgetam": {},
    "rag": {"question_encoder": {"model_type": "dpr"}, "generator": {"model_type": "bart"}, "dataset": ELSEWHERE},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert"}},
}
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "_experts_implementation", "_experts_implementation_internal", "use_kernels", "per_layer_config", "adapters",
        "_name_or_path", "name_or_path", "pretrained_model_name_or_path", "trust_remote_code", "kernel_config",
        "quantization_config", "backbone", "base_model")  # fmt: skip


def read(settings: dict[str, Any]) -> dict[str, Any]:
    found = settings_in(json.dumps(settings).encode())
    assert found is not None
    return found


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Hosts that anybody asks the name service for; none is found."""
    asked: list[object] = []

    def spy(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(-2, "blocked by the test")

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    return asked


def test_a_known_architecture_is_built() -> None:
    with torch.device("meta"):
        model = from_settings("config.json", read(SAM))
    assert type(model) is transformers.SamModel
    assert model.config.vision_config.hidden_size == 32


@pytest.mark.parametrize("kind", REACHING)
def test_no_other_is(kind: str, hosts: list[object]) -> None:
    with pytest.raises(BuilderError, match=f"model_type '{kind}' is not built from a configuration that came with"):
        from_settings("config.json of evil@v1", read({"model_type": kind, **REACHING[kind]}))
    assert hosts == []


@pytest.mark.parametrize("kind", REACHING)
def test_nor_is_one_inside_a_known_one(kind: str, hosts: list[object]) -> None:
    inner = {"model_type": kind, **REACHING[kind]}
    for settings in (
        {"model_type": "sam2", "vision_config": inner},
        {"model_type": "sam2", "vision_config": {"model_type": "sam2_vision_model", "backbone_config": inner}},
    ):
        with pytest.raises(BuilderError, match=f"_config: model_type '{kind}' is not built"):
            from_settings("config.json of evil@v1", read(settings))
    assert hosts == []


@pytest.mark.parametrize("place", ["top", "inside"])
@pytest.mark.parametrize("key", CODE)
def test_settings_that_could_name_code_do_not_count(key: str, place: str, hosts: list[object]) -> None:
    where = {key: {"AutoModel": "evil.Model"} if key == "auto_map" else ELSEWHERE}
    settings = {**SAM, **where} if place == "top" else {**SAM, "vision_config": {**SAM["vision_config"], **where}}
    kept = stored_settings("config.json", read(settings))
    assert "evil" not in json.dumps(kept)
    assert kept == stored_settings("config.json", read(SAM))
    with torch.device("meta"):
        from_settings("config.json", read(settings))
    assert hosts == []


@pytest.mark.parametrize("value", ["text", 3, [1], {"model_type": "vit"}])
def test_a_part_of_another_kind(value: object) -> None:
    settings = {**SAM, "vision_config": value}
    if isinstance(value, dict):  # its class is known, whatever it calls itself
        assert "model_type" not in stored_settings("config.json", settings)["vision_config"]
    else:
        with pytest.raises(BuilderError, match=r"vision_config is .*, expected a setting of SamConfig"):
            stored_settings("config.json", settings)


def test_values_are_plain_and_not_deep() -> None:
    deep: object = 1
    for _ in range(9):
        deep = [deep]
    with pytest.raises(BuilderError, match="global_attn_indexes is list"):
        stored_settings("config.json", {**SAM, "vision_config": {"global_attn_indexes": deep}})


@pytest.mark.parametrize("kind", sorted(stored_config.ARCHITECTURES))
def test_no_known_architecture_takes_the_name_of_anything_elsewhere(kind: str) -> None:
    """Holds for the transformers at hand what the list was chosen for."""
    reaching = re.compile(
        r"(^|_)(backbone|pretrained|repo|path|hub|url|file|adapter|timm|dataset|implementation|map)(_|$)"
    )
    sound = {"drop_path_rate", "backbone_config", "backbone_channel_list", "backbone_feature_sizes"}
    seen = [transformers.CONFIG_MAPPING[kind]]
    for config in seen:
        seen += [part for part in (config.sub_configs or {}).values() if part not in (*seen, transformers.AutoConfig)]
        for name in inspect.signature(config.__init__).parameters.keys() - sound:
            assert not reaching.search(name), (config, name)


@pytest.mark.parametrize("kind", sorted(stored_config.ARCHITECTURES))
def test_each_is_built_by_its_name_alone_without_the_network(kind: str, hosts: list[object]) -> None:
    with torch.device("meta"):
        from_settings("config.json", {"model_type": kind})
    assert hosts == []


def test_how_pictures_are_normalised_is_kept() -> None:
    """No class of theirs declares it, yet segmenting asks the configuration: left out, masks change without a word."""
    settings = {**SAM, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.25, 0.25]}
    with torch.device("meta"):
        config: Any = from_settings("config.json", read(settings)).config
    assert config.image_mean == [0.5, 0.4, 0.3]
    assert config.image_std == [0.25, 0.25, 0.25]


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.2.0")
    with pytest.raises(BuilderError, match=r"needs transformers 5\.3 or newer, 5\.2\.0 is installed: pip install -U"):
        from_settings("config.json", read(SAM))


class TestTheHub:
    def test_it_is_shut_while_a_model_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[object] = []
        build = builders._of_transformers
        monkeypatch.setattr(
            builders,
            "_of_transformers",
            lambda *args: (seen.append((constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))), build(*args))[1],
        )
        before = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
        with torch.device("meta"):
            from_settings("config.json", read(SAM))
        assert seen == [(True, "1")]
        assert (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")) == before

    def test_it_is_as_it_was_after_a_failure(self) -> None:
        before = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
        with pytest.raises(ZeroDivisionError), stored_config.hub_shut():
            raise ZeroDivisionError
        assert (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")) == before

    def test_what_would_reach_it_says_so(self) -> None:
        with stored_config.hub_shut(), pytest.raises(OSError, match=r"(?i)offline|connect|cache"):
            transformers.AutoConfig.from_pretrained(ELSEWHERE)


class TestCommands:
    """A whole command on an artifact whose configuration names a backbone elsewhere."""

    @pytest.fixture
    def proxy(self) -> Any:
        """(port, request lines that came): every connection of the command would come here."""
        server, came = socket.create_server(("127.0.0.1", 0)), list[str]()

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    came.append(connection.recv(200).decode(errors="replace"))

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], came
        server.close()

    @pytest.mark.parametrize("words", [["--format", "transformers"], ["--format", "transformers", "--offline"], None])
    def test_none_connects(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Any, words: list[str] | None
    ) -> None:
        port, came = proxy
        body = json.dumps({"model_type": "dpt", **REACHING["dpt"]}).encode()
        with open_store((tmp_path / "store").as_uri()) as store:
            version = publish_tensors(store, "m", {"a.weight": torch.randn(64, 64)})
            store.put(blob_key(sha256(body)), body)
            record = FileRecord(name="config.json", blob=sha256(body), bytes=len(body))
            publish(store, version.manifest.model_copy(update={"files": (record,)}))
            url = store.url
        environment = {**os.environ, "BIRKHOFF_HOME": str(tmp_path / "home"), "BIRKHOFF_STORE": url,
                       "HTTPS_PROXY": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")}  # fmt: skip

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            program = [sys.executable, "-m", "birkhoff", *arguments]
            return subprocess.run(
                program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENT_SECONDS
            )

        with monkeypatch.context() as patch:
            patch.setenv("BIRKHOFF_HOME", environment["BIRKHOFF_HOME"])
            assert execute("pull", "m", "-o", str(tmp_path / "plain"), "--store", url) == 0  # the cache has all of it
        if words is None:
            picture = str(Path("manifests/demo/masks.png").resolve())
            ended = run("segment", picture, "--model", "m", "--point", "3,3", "-o", "m.png")
        else:
            ended = run("pull", "m", "-o", "folder", *words)
        assert ended.returncode == 18, ended.stderr
        assert "model_type 'dpt' is not built" in ended.stderr
        assert came == []


def test_weights_that_are_loaded_over_are_not_drawn() -> None:
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": 64}  # fmt: skip
    state = torch.get_rng_state()
    model = from_settings("a model", read(bert))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(part.weight, torch.ones(32)) for part in model.modules() if type(part) is torch.nn.LayerNorm)
    torch.nn.init.normal_(weight := torch.zeros(8))
    assert weight.any()
