"""Local checkpoint files: their contents, single tensors, and their digest.

`open_checkpoint` reads headers only and returns picklable descriptors. `read_tensor` reads one of them with one ranged
read, in any process that sees the file. The format is detected from the content, never from the suffix, and every claim
of a file is checked before it is used.
"""

import hashlib
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from birkhoff.codec.dtype_names import ITEM_BYTES
from birkhoff.pipeline.checkpoint.converted import open_legacy, read_legacy, unpack_checkpoint
from birkhoff.pipeline.checkpoint.descriptors import Checkpoint, CheckpointFormat, StoredTensor, extent_bytes
from birkhoff.pipeline.checkpoint.safetensors import open_safetensors, open_sharded
from birkhoff.pipeline.checkpoint.sniff import Content, sniff, suffix_remark
from birkhoff.pipeline.checkpoint.torch_zip import is_torch_zip, open_torch_zip
from birkhoff.pipeline.errors import SourceError
from birkhoff.pipeline.files import file_sha256
from birkhoff.pipeline.loading import LOADING
from birkhoff.pipeline.text import first_line, shown

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "CheckpointFormat", "StoredTensor", "open_checkpoint", "read_tensor", "source_digest"]


def open_checkpoint(path: Path | str, *, cache: Path | None = None, under: str | None = None) -> Checkpoint:
    """Describe the checkpoint in a local file. Only headers are read, so memory does not grow with the file.

    Reads safetensors files, their sharded index, `torch.save` files of either form, and a zip with one such file.
    Legacy pickles and such zips are rewritten once into the folder `cache`, and their descriptors point there. Only
    that rewrite of a legacy pickle loads the whole file. `under` is the dotted path of keys to one of several state
    dicts.

    Raises:
        UnsafeSourceError: A pickle names code to run, or holds only objects that code would make.
        SourceError: The file is missing, truncated, corrupt, of an unknown kind or without a state dict, or `cache` is
            needed and not given.
        OutputError: `cache` is needed and cannot be written.
    """
    path = Path(path).absolute()
    try:
        content = sniff(path)
        try:
            return _open(path, content, cache, under)
        except SourceError as error:
            if remark := suffix_remark(path, content):
                raise type(error)(f"{error}{remark}") from error
            raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({first_line(error)}); check path and permissions") from error


def read_tensor(tensor: StoredTensor, memory: "torch.Tensor | None" = None) -> "torch.Tensor":
    """Read one tensor: contiguous, on the CPU, with its stored dtype and shape.

    It lies in its own memory, or, if it is stored contiguous, at the beginning of `memory` (uint8, at least its bytes).

    Raises:
        SourceError: The file is gone, has become shorter since it was opened, or does not match its own checksum; the
            tensor's strides lead out of its bytes.
    """
    with LOADING:  # headers are read without it
        import torch

        from birkhoff.codec.dtypes import DTYPES

    if sys.byteorder != "little":
        raise SourceError(f"{tensor.path}: stored little-endian, this machine is not; use a little-endian one")
    if extent_bytes(tensor.shape, tensor.stride, ITEM_BYTES[tensor.dtype]) > tensor.nbytes:
        raise SourceError(f"{tensor.path}: tensor {shown(tensor.name)} reaches beyond its {tensor.nbytes} bytes")
    raw = torch.empty(tensor.nbytes, dtype=torch.uint8) if memory is None else memory[: tensor.nbytes]
    view = raw.numpy().data
    done = 0
    try:
        with Path(tensor.path).open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            # One read call returns at most 2 GiB.
            while done < tensor.nbytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise SourceError(f"{tensor.path}: cannot be read ({first_line(error)}); put it back") from error
    if done < tensor.nbytes:
        raise SourceError(
            f"{tensor.path}: tensor {shown(tensor.name)} needs {tensor.nbytes} bytes at {tensor.offset}, {done} are"
            " left; the file has changed since it was opened, open it again"
        )
    if tensor.crc32 is not None and zlib.crc32(raw.numpy().data) != tensor.crc32:
        raise SourceError(
            f"{tensor.path}: the bytes of tensor {shown(tensor.name)} do not match the checksum stored with them;"
            " the file is corrupt, download it again"
        )
    return raw.view(DTYPES[tensor.dtype]).as_strided(tensor.shape, tensor.stride).contiguous()


def source_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 in hex of the source file's bytes, streamed.

    For a sharded checkpoint it is the SHA-256 of what `sha256sum` prints for index and shards, in `files` order.

    Raises:
        SourceError: A file is gone.
    """
    try:
        digests = [file_sha256(file) for file in checkpoint.files]
    except OSError as error:
        raise SourceError(f"{checkpoint.path}: cannot be read ({first_line(error)}); put it back") from error
    if len(digests) == 1:
        return digests[0]
    listing = (f"{digest}  {file.name}\n" for digest, file in zip(digests, checkpoint.files, strict=True))
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _open(path: Path, content: Content, cache: Path | None, under: str | None) -> Checkpoint:
    if under is not None and content in ("safetensors file", "JSON index"):
        raise SourceError(f"{path}: a {content} holds one flat state dict, nothing under {shown(under)}; drop `under`")
    if content == "safetensors file":
        return open_safetensors(path)
    if content == "JSON index":
        return open_sharded(path)
    if content == "zip file":
        return open_torch_zip(path, under) if is_torch_zip(path) else _open_packed(path, cache, under)
    legacy = read_legacy(path)
    return open_legacy(path, legacy, _required(path, cache, "a legacy pickle"), under)


def _open_packed(path: Path, cache: Path | None, under: str | None) -> Checkpoint:
    """Return a checkpoint inside a zip file: the facts of the inner file, under the outer file's name."""
    inner = unpack_checkpoint(path, _required(path, cache, "a zip that packs a checkpoint"))
    try:
        content = sniff(inner)
        if content != "legacy pickle" and not (content == "zip file" and is_torch_zip(inner)):
            raise SourceError(f"{inner}: a {content}, expected what torch.save writes; unpack it by hand")
        checkpoint = _open(inner, content, cache, under)
    except SourceError as error:
        raise type(error)(str(error).replace(f"{inner}", f"{path} (unpacked)")) from error
    return replace(checkpoint, path=path, files=(path,), nbytes=path.stat().st_size)


def _required(path: Path, cache: Path | None, kind: str) -> Path:
    if cache is None:
        raise SourceError(f"{path}: is {kind}, which is rewritten once into a folder; pass cache=FOLDER")
    return cache.absolute()
