"""From the hub and back: a repository is compressed, pulled for transformers, uploaded with its card, and loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from birkhoff.pipeline.errors import OutputError, exit_code
from birkhoff.pipeline.load.model_card import card_facts, card_metadata, model_card
from birkhoff.pipeline.registry.documents import Agreement, ProofRecord, SourceRecord, VersionManifest
from tests.pipeline.command import captured, execute
from tests.pipeline.download.hub import Hub, serving
from tests.pipeline.load.test_upstream import drawn, small_config, transformers_masks
from tests.pipeline.publishing import unmeasured

SOURCE_CARD = b"---\nlicense: other\nlicense_name: sam-licence\nlicense_link: LICENSE.md\n---\n# SAM\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("BIRKHOFF_STORE", (tmp_path / "store").as_uri())
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield served


def test_a_repository_is_compressed_and_uploaded_with_its_card(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from transformers import SamModel

    drawn(SamModel(small_config())).save_pretrained(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    commit = hub.of("org/sam").commit({**files, "README.md": SOURCE_CARD, "LICENSE.md": b"the licence"})
    source = "{name: sam, source: 'hf://org/sam/model.safetensors', proof: false}"
    (tmp_path / "m.yaml").write_text(f"profile: fast\nmodels: [{source}]\n")
    assert execute("compress", str(tmp_path / "m.yaml"), "--executor", "inline") == 0
    folder = tmp_path / "folder"
    assert execute("pull", "sam", "-o", str(folder), "--format", "transformers") == 0
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "sam-licence")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/sam", "quantized")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "mask-generation")
    assert f"hf://org/sam@{commit}/model.safetensors" in card.text
    assert "SamModel.from_pretrained" in card.text
    assert (folder / "LICENSE.md").read_bytes() == b"the licence"
    huggingface_hub.HfApi(endpoint=hub.url).upload_folder(repo_id="me/sam", folder_path=folder)
    uploaded = hub.of("me/sam")
    assert set(uploaded.commits[uploaded.names["main"]]) == {path.name for path in folder.iterdir()}
    torch.manual_seed(1)
    image, point = torch.randn(1, 3, 128, 128), torch.tensor([50.0, 70.0])
    here, there = SamModel.from_pretrained(folder).eval(), SamModel.from_pretrained("me/sam").eval()
    for ours, theirs in zip(
        transformers_masks(here, image, point), transformers_masks(there, image, point), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert execute("label", "sam", "licence=Apache-2.0") == 0
    (tmp_path / "card.jinja").write_text(
        "---\n{{ metadata_yaml }}---\n{{ model }} {{ licence }} {{ labels.licence }}\n"
    )
    words = ("pull", "sam", "--format", "transformers")
    assert execute(*words, "-o", str(tmp_path / "own"), "--card", str(tmp_path / "card.jinja")) == 0
    own = huggingface_hub.ModelCard.load(tmp_path / "own" / "README.md")
    assert (own.data.license, own.text.strip()) == ("apache-2.0", "sam apache-2.0 Apache-2.0")
    (tmp_path / "wrong.jinja").write_text("{{ nothing }}")
    code, _, err = captured(capsys, *words, "-o", str(tmp_path / "no"), "--card", str(tmp_path / "wrong.jinja"))
    assert (code, "a card may use: architecture, base_model" in err) == (exit_code(OutputError("")), True)
    assert captured(capsys, "pull", "sam", "-o", str(tmp_path / "x"), "--card", str(tmp_path / "card.jinja"))[0] == 2


def manifest(**more: object) -> VersionManifest:
    source = SourceRecord(file="x`|.pth", sha256="0" * 64, bytes=4 << 20, format="torch-zip")
    shard = unmeasured(b"0" * 1000, source_bytes=9, tensors=3)
    return VersionManifest.model_validate(
        {
            "model": "net",
            "source": source,
            "profile": "small",
            "recipe": {},
            "code": "0.1.0",
            "shards": (shard,),
            **more,
        }
    )


def facts(found: VersionManifest, card: bytes | None = None) -> dict[str, object]:
    return card_facts(
        found, version="v1", architecture="SamModel", settings={"model_type": "sam"}, source_card=card, labels={}
    )


def test_the_table_of_agreement_has_what_was_measured() -> None:
    measured = Agreement(
        inputs=4, prompts=64, agreement_mean=0.951, agreement_p5=0.8, embedding_db=25.1, output_db=None
    )
    text = model_card(facts(manifest(proof=ProofRecord(adapter="sam", pictures_version=1, measured=measured))))
    assert "| 4 synthetic pictures | 64 | 0.951 | 0.8 | 25.1 |  |" in text
    assert "Not measured" in model_card(facts(manifest()))
    assert "`x'/.pth`" in text  # a name breaks neither span nor table
    assert "not known: see the source" in text


@pytest.mark.parametrize(
    "card",
    [
        None,
        b"",
        b"# no metadata",
        b"---\nlicense: [\n---\n",
        b"---\n- a\n---\n",
        b"---\nlicense: {a: 1}\n---\n",
        b"\xff",
    ],
)
def test_a_strangers_card_is_read_for_what_it_says_alone(card: bytes | None) -> None:
    found = card_metadata(card)
    assert isinstance(found, dict)
    metadata = facts(manifest(), card)["metadata"]
    assert isinstance(metadata, dict)
    assert "license" not in metadata


def test_a_template_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "card").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(OutputError, match="__class__"):
        model_card(facts(manifest()), tmp_path / "card")
    with pytest.raises(OutputError, match="correct --card"):
        model_card(facts(manifest()), tmp_path / "absent")
    (tmp_path / "card").write_text("{% if %}")
    with pytest.raises(OutputError, match="line 1"):
        model_card(facts(manifest()), tmp_path / "card")
