"""What sessions read of botocore's data: the same as botocore, and no more than a client needs."""

import json
import os
from pathlib import Path

import pytest
from boto3.session import Session
from botocore.exceptions import UnknownServiceError
from botocore.loaders import Loader

from birkhoff.pipeline.store.s3 import _Core, _Loader, _loader


@pytest.mark.parametrize("type_name", ["service-2", "endpoint-rule-set-1", "paginators-1"])
def test_a_service_is_read_as_botocore_reads_it(type_name: str) -> None:
    # Not the shared one, because clients change what they are given.
    assert _Loader().load_service_model("s3", type_name) == Loader().load_service_model("s3", type_name)


def test_a_client_does_not_look_at_every_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, listdir = list[str](), os.listdir

    def noted(path: str) -> list[str]:
        seen.append(Path(path).name)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", noted)
    _loader.cache_clear()
    for service in ("s3", "sts"):  # a profile's role is assumed through the second
        Session(botocore_session=_Core()).client(service, "us-east-1")
    assert set(seen) <= {"s3", "sts"}


def test_an_unknown_service_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownServiceError, match=r"'nosuch'.*, s3, "):
        Session(botocore_session=_Core()).client("nosuch", "us-east-1")


def test_the_data_path_of_the_configuration_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "2020-01-01"
    folder.mkdir(parents=True)
    (folder / "service-2.json").write_text(json.dumps({"metadata": {}}))
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    loader = _Core().get_component("data_loader")
    assert loader.load_service_model("mine", "service-2") == {"metadata": {}}
