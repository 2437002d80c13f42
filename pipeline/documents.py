"""Stored documents: strict JSON of a fixed form, bounded in size, equal bytes for equal content."""

import json
from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from birkhoff.codec import strict_json
from birkhoff.pipeline.errors import IntegrityError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


MAX_DOCUMENT_BYTES = 16 << 20
"""Largest document that is read. A manifest of 10,000 shards takes 6 MB."""


class Document(BaseModel):
    """A stored document: frozen, and unknown fields are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    def to_bytes(self) -> bytes:
        """Return compact JSON in field order, so equal documents give equal bytes."""
        data = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


D = TypeVar("D", bound=Document)


def read_document(kind: type[D], key: str, body: bytes) -> D:
    """Parse a stored document.

    Raises:
        IntegrityError: The object is not such a document.
    """
    try:
        return kind.model_validate(strict_json.parse(body))
    except (ValidationError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{key}: not a {kind.__name__}: {reason}; the stored object is damaged") from None


def parse_bounded(kind: type[D], key: str, body: bytes) -> D:
    """Parse a document, after checking that its size is not above the limit. Raises IntegrityError."""
    check_size(key, body)
    return read_document(kind, key, body)


def check_size(key: str, body: bytes) -> None:
    """Refuse a document of more than `MAX_DOCUMENT_BYTES`. Raises IntegrityError."""
    if len(body) > MAX_DOCUMENT_BYTES:
        raise IntegrityError(f"{key}: larger than {MAX_DOCUMENT_BYTES} bytes: not a document of this program")
