"""SamModel -> compress -> folder -> from_pretrained: the masks of load_into."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import birkhoff
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.pipeline.artifact.readers import open_artifact
from birkhoff.pipeline.errors import BuilderError, ModelMismatchError, OutputError, exit_code
from birkhoff.pipeline.store.base import Store
from tests.patience import PATIENT_SECONDS
from tests.pipeline.command import execute
from tests.pipeline.load.test_upstream import drawn, small_config, transformers_masks
from tests.pipeline.publishing import publish_tensors


def test_from_pretrained_gives_the_masks_of_load_into(
    directory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from transformers import SamModel

    from birkhoff.pipeline.load.transformers_folder import write_folder

    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    drawn(SamModel(small_config())).save_pretrained(tmp_path / "source")
    source = load_file(tmp_path / "source" / "model.safetensors")
    publish_tensors(directory_store, "sam", source, shard_weights=1 << 20)
    loaded = SamModel(small_config()).eval()
    layers = birkhoff.load_into(loaded, "sam", directory_store.url)
    folder = tmp_path / "folder"
    with open_artifact("sam", directory_store.url, cached=True) as artifact:
        write_folder(artifact, SamModel(small_config()), small_config().to_dict(), folder)
        with pytest.raises(OutputError, match="not empty"):
            write_folder(artifact, loaded, {}, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = SamModel.from_pretrained(folder).eval()
    swapped = [name for name, module in model.named_modules() if isinstance(module, HyperLinear)]
    assert sorted(swapped) == sorted(layers)
    torch.manual_seed(1)
    image, point = torch.randn(1, 3, 128, 128), torch.tensor([50.0, 70.0])
    for ours, theirs in zip(
        transformers_masks(loaded, image, point), transformers_masks(model, image, point), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `save_pretrained` wrote, and the store to which `birkhoff compress` has published it as `sam`."""
    from transformers import SamModel

    folder = tmp_path_factory.mktemp("published")
    drawn(SamModel(small_config())).save_pretrained(folder / "source")
    (folder / "source" / "preprocessor_config.json").write_text('{"size": 128}')
    store = (folder / "store").as_uri()
    (folder / "m.yaml").write_text(
        f"profile: fast\nproof: false\nstore: {store}\nmodels: [{{name: sam, source: source/model.safetensors}}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIRKHOFF_HOME", str(folder / "home"))
        assert command("compress", str(folder / "m.yaml"), "--executor", "inline") == 0
    return folder, store


def command(*arguments: str) -> int:
    return execute(*arguments)


@pytest.fixture
def pulled(published: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "made" / "folder"
    assert command("pull", "sam", "-o", str(folder), "--format", "transformers", "--store", published[1]) == 0
    return folder


def test_pull_writes_a_folder_for_from_pretrained(
    published: tuple[Path, str], pulled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from transformers import AutoModel, SamModel

    source, store = published
    assert {path.name for path in pulled.parent.iterdir()} == {"folder"}
    assert (pulled / "preprocessor_config.json").read_text() == '{"size": 128}'
    config = json.loads((pulled / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "birkhoff"
    original = json.loads((source / "source/config.json").read_text())
    same = type(SamModel.config_class.from_dict(original).vision_config)
    assert same(**config["vision_config"]).to_dict() == same(**original["vision_config"]).to_dict()
    for name, file in json.loads((pulled / "model.safetensors.index.json").read_text())["weight_map"].items():
        with safe_open(pulled / file, "pt") as opened:
            assert opened.get_slice(name).get_shape() is not None
    loaded = SamModel(small_config()).eval()
    layers = birkhoff.load_into(loaded, "sam", store)
    model = AutoModel.from_pretrained(pulled).eval()
    assert sorted(layers) == sorted(name for name, m in model.named_modules() if isinstance(m, HyperLinear))
    image, point = torch.randn(1, 3, 128, 128), torch.tensor([50.0, 70.0])
    assert torch.equal(transformers_masks(loaded, image, point)[0], transformers_masks(model, image, point)[0])
    words = ["pull", "sam", "--format", "transformers", "--store", store]
    assert command(*words, "-o", str(pulled)) == exit_code(OutputError(""))
    assert "is not empty" in capsys.readouterr().err
    assert command(*words, "-o", str(tmp_path / "again"), "--offline") == 0
    for path in pulled.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_of_the_first_form_loads_and_is_written_anew(pulled: Path, tmp_path: Path) -> None:
    """Folders once held theta as uint16, step and escape values as float32."""
    from safetensors.torch import load_file, save_file
    from transformers import SamModel

    expected = SamModel.from_pretrained(pulled).eval()
    names = {"theta_bytes": ("theta", torch.uint16), "step_bits": ("step", torch.float32)}
    names["escape_bits"] = "escape_value", torch.float32
    index = json.loads((pulled / "model.safetensors.index.json").read_text())
    places = index["weight_map"] = {}
    for file in pulled.glob("model-*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            owner, _, leaf = name.rpartition(".")
            now, kind = names.get(leaf, (leaf, tensor.dtype))
            tensors[f"{owner}.{now}" if owner else now] = tensor.view(kind)
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    (pulled / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((pulled / "config.json").read_text())
    assert config["quantization_config"].pop("form") == 2
    (pulled / "config.json").write_text(json.dumps(config))
    model = SamModel.from_pretrained(pulled).eval()
    model.save_pretrained(tmp_path / "again")
    again = SamModel.from_pretrained(tmp_path / "again").eval()
    image, point = torch.randn(1, 3, 128, 128), torch.tensor([50.0, 70.0])
    for other in (model, again):
        assert not [name for name, buffer in other.named_buffers() if buffer.is_meta]
        assert torch.equal(transformers_masks(other, image, point)[0], transformers_masks(expected, image, point)[0])
    config["quantization_config"]["form"] = 3
    (pulled / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelMismatchError, match="form 3"):
        SamModel.from_pretrained(pulled)


def test_pull_says_what_is_missing_for_such_a_folder(
    directory_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    publish_tensors(directory_store, "net", {"a": torch.randn(64, 96)})
    folder = tmp_path / "folder"
    code = command("pull", "net", "-o", str(folder), "--format", "transformers", "--store", directory_store.url)
    assert code == exit_code(BuilderError(""))
    assert "net@v1 carries no config.json of transformers" in capsys.readouterr().err
    assert not folder.exists()


def test_an_artifact_with_its_configuration_needs_no_builder(published: tuple[Path, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import SamModel

    from birkhoff.pipeline.load.builders import compressed_model, original_model

    folder, store = published
    assert isinstance(compressed_model("sam", store, device="cpu"), SamModel)
    torch.save(load_file(folder / "source" / "model.safetensors"), tmp_path / "bare.pth")
    original = original_model(tmp_path / "bare.pth", reference="sam", store=store, device="cpu")
    assert isinstance(original, SamModel)
    with pytest.raises(BuilderError, match="--builder"):
        original_model(tmp_path / "bare.pth", device="cpu")


ORDERS = {
    "birkhoff first": "import birkhoff; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); "
    "from transformers import SamModel",
    "transformers first": "from transformers import SamModel; import birkhoff",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_birkhoff_is_enough_in_either_order(pulled: Path, order: str) -> None:
    program = f"""
import sys
{ORDERS[order]}
model = SamModel.from_pretrained({str(pulled)!r})
assert type(model.vision_encoder.layers[0].attn.qkv).__name__ == "HyperLinear"
assert not [finder for finder in sys.meta_path if "birkhoff.pipeline" in type(finder).__module__], sys.meta_path
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr


EXPLICIT = """
import os, sys
os.environ["BIRKHOFF_TRANSFORMERS"] = "explicit"
before = list(sys.meta_path)
import birkhoff
assert sys.meta_path == before
from transformers import SamModel
import logging
said = []
logging.getLogger("transformers").addHandler(type("", (logging.Handler,), {"emit": lambda self, it: said.append(it)})())
try:  # some releases refuse, others go on with a warning and fresh weights
    SamModel.from_pretrained(FOLDER)
except ValueError as error:
    assert "birkhoff" in str(error), error
else:
    assert any("birkhoff" in record.getMessage() for record in said), "it loads without a word"
import birkhoff.transformers
for _ in range(2):
    birkhoff.transformers.register()
assert not [finder for finder in sys.meta_path if "birkhoff" in type(finder).__module__]
model = SamModel.from_pretrained(FOLDER)
assert type(model.vision_encoder.layers[0].attn.qkv).__name__ == "HyperLinear"
"""


def test_registering_by_name_leaves_the_import_system_alone(pulled: Path) -> None:
    program = EXPLICIT.replace("FOLDER", repr(str(pulled)))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr


def test_registering_by_name_takes_the_finder_away() -> None:
    program = """
import sys
before = list(sys.meta_path)
import birkhoff.transformers
assert len(sys.meta_path) == len(before) + 1
birkhoff.transformers.register()
assert not [finder for finder in sys.meta_path if "birkhoff" in type(finder).__module__]
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["birkhoff"].__module__ == "birkhoff.pipeline.load.transformers_quantizer"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
