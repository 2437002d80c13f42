"""The policies of manifests/iam that no server here enforces, held to the requests that commands really send.

A proxy in front of SeaweedFS and of the emulators writes down every request of a publisher, a puller and a collector;
each must be allowed by the documents. (`test_iam` has a server enforce those of AWS's that SeaweedFS knows.)
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.store.seaweedfs import EmbeddedServer
from tests.harness.faults.catalogue import Answer, Fault, Request
from tests.harness.faults.proxy import Proxy, Rule
from tests.pipeline.command import captured
from tests.pipeline.emulators import ACCOUNT, Emulator

POLICIES = Path(__file__).parents[3] / "manifests/iam"
ROLES = ("publisher", "puller", "collector")
BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"


@dataclass
class Asked:
    """A request of a role, and whether an object was there before it."""

    role: str
    method: str
    key: str
    headers: frozenset[str]
    found: bool


@dataclass
class Recorder:
    """Every request, below the store's prefix."""

    prefix: str
    key_of: Callable[[Request], str]
    role: str = ""
    there: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)

    def before(self, request: Request, _: object) -> Answer | None:
        key = self.key_of(request).removeprefix(f"{self.prefix}/")
        method = "LIST" if request.method == "LIST" else request.method
        self.asked.append(Asked(self.role, method, key, frozenset(request.headers), key in self.there))
        if method in ("PUT", "POST"):
            self.there.add(key)
        if method == "DELETE":
            self.there.discard(key)
        return None


def _of_gcs(request: Request) -> str:
    if request.method == "POST":  # the name stands in the first part of the body
        found = re.search(rb'"name": "([^"]*)"', request.body)
        return found[1].decode() if found else request.key
    return request.key.partition("/o/")[2]


@pytest.fixture(params=["s3", "gcs", "azure"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    url = request.getfixturevalue(f"{request.param}_environment")
    bucket, prefix = url.partition("://")[2].split("/")
    if request.param == "s3":
        server: EmbeddedServer = request.getfixturevalue("embedded_server")
        proxy = Proxy(target=int(server.endpoint.rsplit(":", 1)[1]), prefix=f"/{bucket}/")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        found = Recorder(prefix, lambda asked: asked.key)
    elif request.param == "gcs":
        emulator: Emulator = request.getfixturevalue("gcs_emulator")
        proxy = Proxy(target=int(emulator.endpoint.rsplit(":", 1)[1]))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        found = Recorder(prefix, _of_gcs)
    else:
        emulator = request.getfixturevalue("azure_emulator")
        proxy = Proxy(target=int(emulator.endpoint.split(":")[2].partition("/")[0]), prefix=f"/{ACCOUNT}/{bucket}/")
        connection = emulator.variables["AZURE_STORAGE_CONNECTION_STRING"]
        given = connection.replace(emulator.endpoint, f"{proxy.endpoint}/{ACCOUNT}")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", given)
        found = Recorder(prefix, lambda asked: asked.key)
    methods = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "LIST")
    proxy.arm(Rule(fault=Fault(name="seen", before=found.before), methods=methods, key="", times=10**9))
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BIRKHOFF_STORE", url)
    yield found
    proxy.close()


def _work(recorder: Recorder, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the three roles do, each its own."""

    def run(role: str, *arguments: object) -> None:
        recorder.role = role
        code, _, err = captured(capsys, *map(str, arguments))
        assert code == 0, err

    (folder / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")
    for seed in (1, 2, 1):  # the third finds the shards of the first, and makes them young
        generator = torch.Generator().manual_seed(seed)
        save_file({"a.weight": torch.randn(64, 64, generator=generator)}, folder / "net.safetensors")
        run("publisher", "compress", folder / "m.yaml", "--executor", "inline")
    run("publisher", "promote", "net@v1")
    run("publisher", "label", "net@v1", "licence=MIT")
    run("puller", "pull", "net@stable", "-o", folder / "pulled")
    run("puller", "verify", "net@v2")
    run("collector", "gc", "--yes", "--grace", "0s", "--keep", 1)
    run("collector", "gc", "--yes", "--grace", "0s")


def test_every_request_of_a_role_is_allowed_and_none_is_left_out(
    recorder: Recorder, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _work(recorder, tmp_path, capsys)
    kind = request.node.callspec.params["recorder"]
    allowed = {"s3": _aws, "gcs": _google, "azure": _microsoft}[kind]
    refused = [one for one in recorder.asked if not allowed(one)]
    assert refused == []
    seen = {(one.role, one.method in ("PUT", "POST"), one.key.split("/")[0]) for one in recorder.asked}
    assert {("publisher", True, "blobs"), ("publisher", True, "models"), ("collector", True, "runs")} <= seen
    assert any(one.method == "DELETE" and one.role == "collector" for one in recorder.asked)


@pytest.mark.parametrize("allowed", ["_aws", "_google", "_microsoft"])
def test_what_a_role_may_not_do_is_refused(allowed: str) -> None:
    judge: Callable[[Asked], bool] = globals()[allowed]

    def may(role: str, method: str, key: str, *headers: str, found: bool = True) -> bool:
        return judge(Asked(role, method, key, frozenset(headers), found))

    for key in ("blobs/sha256/ab/cd", "shards/ab/cd.json"):
        assert not may("publisher", "DELETE", key)
        assert not may("puller", "PUT", key)
        assert not may("puller", "DELETE", key)
        assert not may("collector", "PUT", key)
        assert may("collector", "DELETE", key)
    assert may("publisher", "DELETE", "runs/open/x.json")
    assert may("publisher", "PUT", "models/m/aliases/latest.json", "if-match")
    assert may("publisher", "PUT", "blobs/sha256/ab/cd", "if-none-match", found=False)
    assert may("publisher", "PUT", "models/m/aliases/latest.json") == (allowed != "_aws")
    assert may("publisher", "PUT", "blobs/sha256/ab/cd") == (allowed != "_google")


def _aws(asked: Asked) -> bool:
    """Whether the role's policy allows a request and the bucket's does not deny it."""
    action = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
    if asked.method == "LIST":
        return True
    wanted = action[asked.method]

    def meets(statement: dict[str, list[str]]) -> bool:
        patterns = [one.removeprefix("arn:aws:s3:::BUCKET/PREFIX/") for one in statement["Resource"]]
        return wanted in statement["Action"] and any(fnmatchcase(asked.key, one) for one in patterns)

    own = json.loads((POLICIES / f"{asked.role}.json").read_text())["Statement"]
    conditions, deletions = json.loads((POLICIES / "bucket-policy.json").read_text())["Statement"]
    assert conditions["Condition"] == {"Null": {"s3:if-none-match": "true", "s3:if-match": "true"}}
    assert deletions["Condition"] == {"ArnNotLike": {"aws:PrincipalArn": "COLLECTOR"}}
    bare = not asked.headers & {"if-match", "if-none-match"}
    denied = (meets(conditions) and bare) or (meets(deletions) and asked.role != "collector")
    return any(meets(one) for one in own) and not denied


def _google(asked: Asked) -> bool:
    """Whether some binding gives the role each permission that a request takes: two, where it overwrites."""
    verbs = {"GET": "get", "HEAD": "get", "LIST": "list", "PATCH": "update", "DELETE": "delete"}
    needed = {f"storage.objects.{verbs.get(asked.method, 'create')}"}
    if asked.method in ("POST", "PUT") and asked.found:
        # One that loses by its condition takes only the first; who may not delete may still try to create.
        needed = needed | ({"storage.objects.delete"} if not asked.key.startswith(("blobs/", "shards/")) else set())
        if asked.method == "PUT":
            needed = needed | {"storage.objects.delete"}
    roles = json.loads((POLICIES / "gcs-roles.json").read_text())
    name = f"projects/_/buckets/BUCKET/objects/PREFIX/{asked.key}"
    held: set[str] = set()
    for binding in json.loads((POLICIES / "gcs-policy.json").read_text())["bindings"]:
        if asked.role.upper() not in binding["members"]:
            continue
        expression = binding.get("condition", {}).get("expression")
        starts = re.findall(r"resource\.name\.startsWith\('([^']*)'\)", expression or "")
        if expression is not None:
            assert expression == " || ".join(f"resource.name.startsWith('{one}')" for one in starts)
        if expression is None or name.startswith(tuple(starts)):
            held |= set(roles[binding["role"].rpartition("/")[2]])
    return needed <= held


def _microsoft(asked: Asked) -> bool:
    """Whether the role has the action, and its condition lets it through for this path."""
    name = {"puller": "Birkhoff reader"}.get(asked.role, f"Birkhoff {asked.role}")
    (role,) = [one for one in json.loads((POLICIES / "azure-roles.json").read_text()) if one["Name"] == name]
    action = {"PUT": "write", "DELETE": "delete"}.get(asked.method, "read")
    if f"{BLOBS}/{action}" not in role["DataActions"]:
        return False
    condition = POLICIES / f"azure-{asked.role}.condition"
    if not condition.exists():
        return True
    text = condition.read_text()
    (limited,) = re.findall(r"!\(ActionMatches\{'([^']*)'\}\)", text)
    if limited != f"{BLOBS}/{action}":
        return True
    paths = re.findall(r"'PREFIX/([^']*)'", text)
    return any(fnmatchcase(asked.key, one) for one in paths)
