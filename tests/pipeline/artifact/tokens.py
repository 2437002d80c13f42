"""A token server for docker-registry: it gives tokens for what a user may do, as the registry token specification says.

https://distribution.github.io/distribution/spec/auth/token/ and .../oauth/ (refresh tokens, by POST).
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.pipeline.artifact.registries import PASSWORD, USER

ISSUER, SERVICE = "tests", "registry.tests"
REFRESH = "refresh-token-of-the-tests"


@dataclass
class TokenServer:
    """`seconds` is how long its tokens hold."""

    folder: Path
    seconds: int = 300
    public: tuple[str, ...] = ("pull",)
    """What anybody may do."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """How it was asked, and for what scope."""
    realm: str = ""
    bundle: Path = Path()

    def __post_init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)]), datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self._key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - timedelta(hours=1))
        made = builder.not_valid_after(now + timedelta(hours=1)).sign(self._key, hashes.SHA256())
        self._certificate = base64.b64encode(made.public_bytes(serialization.Encoding.DER)).decode()
        self.bundle = self.folder / "tokens.pem"
        self.bundle.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    @property
    def config(self) -> dict[str, object]:
        """For the registry."""
        return {"realm": self.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(self.bundle)}

    def token(self, scope: str, *, known: bool) -> str:
        """A token for as much of a scope as the user may have."""
        access = []
        if scope:
            kind, name, actions = scope.split(":")
            given = [one for one in actions.split(",") if known or one in self.public]
            access = [{"type": kind, "name": name, "actions": given}]
        now = datetime.now(UTC)
        claims = {"iss": ISSUER, "sub": USER if known else "", "aud": SERVICE, "access": access, "jti": str(now)}
        claims |= {"iat": now, "nbf": now - timedelta(seconds=60), "exp": now + timedelta(seconds=self.seconds)}
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return jwt.encode(claims, pem, algorithm="RS256", headers={"x5c": [self._certificate]})


def _in_order(scope: str) -> str:
    """A scope with its actions sorted: a registry names them in any order."""
    head, colon, actions = scope.rpartition(":")
    return head + colon + ",".join(sorted(actions.split(",")))


@contextmanager
def token_server(folder: Path, **options: int) -> Iterator[TokenServer]:
    """The server until the block ends."""
    found = TokenServer(folder, **options)
    basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = dict(parse_qsl(urlsplit(self.path).query))
            login = self.headers.get("Authorization")
            found.asked.append(("login" if login else "nobody", _in_order(asked.get("scope", ""))))
            self._send(asked, known=login == basic, refused=login is not None and login != basic)

        def do_POST(self) -> None:
            asked = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
            found.asked.append((asked["grant_type"], _in_order(asked.get("scope", ""))))
            right = asked.get("refresh_token") == REFRESH
            self._send(asked, known=right, refused=not right, name="access_token")

        def _send(self, asked: dict[str, str], *, known: bool, refused: bool, name: str = "token") -> None:
            wrong = refused or asked.get("service") != SERVICE
            body = b"{}" if wrong else json.dumps({name: found.token(asked.get("scope", ""), known=known)}).encode()
            self.send_response(401 if wrong else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.realm = f"http://127.0.0.1:{server.server_port}/token"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()
