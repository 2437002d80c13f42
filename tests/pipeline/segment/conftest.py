"""The segment-anything package as these tests need it."""

from types import ModuleType

import pytest
from PIL import Image

from tests.pipeline.load.upstream import upstream


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The segment-anything package, with stand-ins for two transforms where torchvision cannot be imported."""
    package, transforms = upstream("segment_anything"), upstream("segment_anything.utils.transforms")
    if transforms.resize is object:
        monkeypatch.setattr(transforms, "to_pil_image", Image.fromarray)
        monkeypatch.setattr(
            transforms, "resize", lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)
        )
    return package
