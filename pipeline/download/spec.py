"""The `source` of a manifest: the files of a model, and what to take from each.

    source: checkpoints/x.pth                # a path, file://, http(s)://, s3://, gs:// or az://
    source: package://WHEEL/folder/x.pth     # a file of an installed Python package, by its path in the wheel
    source: hf://ORG/REPO@REV/x.safetensors  # a file of the Hugging Face Hub; default: the default branch
    source:                                  # the same file at several addresses, tried in turn
      urls: [https://a.org/x.pth, https://mirror.org/x.pth]
      sha256: 3f6c...                        # optional, always checked
    source:                                  # several files make one model
      - {urls: [https://a.org/x.pth], keep: ["image_encoder.*"]}
      - {urls: [https://b.org/y.pth], under: Decoder, prefix: "decoder."}

This module opens no file or connection.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urldefrag, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from birkhoff.pipeline.errors import StoreError
from birkhoff.pipeline.store.base import BUCKETS, StoreAddress
from birkhoff.pipeline.store.endpoints import is_exposed
from birkhoff.pipeline.store.keys import DIGEST, MAX_COMPONENT_BYTES, check_key

Scheme = Literal["path", "package", "http", "https", "s3", "gs", "az", "hf"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PERMISSIONS = re.compile(
    r"X-(Amz|Goog)-(Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig"
    r"|((access|auth|api|private|session)[-_]?)?token|(api|access|secret)[-_]?key|password|passwd|secret",
    re.I,
)
"""Query parameters of addresses that carry their own permission: AWS's, Google's, Azure's, and tokens."""
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""Names of packages on the index (PyPA, "Names and normalization")."""
_HUB = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._%-]{0,199}))?/(?P<path>[^?#@]+)"
)
_FORMS = "a path or URL, a mapping with `urls`, or a list of these"


class SourcePart(BaseModel):
    """One file of a model: its addresses, and what to take from it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True)

    urls: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Addresses of the same file, tried in turn: paths or URLs."""
    sha256: str | None = None
    """SHA-256 of the file in hex. Default: the digest of the first download is required from then on."""
    under: Annotated[str, Field(min_length=1)] | None = None
    """Path of the state dict if the file has several, joined by dots: `ema.model`."""
    keep: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """Globs on the tensors to take. Default: every tensor."""
    prefix: str = ""
    """Prefix for the name of every tensor taken."""
    allow_http: bool = False
    """Accept plain http addresses of other machines."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(normal_url(url) for url in urls)

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, digest: str | None) -> str | None:
        if digest is not None and not DIGEST.fullmatch(digest.lower()):
            raise ValueError(f"expected 64 hex digits as sha256sum prints them, got {digest[:80]!r}")
        return None if digest is None else digest.lower()

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, globs: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if globs is not None and "" in globs:
            raise ValueError("an empty glob matches nothing; leave `keep` out to take every tensor")
        return globs

    @model_validator(mode="after")
    def _check_encryption(self) -> Self:
        for url in self.urls:
            check_plain_http(url, allowed=self.allow_http)
        return self

    @property
    def whole(self) -> bool:
        """Whether the file is taken as it is."""
        return self.keep is None and self.under is None and not self.prefix

    @property
    def name(self) -> str:
        """File name of the first address, which names the file wherever it comes from."""
        return file_name(self.urls[0])

    def absolute(self, base: Path) -> "SourcePart":
        """Return the part with absolute paths; `base` is the manifest's folder."""
        urls = tuple(str(base / Path(url).expanduser()) if scheme_of(url) == "path" else url for url in self.urls)
        return self.model_copy(update={"urls": urls})


def _as_parts(source: Any) -> Any:
    """Convert the short forms to the long one, a list of mappings."""
    items = source if isinstance(source, list | tuple) else [source]
    if any(not isinstance(item, str | dict | SourcePart) or item == "" for item in items):
        raise ValueError(f"expected {_FORMS}")
    return tuple({"urls": (item,)} if isinstance(item, str) else item for item in items)


SourceSpec = Annotated[
    tuple[SourcePart, ...], Field(min_length=1, strict=False), BeforeValidator(_as_parts, json_schema_input_type=Any)
]
"""The files that make one model, in the order of their tensors. One file may be a string or a mapping."""


def scheme_of(url: str) -> Scheme:
    """Return how a normalised address is reached."""
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else "path"
    return scheme if scheme in ("package", "http", "https", "hf", *BUCKETS) else "path"  # type: ignore[return-value]


def is_remote(url: str) -> bool:
    """Return whether a normalised address is on another machine."""
    return scheme_of(url) in ("http", "https", "hf", *BUCKETS)


def normal_url(url: str) -> str:
    """Return the address in normal form: a path for file:// URLs, no fragment. Raises ValueError.

    A URL that may contain a password is not repeated in the error.
    """
    found = _SCHEME.match(url)
    if not found:
        if not url or "\0" in url:
            raise ValueError("expected a path or a URL, got an empty text or one with a NUL")
        return url
    scheme, rest = found[1].lower(), url[found.end() :]
    if scheme == "file":
        return _file_path(rest)
    if scheme == "package":
        package_place(f"package://{rest}")
        return f"package://{rest}"
    if scheme == "hf":
        return hub_place(f"hf://{rest}").url
    if scheme not in ("http", "https", *BUCKETS):
        raise ValueError(
            f"unknown scheme {scheme!r}; expected a path, file://, package://, http://, https://, s3://, gs://, az:// "
            "or hf://"
        )
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "expected no credentials in the URL; put those of s3:// into the AWS environment or a profile, those of "
            "gs:// and az:// where their own tools look, and those of https:// into ~/.netrc"
        )
    query = parse_qsl(rest.partition("?")[2].partition("#")[0], keep_blank_values=True)
    if any(_PERMISSIONS.fullmatch(name) for name, _ in query):
        raise ValueError(
            "expected no signed URL and no token in it: whoever reads the manifest could use it; name the object as "
            "s3://BUCKET/KEY (or gs://, az://), whose credentials come from the environment, or download it and give "
            "its path"
        )
    normal = f"{scheme}://{rest}" if scheme in BUCKETS else _web_url(f"{scheme}://{rest}")
    if scheme in BUCKETS:
        bucket_place(normal)
    file_name(normal)
    return normal


def file_name(url: str) -> str:
    """Return the last component of an address. Raises ValueError if it is not a usable file name."""
    path = urlsplit(url).path if scheme_of(url) in ("http", "https") else url
    name = path.rpartition("/")[2]
    name = unquote(name) if scheme_of(url) in ("http", "https") else name
    if not is_remote(url):
        return Path(url).name
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > MAX_COMPONENT_BYTES:
        raise ValueError(f"{shown_url(url)}: expected a URL that ends in a file name")
    return name


def shown_url(url: str) -> str:
    """Return the address for messages and records, without its query, which may contain a signature."""
    if scheme_of(url) in ("http", "https") and "?" in url:
        return url.partition("?")[0]
    return url


def check_plain_http(url: str, *, allowed: bool) -> None:
    """Refuse an unencrypted address on another machine. Raises ValueError."""
    if allowed or not is_exposed(url):
        return
    raise ValueError(
        f"{shown_url(url)}: plain http can be read and changed on its way; use https, or allow it with allow_http: true"
    )


def bucket_place(url: str) -> tuple[str, str]:
    """Return bucket URL and key of an object's address. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        return StoreAddress.parse(f"{scheme}://{bucket}").url, check_key(key)
    except StoreError as error:
        raise ValueError(str(error).replace("store URL", f"{scheme} source")) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A file of a model repository on the Hugging Face Hub. `revision` is None for the default branch."""

    repository: str
    """`ORG/REPO`."""
    revision: str | None
    path: str

    @property
    def url(self) -> str:
        """The address in normal form."""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repository}{revision}/{self.path}"

    def at(self, commit: str) -> "HubPlace":
        """Return the same file at a commit."""
        return replace(self, revision=commit)


def hub_place(url: str) -> HubPlace:
    """Return repository, revision and file of an hf:// URL. Raises ValueError."""
    found = _HUB.fullmatch(url)
    parts = found["path"].split("/") if found else []
    if found is None or not all(parts) or {".", ".."} & set(parts) or not url.isprintable() or "\\" in url:
        raise ValueError(
            "expected hf://ORG/REPO/FILE or hf://ORG/REPO@REVISION/FILE, a slash in the revision as %2F, got "
            f"{url[:200]!r}"
        )
    revision = None if found["revision"] is None else unquote(found["revision"])
    place = HubPlace(repository=found["repository"], revision=revision, path=found["path"])
    if len(parts[-1].encode()) > MAX_COMPONENT_BYTES:
        raise ValueError(f"{url[:200]}: expected a URL that ends in a file name")
    return place


def package_place(url: str) -> tuple[str, str]:
    """Return distribution and inner path of a package:// URL. Raises ValueError."""
    name, _, path = url.removeprefix("package://").partition("/")
    parts = path.split("/")
    if not _DISTRIBUTION.fullmatch(name) or not all(parts) or {".", ".."} & set(parts) or "\\" in path:
        raise ValueError(f"expected package://WHEEL/PATH/FILE, the path as the wheel has it, got {url[:200]!r}")
    return name, path


def _web_url(url: str) -> str:
    try:
        usable = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise ValueError(f"expected https://HOST/PATH/FILE without blanks, got {shown_url(url)[:200]!r}")
    return urldefrag(url).url


def _file_path(rest: str) -> str:
    path = unquote(rest.removeprefix("localhost"))
    if not path.startswith(("/", "./", "../")) or "\0" in path:
        raise ValueError(f"expected file:///PATH or a relative file://./PATH, got {'file://' + rest!r}")
    return path
