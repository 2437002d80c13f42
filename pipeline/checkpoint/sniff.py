"""Detect the format of a checkpoint file from its first bytes. The suffix is only used for a remark."""

from pathlib import Path
from typing import Literal

from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.text import shown

Content = Literal["zip file", "legacy pickle", "plain pickle", "safetensors file", "JSON index"]

# The pickled magic number that opens a legacy file (torch.serialization.MAGIC_NUMBER).
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_SNIFF_BYTES = 512
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_PROTOCOLS = range(2, 6)
# A longer header is not a length but text or noise; the reader's own limit is far below.
_MAX_PLAUSIBLE_HEADER = 1 << 48
# (offset, lower-case bytes, what that is and what to do)
_FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (0, b"<!doctype html", "an HTML page, not a checkpoint; the download link has answered with a page"),
    (0, b"<html", "an HTML page, not a checkpoint; the download link has answered with a page"),
    (0, b"\x1f\x8b", "gzip data; decompress it first"),
    (0, b"\x89hdf\r\n", "an HDF5 file; convert it to safetensors"),
    (0, b"pk\x05\x06", "an empty zip file; download it again"),
    (257, b"ustar", "a tar file, as torch.save wrote before 0.2; load it where you trust it and save it again"),
)
_USUAL: dict[str, set[Content]] = {
    ".safetensors": {"safetensors file"},
    ".pth": {"zip file", "legacy pickle", "plain pickle"},
    ".pt": {"zip file", "legacy pickle", "plain pickle"},
    ".zip": {"zip file"},
    ".json": {"JSON index"},
}


def sniff(path: Path) -> Content:
    """Return the format of a file, from its first bytes.

    Raises:
        SourceError: There is no such file, or it is not regular, empty, or not a checkpoint.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise SourceError(f"{path}: not a regular file; name the checkpoint file itself")
    with path.open("rb") as file:
        head = file.read(_SNIFF_BYTES)
    if not head:
        raise SourceError(f"{path}: is empty; download it again")
    content = _content_of(head)
    if content is not None:
        return content
    for offset, magic, verdict in _FOREIGN:
        if head[offset:].lower().startswith(magic):
            raise SourceError(f"{path}: is {verdict}")
    claim = f", whatever the suffix {path.suffix} says" if path.suffix.lower() in _USUAL else ""
    raise SourceError(
        f"{path}: begins with {shown(head[:12])}, expected safetensors, torch.save or a zip of it{claim};"
        " name the weight file, or download it again"
    )


def suffix_remark(path: Path, content: Content) -> str:
    """Return what to append to an error if suffix and content disagree; empty if they agree."""
    usual = _USUAL.get(path.suffix.lower())
    if usual is None or content in usual:
        return ""
    return f" (by content a {content}, whatever the suffix {path.suffix} says)"


def _content_of(head: bytes) -> Content | None:
    # First, because a header length can begin with the bytes of a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_PLAUSIBLE_HEADER:
        return "safetensors file"
    if head.startswith(_ZIP_MAGIC):
        return "zip file"
    if head[0] == 0x80 and len(head) > 1 and head[1] in _PICKLE_PROTOCOLS:
        return "legacy pickle" if head.startswith(LEGACY_MAGIC) else "plain pickle"
    return "JSON index" if head.lstrip().startswith(b"{") else None
