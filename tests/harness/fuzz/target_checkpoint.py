"""Checkpoint files: either described and read, every tensor of the shape it claims, or refused in one line.

The first byte picks the frame around the rest, so that the search need not find magic numbers and lengths by itself:
a whole file, the pickle of a torch.save zip, the header of a safetensors file, an index, the pickles of a legacy file,
a zip that packs one.
"""

import io
import itertools
import json
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from birkhoff.pipeline.checkpoint.open import open_checkpoint, read_tensor
from birkhoff.pipeline.checkpoint.sniff import LEGACY_MAGIC
from birkhoff.pipeline.errors import SourceError

INSTRUMENT = ("zipfile", "pickletools", "torch._weights_only_unpickler", "torch._utils")
TOKENS = (
    *(
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"archive/data.pkl",
        b"archive/data/0",
        b"archive/version",
    ),
    *(
        b"\x80\x02",
        b"\x80\x04",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch\nHalfStorage\n",
    ),
    *(
        b"ccollections\nOrderedDict\n",
        b"X\x07\x00\x00\x00storage",
        b"X\x03\x00\x00\x00cpu",
        b"K\x06",
        b"J\xff\xff\xff\x7f",
    ),
    *(
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"Q",
        b"tR",
        b"(",
        b"t",
        b"}q\x00",
        b"s.",
        b"u.",
        b"\x85",
        b"\x86",
        b"\x87",
    ),
    *(
        b'"dtype":',
        b'"shape":',
        b'"data_offsets":',
        b'"__metadata__":',
        b'"F32"',
        b'"BF16"',
        b'"I64"',
        b'"F8_E4M3"',
        b"[0,8]",
    ),
    *(b'"weight_map":', b'"one.safetensors"', b'"../x"', b"-1", b"9223372036854775807", b"[]", b"{}", b"\xef\xbb\xbf"),
)

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-checkpoint-"))
_SMALL = {"a": torch.arange(2.0), "b": torch.ones(1, dtype=torch.int8)}
_NUMBERS = itertools.count()
warnings.filterwarnings("ignore")


def _torch_zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in (("data.pkl", data), ("byteorder", b"little"), ("data/0", bytes(8)), ("data/1", bytes(1))):
            archive.writestr(f"archive/{name}", body)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def _safetensors(data: bytes) -> bytes:
    header, _, body = data.partition(b"\0")
    return len(header).to_bytes(8, "little") + header + body


def _legacy(data: bytes) -> bytes:
    return LEGACY_MAGIC + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2) + data


def _packed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pt", data)
    return buffer.getvalue()


def _whole(data: bytes) -> bytes:
    return data


_FRAMES: tuple[Callable[[bytes], bytes], ...] = (_whole, _torch_zip, _safetensors, _whole, _legacy, _packed)


def _saved(value: object, *, modern: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def seeds() -> Iterator[bytes]:
    """A small file of each form."""
    modern, legacy = _saved(_SMALL, modern=True), _saved({"model": _SMALL, "epoch": 1}, modern=False)
    with zipfile.ZipFile(io.BytesIO(modern)) as archive:
        yield b"\x01" + archive.read("archive/data.pkl")
    body = save(_SMALL)
    length = int.from_bytes(body[:8], "little")
    yield b"\x00" + modern
    yield b"\x00" + legacy
    yield b"\x00" + body
    yield b"\x02" + body[8 : 8 + length] + b"\0" + body[8 + length :]
    yield b"\x03" + json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}).encode()
    yield b"\x04" + legacy[len(_legacy(b"")) :]
    yield b"\x05" + modern
    view = torch.arange(12.0).reshape(3, 4).t()
    yield b"\x00" + _saved({"state_dict": {"v": view, "w": view[1:]}, "model": 3}, modern=True)
    yield b"\x00" + _saved({"p": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))}, modern=True)


def check(data: bytes) -> None:
    """Open the file, and read every tensor."""
    if not data:
        return
    folder = _FOLDER / f"{next(_NUMBERS) % 2}"
    folder.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(save(_SMALL))
    path = folder / "file"
    path.write_bytes(_FRAMES[data[0] % len(_FRAMES)](data[1:]))
    try:
        checkpoint = open_checkpoint(path, cache=folder / "cache")
        for tensor in checkpoint.tensors:
            assert tuple(read_tensor(tensor).shape) == tensor.shape
    except SourceError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 1500 + 4 * len(str(path)), len(text)
    finally:
        for copy in (folder / "cache").glob("*"):
            copy.unlink()
