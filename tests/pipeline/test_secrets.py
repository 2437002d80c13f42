"""What must not leak, and what must not be trusted on the way: credentials, plain http, Ray's own doors."""

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from birkhoff.pipeline.cli import main
from birkhoff.pipeline.errors import ManifestError, StoreError
from birkhoff.pipeline.plan.manifest import load_manifest
from birkhoff.pipeline.registry.signing import new_key
from birkhoff.pipeline.store.base import StoreSettings
from birkhoff.pipeline.store.default import open_default_store
from birkhoff.pipeline.store.open import open_store
from birkhoff.pipeline.store.seaweedfs import EmbeddedServer, environment
from tests.patience import PATIENT_SECONDS

REMOTE = "http://store.example.org:9000"


class TestManifests:
    @pytest.mark.parametrize(
        "line",
        [
            "access_key: CANARY",
            "aws_secret_access_key: CANARY",
            "secret: CANARY",
            "session_token: CANARY",
            "password: CANARY",
            "credentials: {key: CANARY}",
            "sign: CANARY",
            "private-key: CANARY",
        ],
    )
    @pytest.mark.parametrize("inside", ["{}\nmodels: [{{name: a, source: x}}]", "models: [{{name: a, source: x, {}}}]"])
    def test_credentials_are_refused_with_a_hint(self, tmp_path: Path, line: str, inside: str) -> None:
        (tmp_path / "m.yaml").write_text(inside.format(line))
        with pytest.raises(
            ManifestError, match=r"credentials never belong in a manifest; put them into the AWS env"
        ) as e:
            load_manifest(tmp_path / "m.yaml")
        assert "CANARY" not in str(e.value)

    @pytest.mark.parametrize(
        "source",
        [
            "https://user:CANARY@example.org/x.pth",
            "s3://AKIA:CANARY@bucket/x.pth",
            "https://b.s3.amazonaws.com/x.pth?X-Amz-Credential=CANARY&X-Amz-Signature=CANARY",
            "https://b.s3.amazonaws.com/x.pth?AWSAccessKeyId=CANARY&Expires=1&Signature=CANARY",
            "https://storage.googleapis.com/b/x.pth?x-goog-signature=CANARY",
            "https://a.blob.core.windows.net/b/x.pth?sv=1&sig=CANARY",
            "https://a.blob.core.windows.net/b/x.pth?sv=1&%73ig=CANARY",
            "https://example.org/x.pth?token=CANARY",
            "https://example.org/x.pth?download=1&access_token=CANARY",
            "https://example.org/x.pth?api-key=CANARY",
            "https://[example.org/x.pth?token=CANARY",
        ],
    )
    def test_addresses_that_carry_credentials(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "m.yaml").write_text(json.dumps({"models": [{"name": "a", "source": source}]}))
        with pytest.raises(ManifestError, match=r"models\[0\].source: expected no (credentials|signed URL)") as caught:
            load_manifest(tmp_path / "m.yaml")
        assert "CANARY" not in str(caught.value)

    def test_stores_that_carry_credentials(self, tmp_path: Path) -> None:
        for url in ("s3://AKIA:CANARY@bucket/p", "https://u:CANARY@h/p"):
            (tmp_path / "m.yaml").write_text(json.dumps({"store": url, "models": [{"name": "a", "source": "x"}]}))
            with pytest.raises(ManifestError) as caught:
                load_manifest(tmp_path / "m.yaml")
            assert "CANARY" not in str(caught.value)


class TestPlainHttp:
    @pytest.fixture(autouse=True)
    def _aws(self, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.delenv("BIRKHOFF_ALLOW_HTTP", raising=False)

    @pytest.mark.parametrize("by", ["environment", "setting"])
    def test_to_another_machine_is_refused(self, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
        settings = StoreSettings(endpoint=REMOTE if by == "setting" else None)
        if by == "environment":
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", REMOTE)
        with pytest.raises(StoreError, match=f"endpoint {REMOTE}: plain http can be read and changed .*--allow-http"):
            open_store("s3://bucket", settings)

    def test_unless_it_is_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", REMOTE)
        with open_store("s3://bucket", StoreSettings(allow_http=True)) as store:
            assert store.address.settings.allow_http  # and so it reaches the workers
        with open_default_store("s3://bucket", allow_http=True):
            pass
        monkeypatch.setenv("BIRKHOFF_ALLOW_HTTP", "1")
        with open_default_store("s3://bucket"):
            pass

    @pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9", "https://h:9"])
    def test_to_this_machine_or_with_tls_needs_no_leave(self, endpoint: str) -> None:
        open_store("s3://bucket", StoreSettings(endpoint=endpoint)).close()

    @pytest.mark.parametrize("where", ["flag", "manifest", "nowhere"])
    def test_the_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.invalid:9000")
        monkeypatch.setenv("BIRKHOFF_ALLOW_HTTP", "")  # so that what `main` sets is undone
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        allow = "allow_http: true\n" if where == "manifest" else ""
        (tmp_path / "m.yaml").write_text(f"store: s3://bucket/p\n{allow}models: [{{name: a, source: x.pth}}]\n")
        flags = ["--allow-http"] if where == "flag" else []
        monkeypatch.setattr(sys, "argv", ["birkhoff", *flags, "compress", str(tmp_path / "m.yaml")])
        with pytest.raises(SystemExit) as caught:
            main.main()
        line = capsys.readouterr().err
        assert caught.value.code == (7 if where == "nowhere" else 8), line
        assert ("plain http can be read" in line) == (where == "nowhere")

    def test_certificates_are_checked(self) -> None:
        with open_store("s3://bucket") as store:
            client: Any = store.inner.inner._client  # type: ignore[attr-defined]
            assert client._endpoint.http_session._verify  # True, or the authorities that AWS_CA_BUNDLE names


class TestCanary:
    """No file, object, log or line of any command holds the credentials, whatever goes wrong."""

    @pytest.fixture
    def world(
        self, embedded_server: EmbeddedServer, no_aws: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> "_World":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path / "home"))
        return _World(embedded_server, tmp_path, monkeypatch)

    def test_of_runs_and_failures(self, world: "_World", capfd: pytest.CaptureFixture[str]) -> None:
        def run(*arguments: str, **environment: str) -> int:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                patch.setattr(sys, "argv", ["birkhoff", "--debug", *arguments])
                with pytest.raises(SystemExit) as caught:
                    main.main()
            out, err = capfd.readouterr()
            world.text += out + err
            return int(caught.value.code or 0)

        compress = ("compress", "m.yaml", "--executor", "inline", "--sign", "key")
        assert run(*compress) == 0, world.text
        assert run("pull", "net", "-o", "pulled", "--require-signature", "key.pub") == 0
        for command in (("verify", "net"), ("plan", "m.yaml"), ("inspect", "net"), ("list", "--json")):
            assert run(*command) == 0, world.text
        assert run("verify", "net", AWS_SECRET_ACCESS_KEY=world.canary) == 9
        assert run(*compress, AWS_ACCESS_KEY_ID="AKIA", AWS_SECRET_ACCESS_KEY=world.canary) == 9
        assert run("list", AWS_ENDPOINT_URL_S3="http://127.0.0.1:9") == 8
        assert run("list", AWS_ENDPOINT_URL_S3=f"http://u:{world.canary}@127.0.0.1:9") == 7
        assert run("list", "--store", f"s3://u:{world.canary}@bucket/p") == 7
        assert "Traceback" in world.text  # --debug was on
        world.look()

    @pytest.mark.slow
    def test_of_workers(self, world: "_World") -> None:
        """Ray's own logs are kept by --debug, tasks among them; and Ray asks for a token, as the README says."""
        code = (
            "import sys\n"
            "from birkhoff.pipeline.cli import main\n"
            "sys.argv = ['birkhoff', '--debug', 'compress', 'm.yaml', '--sign', 'key', '--executor', 'ray']\n"
            "try: main.main()\n"
            "finally:\n"
            "    from ray._raylet import AuthenticationMode, get_authentication_mode\n"
            "    print('asks for a token:', get_authentication_mode() == AuthenticationMode.TOKEN)"
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as logs:  # Ray's sockets need a short path
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**kept, "RAY_TMPDIR": logs},
                capture_output=True,
                text=True,
                timeout=PATIENT_SECONDS,
            )
            world.text = done.stdout + done.stderr
            assert done.returncode == 0, world.text
            assert "asks for a token: True" in done.stdout
            assert any(Path(logs).rglob("*.log"))
            world.look(Path(logs))


class _World:
    """A store, a manifest and a signing key, canaries for credentials, and the search for them."""

    def __init__(self, server: EmbeddedServer, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.canary = f"canary{secrets.token_hex(12)}"
        self.text = ""
        self._folder = folder
        given = environment(server.home)
        given["BIRKHOFF_STORE"] += f"/{secrets.token_hex(4)}"
        for name, value in {**given, "UNRELATED_TOKEN": self.canary}.items():
            patch.setenv(name, value)
        new_key(folder / "key")
        private = (folder / "key").read_text().splitlines()[1]
        self._secrets = [self.canary, server.credentials.secret_key, private]
        generator = torch.Generator().manual_seed(0)
        save_file({"a.weight": torch.randn(64, 64, generator=generator)}, folder / "net.safetensors")
        (folder / "m.yaml").write_text("models: [{name: net, source: net.safetensors}]\n")

    def look(self, *more: Path) -> None:
        """In all output, every object of the store, and every file that was written."""
        with open_default_store() as store:
            objects = {info.key: store.get(info.key) for info in store.list()}
        folders = (self._folder, *more)
        paths = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = {str(path): path.read_bytes() for path in paths if path.name != "key"}
        assert any(key.startswith("models/net/names/") for key in objects)
        assert len(files) > 3
        for where, body in {"output": self.text.encode(), **objects, **files}.items():
            for secret in self._secrets:
                assert secret.encode() not in body, f"{where} holds a credential"


def test_debug_logging_keeps_botocore_quiet() -> None:
    """At level DEBUG botocore would log the headers of every request, signatures among them."""
    probe = (
        "import sys, logging; sys.argv = ['birkhoff', '--debug', 'key', 'show', 'none']\n"
        "from birkhoff.pipeline.cli import main\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "print(*(logging.getLogger(n).getEffectiveLevel() for n in ('botocore', 'boto3', 'urllib3')))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=PATIENT_SECONDS)
    assert done.stdout.split() == [str(logging.WARNING)] * 3
