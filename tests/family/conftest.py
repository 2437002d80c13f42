"""Members of the family in their publishers' own code, at random weights; what is not installed is skipped by name.

Their packages want torchvision, which `make setup` leaves out: `make setup-family` makes an environment with them. The
members without a package are built from clones under the folder that BIRKHOFF_UPSTREAM names, one folder each, called
as its repository is: EdgeSAM, EfficientSAM, EfficientTAM, efficientvit, MedSAM, MedSAM2, MobileSAM, sam-hq, TinySAM.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.family import members

torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))


@contextmanager
def skipping() -> Iterator[None]:
    """Skip the test, with the reason, where something of the publishers' is not here."""
    try:
        yield
    except members.MissingError as error:
        pytest.skip(str(error))


def package(name: str) -> ModuleType:
    """A package of the publishers. Skips the test where it, or what it imports, is not here."""
    with skipping():
        return members.package(name)


@contextmanager
def cloned(repository: str) -> Iterator[Path]:
    """The user's clone of a repository, its modules importable. Skips the test where there is none."""
    with skipping(), members.cloned(repository) as folder:
        yield folder
