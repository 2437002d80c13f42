"""What the emulator of Google Cloud Storage leaves out: credentials, and signed URLs that end.

A proxy in front of it that gives out tokens to a service account, wants one with every request, and takes V4 signed
URLs as Google's manual describes them: it checks the signature, and refuses what has expired.
https://docs.cloud.google.com/storage/docs/authentication/signatures
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.harness.faults.catalogue import Answer
from tests.harness.faults.proxy import Proxy

TOKEN = "ya29.of-the-tests"
ACCOUNT = "publisher@project.iam.gserviceaccount.com"


@dataclass
class SigningFront(Proxy):
    """`key_file` writes the credentials that it takes."""

    signed: list[str] = field(default_factory=list)
    """Verdicts on signed requests, in their order."""

    def __post_init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        super().__post_init__()

    def key_file(self, folder: Path) -> Path:
        """A service account's key file."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = folder / "service-account.json"
        found = {"type": "service_account", "client_email": ACCOUNT, "private_key": pem.decode(), "private_key_id": "1"}
        path.write_text(json.dumps(found | {"token_uri": f"{self.endpoint}/token", "project_id": "project"}))
        return path

    def _forward(self, method: str, target: str, headers: Message, body: bytes) -> Answer:
        if target == "/token":
            token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            return _answer(200, json.dumps(token))
        if "X-Goog-Signature" in target:
            refusal = self._refusal(method, target, headers)
            self.signed.append(refusal or "taken")
            if refusal:
                text = f"<?xml version='1.0'?><Error><Code>{refusal}</Code><Message>{refusal}</Message></Error>"
                return _answer(400 if refusal == "ExpiredToken" else 403, text)
            bucket, _, name = urlsplit(target).path.lstrip("/").partition("/")
            return super()._forward(method, f"/storage/v1/b/{bucket}/o/{name.replace('/', '%2F')}", headers, body)
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return _answer(401, json.dumps({"error": {"code": 401, "errors": [{"reason": "required"}]}}))
        return super()._forward(method, target, headers, body)

    def _refusal(self, method: str, target: str, headers: Message) -> str | None:
        parts = urlsplit(target)
        given = dict(parse_qsl(parts.query, strict_parsing=True))
        signature = bytes.fromhex(given.pop("X-Goog-Signature"))
        query = "&".join(f"{quote(name, safe='~')}={quote(given[name], safe='~')}" for name in sorted(given))
        host = headers["Host"]
        canonical = f"{method}\n{parts.path}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
        scope = given["X-Goog-Credential"].partition("/")[2]
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"GOOG4-RSA-SHA256\n{given['X-Goog-Date']}\n{scope}\n{digest}"
        try:
            self._key.public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return "SignatureDoesNotMatch"
        began = datetime.strptime(given["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if datetime.now(UTC) > began + timedelta(seconds=int(given["X-Goog-Expires"])):
            return "ExpiredToken"
        return None


def _answer(status: int, text: str) -> Answer:
    return Answer(status=status, reason="OK", headers=[("Content-Type", "application/json")], body=text.encode())
