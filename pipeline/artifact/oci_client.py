"""A client of the OCI distribution specification 1.1: blobs and manifests of one repository, over HTTP.

Credentials come from `docker login`, `skopeo login` or `oras login`: REGISTRY_AUTH_FILE, else config.json in
DOCKER_CONFIG, else ~/.docker/config.json, or the credential helper that such a file names. `requests` checks TLS
(REQUESTS_CA_BUNDLE); plain http is for this machine, or must be allowed. An upload is sent in pieces; after a failure
it continues from where the registry says it stands.
"""

import base64
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

import birkhoff
from birkhoff.pipeline.backoff import Backoff
from birkhoff.pipeline.documents import MAX_DOCUMENT_BYTES
from birkhoff.pipeline.errors import (
    IntegrityError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from birkhoff.pipeline.registry.documents import sha256
from birkhoff.pipeline.store.endpoints import is_exposed, is_loopback
from birkhoff.pipeline.text import first_line, printable

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"

_REFERENCE = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9a-f:]+\](:[0-9]{1,5})?)/(?P<repository>[a-z0-9]+"
    r"([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_PIECE_BYTES = 16 << 20
_TIMEOUT = (10.0, 60.0)
"""Seconds for a connection, and between two bytes."""
_ATTEMPTS = 4
_PASSING = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True, kw_only=True)
class OciReference:
    """A manifest in a registry: `oci://HOST[:PORT]/REPOSITORY[:TAG][@sha256:DIGEST]`; the default tag is `latest`."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> "OciReference":
        """Parse a reference. Raises StoreError."""
        found = _REFERENCE.fullmatch(text)
        if found is None:
            raise StoreError(
                f"{printable(text[:200])}: expected oci://HOST/REPOSITORY:TAG, the repository in lower case, or "
                "@sha256:DIGEST; credentials come from `docker login` or `skopeo login`"
            )
        tag = found["tag"] or (None if found["digest"] else "latest")
        return cls(host=found["host"], repository=found["repository"], tag=tag, digest=found["digest"])

    @property
    def name(self) -> str:
        """Tag or digest to ask the registry for."""
        return self.digest or self.tag or "latest"

    @property
    def url(self) -> str:
        """The reference in normal form."""
        tag, digest = (f":{self.tag}" if self.tag else ""), (f"@{self.digest}" if self.digest else "")
        return f"oci://{self.host}/{self.repository}{tag}{digest}"


class Registry:
    """One repository of a registry. Threads that only read may share it.

    Every method raises StoreUnreachableError, StoreDeniedError, and StoreError for other refusals.
    """

    def __init__(self, reference: OciReference, *, allow_http: bool = False) -> None:
        self._reference = reference
        local = is_loopback(urlsplit(f"//{reference.host}").hostname or "")
        self._schemes = ["https", "http"] if local or allow_http else ["https"]
        self._session = requests.Session()
        self._session.headers["User-Agent"] = f"birkhoff-compression/{birkhoff.__version__}"
        self._token: str | None = None

    def close(self) -> None:
        """Release connections."""
        self._session.close()

    def manifest(self, name: str) -> tuple[bytes, str]:
        """Return body and digest of the manifest with a tag or digest. Raises ObjectNotFoundError, IntegrityError."""
        response = self._ask("GET", f"manifests/{name}", headers={"Accept": MANIFEST_TYPE})
        self._expect(response, 200, f"manifest {name}")
        body = response.content
        if len(body) > MAX_DOCUMENT_BYTES:
            raise IntegrityError(f"{self._reference.url}: its manifest is larger than any; not a model of this program")
        digest = f"sha256:{sha256(body)}"
        if name.startswith("sha256:") and digest != name:
            raise IntegrityError(f"{self._reference.url}: the registry sent a manifest with digest {digest}")
        return body, digest

    def put_manifest(self, name: str, body: bytes) -> str:
        """Store a manifest under a tag or its digest; return the digest."""
        response = self._ask("PUT", f"manifests/{name}", data=body, headers={"Content-Type": MANIFEST_TYPE})
        self._expect(response, 201, f"manifest {name}")
        return f"sha256:{sha256(body)}"

    def has_blob(self, digest: str, nbytes: int) -> bool:
        """Return whether the repository has a blob at this size."""
        response = self._ask("HEAD", f"blobs/{digest}")
        if response.status_code == 404:
            return False
        self._expect(response, 200, f"blob {digest}")
        return int(response.headers.get("Content-Length", nbytes)) == nbytes

    def blob(self, digest: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of a blob, unchecked. Raises ObjectNotFoundError."""
        if length == 0:
            return b""
        end = "" if length is None else str(start + length - 1)
        headers = {"Range": f"bytes={start}-{end}"} if start or length is not None else {}
        response = self._ask("GET", f"blobs/{digest}", headers={**headers, "Accept-Encoding": "identity"})
        if response.status_code == 416:
            return b""
        self._expect(response, (200, 206), f"blob {digest}")
        body = response.content
        if response.status_code == 200 and headers:  # the registry ignores ranges
            body = body[start:] if length is None else body[start : start + length]
        return body

    def put_blob(self, digest: str, body: bytes) -> None:
        """Upload a blob in pieces; a broken piece continues where the registry says it stands."""
        place, done = self._begin(digest), 0
        backoff = Backoff(_ATTEMPTS)
        while done < len(body):
            piece = body[done : done + _PIECE_BYTES]
            span = {"Content-Range": f"{done}-{done + len(piece) - 1}", "Content-Type": "application/octet-stream"}
            try:
                response = self._ask("PATCH", place, data=piece, headers=span, tries=1)
                if response.status_code in _PASSING or response.status_code == 416:
                    raise StoreUnreachableError(f"{self._reference.url}: {response.status_code} for a piece")
                self._expect(response, (202, 204), f"upload of {digest}")
                place, done = self._location(response), done + len(piece)
            except StoreUnreachableError:
                if not backoff.again():
                    raise
                response = self._ask("GET", place)
                if response.status_code in (400, 404, 416):  # the answer was lost, and the upload's state with it
                    place, done = self._begin(digest), 0
                    continue
                self._expect(response, (202, 204), f"upload of {digest}")
                place, done = self._location(response), _stands(response)
        response = self._ask("PUT", place, params={"digest": digest}, headers={"Content-Length": "0"})
        self._expect(response, 201, f"blob {digest}")

    def _begin(self, digest: str) -> str:
        """Start an upload; return its URL."""
        response = self._ask("POST", "blobs/uploads/", headers={"Content-Length": "0"})
        self._expect(response, 202, f"upload of {digest}")
        return self._location(response)

    def _location(self, response: requests.Response) -> str:
        """Return the URL at which an upload continues. Refuses another host, which would get the credentials."""
        place = urljoin(response.url, response.headers.get("Location", ""))
        here, there = urlsplit(response.url), urlsplit(place)
        if (here.scheme, here.netloc) != (there.scheme, there.netloc):
            raise StoreError(
                f"{self._reference.url}: the registry sends uploads to {there.netloc}, which is another host"
            )
        return place

    def _ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        tries: int = _ATTEMPTS,
        **more: Any,
    ) -> requests.Response:
        """Return the answer to a request, repeated with credentials if the registry asks, and after transient
        errors."""
        backoff = Backoff(tries)
        while True:
            try:
                response = self._once(method, path, dict(headers or {}), more)
                if response.status_code not in _PASSING or not backoff.again():
                    return response
            except requests.exceptions.SSLError as error:
                raise StoreError(
                    f"{self._reference.url}: TLS fails ({first_line(error)}); set REQUESTS_CA_BUNDLE to the "
                    "certificate of its authority"
                ) from None
            except requests.RequestException as error:
                if not backoff.again():
                    raise StoreUnreachableError(
                        f"{self._reference.url}: {self._reference.host} does not answer ({type(error).__name__})"
                    ) from None

    def _once(self, method: str, path: str, headers: dict[str, str], more: Mapping[str, Any]) -> requests.Response:
        url = path if "://" in path else f"{self._base()}/{path}"
        for _ in range(2):
            if self._token is not None:
                headers["Authorization"] = self._token
            # Registries redirect blobs to other hosts; `requests` drops the credentials on the way.
            response = self._session.request(method, url, headers=headers, timeout=_TIMEOUT, **more)
            if response.status_code != 401 or not self._answer(response.headers.get("WWW-Authenticate", "")):
                return response
        return response

    def _base(self) -> str:
        """Return `https://HOST/v2/REPOSITORY`, with http for a registry on this machine without TLS."""
        if len(self._schemes) > 1:
            try:
                self._session.get(f"https://{self._reference.host}/v2/", timeout=_TIMEOUT)
                self._schemes = ["https"]
            except requests.exceptions.SSLError as error:
                self._schemes = ["http"] if "WRONG_VERSION_NUMBER" in str(error).upper() else ["https"]
        return f"{self._schemes[0]}://{self._reference.host}/v2/{self._reference.repository}"

    def _answer(self, challenge: str) -> bool:
        """Answer a challenge, Basic or for a token; return False if nothing is left to try."""
        scheme, _, rest = challenge.partition(" ")
        login, facts, before = self._login(), dict(_CHALLENGE.findall(rest)), self._token
        if scheme.lower() == "basic" and login.get("auth"):
            self._token = f"Basic {login['auth']}"
        elif scheme.lower() == "bearer" and not is_exposed(facts.get("realm", "http://?")):
            self._token = self._bearer(facts, login) or before
        return self._token != before

    def _bearer(self, facts: Mapping[str, str], login: Mapping[str, str]) -> str | None:
        """Return a token of the server that a challenge names: by a refresh token, by a password, or anonymous.

        https://distribution.github.io/distribution/spec/auth/token/, and .../oauth/ for refresh tokens.
        """
        asked = {key: facts[key] for key in ("service", "scope") if key in facts}
        if refresh := login.get("identitytoken"):
            form = {"grant_type": "refresh_token", "client_id": "birkhoff-compression", "refresh_token": refresh}
            found = self._session.post(facts["realm"], data={**asked, **form}, timeout=_TIMEOUT)
        else:
            headers = {"Authorization": f"Basic {login['auth']}"} if login.get("auth") else {}
            found = self._session.get(facts["realm"], params=asked, headers=headers, timeout=_TIMEOUT)
        if found.status_code != 200:
            return None
        try:
            answer = found.json()
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (ValueError, KeyError, AttributeError):
            raise StoreError(
                f"{self._reference.url}: {urlsplit(facts['realm']).netloc} gives no readable token, though the "
                "registry refers to it"
            ) from None

    def _login(self) -> dict[str, str]:
        """Return the credentials that a login stored for the host: `auth`, user:password in base64, or
        `identitytoken` to refresh."""
        folder, host = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"), self._reference.host
        for path in (os.environ.get("REGISTRY_AUTH_FILE") or "", folder / "config.json"):
            try:
                config = json.loads(Path(path).read_bytes())
                helper = config.get("credHelpers", {}).get(host) or config.get("credsStore")
                found = config.get("auths", {}).get(host) or {}
                base64.b64decode(found.get("auth", ""), validate=True)
                held = {name: str(found[name]) for name in ("auth", "identitytoken") if found.get(name)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if held or (helper and (held := _ask_helper(str(helper), host))):
                return held
        return {}

    def _expect(self, response: requests.Response, wanted: int | tuple[int, ...], what: str) -> None:
        if response.status_code in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return
        if response.status_code in (401, 403):
            raise StoreDeniedError(
                f"{self._reference.url}: {self._reference.host} refuses {what} ({response.status_code}); log in with "
                "`skopeo login` or `docker login`"
            )
        if response.status_code == 404:
            raise ObjectNotFoundError(f"{self._reference.url}: the registry has no {what}")
        text = printable(response.text[:200])
        raise StoreError(f"{self._reference.url}: {what}: answer {response.status_code}: {text}")


def _stands(response: requests.Response) -> int:
    """Return the number of bytes of an upload that the registry has, from its Range."""
    found = re.fullmatch(r"(?:bytes=)?0-([0-9]+)", response.headers.get("Range", ""))
    return int(found[1]) + 1 if found and found[1] != "0" else 0


def _ask_helper(helper: str, host: str) -> dict[str, str]:
    """Return a host's credentials from a Docker credential helper, in the form of `_login`; empty if it has none.

    https://github.com/docker/docker-credential-helpers: `docker-credential-NAME get`, with the host on standard input.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", helper):
        return {}
    try:
        ended = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=host.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT[1],
        )
        found = json.loads(ended.stdout) if ended.returncode == 0 else {}
        user, secret = str(found["Username"]), str(found["Secret"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return {}
    if user == "<token>":
        return {"identitytoken": secret}
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}
