"""Containers: any bytes are refused with the project's own error, or decode to what the format page says.

Differences have no base here, and are refused; `target_tensor` gives them one.

An input that begins with `!` is a header and data that are put together here, so that the length field need not be
guessed: `!`, the JSON header up to the first newline, then the data. One that begins with `?` is a container of version
2 whose index is packed here: `?`, the index as text up to the first newline, then the streams. Others are taken as they
are.
"""

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard

from birkhoff.codec import tensor as codec
from birkhoff.codec.container import DATA, INDEX, VERSION_KEY, CodedTensor, LatticeParams, PaperParams, parse, serialise
from birkhoff.codec.errors import BirkhoffError
from birkhoff.codec.profiles import PROFILES, Decision
from tests.codec import page_reader
from tests.codec.by_profile import encode_tensor

INSTRUMENT = ()
TOKENS = (
    *(
        b'"__metadata__"',
        b'"__birkhoff__":"1"',
        b'"__birkhoff__":"2"',
        b'"__birkhoff__":"3"',
        b'"index":',
        b'"data":',
        b'"dtype":"U8"',
        b'"shape":[',
        b'"data_offsets":[',
        b"\n",
        b"!",
    ),
    *(
        b"codec=lattice",
        b"codec=planes",
        b"codec=raw",
        b"codec=paper",
        b"codec=difference",
        b"dtype=F32",
        b"dtype=BF16",
        b"dtype=F8_E4M3",
    ),
    *(
        b"shape=",
        b"parts=",
        b"columns=",
        b"step=",
        b"escapes=",
        b"path=1",
        b"path=0",
        b"path=2",
        b"U=1225",
        b"U=1600",
        b"K=3",
        b"times=",
        b"stride=",
        b"base=",
    ),
    *(b"bits=", b"per_row=1", b"centre=", b"far=", b",", b" ", b"68719476736", b"-1", b"1e9", b"\x28\xb5\x2f\xfd"),
)

SECONDS = 2.0
"""Processor time that one input may take."""

MOST_WEIGHTS = 1 << 22
"""More declared weights are parsed but not decoded: a reader's work is in proportion to what it is asked for."""

COMPARED = 1 << 12
"""Weights up to which the page's reader, which loops in Python, is asked too."""


def samples() -> list[CodedTensor]:
    """Small tensors that between them take every branch of the page."""
    generator = torch.Generator().manual_seed(1)
    tailed = torch.randn(9, 67, generator=generator)
    tailed[0, 0], tailed[8, 66] = 900.0, -500.0
    wide = (torch.randn(64, 66, generator=generator) * torch.randn(64, 1, generator=generator).exp()).half()
    small = torch.randn(6, 13, generator=generator) * 0.02
    coarse = PROFILES["fast"].target_db
    assert coarse is not None
    made = [
        codec.encode_tensor(name, tensor, Decision(codec="lattice", target_db=coarse, path=path))
        for name, tensor, path in (
            ("fast", tailed, False),
            ("path", wide, True),
            ("flat", torch.randn(5, 1, 3, 3, generator=generator).double(), False),
        )
    ]
    for name, tensor, profile in (
        ("count", torch.tensor(12345), "fast"),
        ("steps", torch.arange(40), "fast"),
        ("none", torch.empty(0, 3), "fast"),
        ("rows", small, "paper"),
        ("rings", torch.cat((small, small * 6)).reshape(4, 3, 13), "paper"),
    ):
        made.append(encode_tensor(name, tensor, PROFILES[profile]))
    # The page allows byte planes of no elements; we store those raw.
    nothing = CodedTensor(name="nothing", codec="planes", dtype="F32", shape=(0, 3), parts=(b"",))
    return [*(item.tensor for item in made), nothing]


def seeds() -> Iterator[bytes]:
    """Containers of one tensor and of several, in both forms of an input, and the stored fixtures' headers."""
    for tensors in (*([tensor] for tensor in samples()), samples()):
        blob = serialise(tensors)
        yield blob
        yield take_apart(blob)
    for fixture in sorted((Path(page_reader.__file__).parent / "fixtures").glob("*.safetensors")):
        yield take_apart(fixture.read_bytes())[:6000]


def take_apart(blob: bytes) -> bytes:
    """A container in the form whose header, or index, is put together here."""
    (length,) = struct.unpack("<Q", blob[:8])
    if any(b'"__birkhoff__":"%d"' % version in blob[: 8 + length] for version in (2, 3)):
        end = 8 + length + json.loads(blob[8 : 8 + length])[INDEX]["data_offsets"][1]
        return b"?" + zstandard.ZstdDecompressor().decompress(blob[8 + length : end]) + b"\n" + blob[end:]
    return b"!" + blob[8 : 8 + length].rstrip() + b"\n" + blob[8 + length :]


def put_together(data: bytes) -> bytes:
    """The container that an input stands for."""
    if data[:1] not in (b"!", b"?"):
        return data
    header, _, body = data[1:].partition(b"\n")
    if data[:1] == b"?":
        index = zstandard.ZstdCompressor().compress(header)
        places = {INDEX: (0, len(index)), DATA: (len(index), len(index) + len(body))}
        stored = {key: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for key, (a, b) in places.items()}
        version = "3" if b"codec=difference" in header else "2"
        header = json.dumps({"__metadata__": {VERSION_KEY: version}, **stored}).encode()
        body = index + body
    return struct.pack("<Q", len(header)) + header + body


def check(data: bytes) -> None:
    """Parse the bytes and decode every tensor."""
    blob = put_together(data)
    start = time.process_time()
    try:
        tensors = parse(blob)
        if sum(tensor.weights for tensor in tensors) > MOST_WEIGHTS:
            return
        plain = [tensor for tensor in tensors if not isinstance(tensor.params, LatticeParams)]
        together, each = outcome(plain, codec.decode_plain), outcome(plain, lambda some: map(codec.decode_tensor, some))
        assert together == each, "plain tensors together are not those of each"
        decoded = {tensor.name: codec.decode_tensor(tensor) for tensor in tensors}
    except BirkhoffError as error:
        refusal(error, data)
        decoded = {}
    assert time.process_time() - start < SECONDS, "a hang"
    if decoded and sum(tensor.weights for tensor in tensors) <= COMPARED:
        compare(blob, tensors, decoded)


def outcome(
    tensors: list[CodedTensor], decode: Callable[[list[CodedTensor]], Iterable[torch.Tensor]]
) -> list[bytes] | None:
    """The bytes of each tensor, or None if one is refused."""
    try:
        return [one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for one in decode(tensors)]
    except BirkhoffError:
        return None


def refusal(error: BirkhoffError, data: bytes) -> None:
    """One line that can be printed, in proportion to the input whose names it quotes."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert len(text.encode()) < 1000 + 4 * len(data), len(text)


def compare(
    blob: bytes, tensors: list[CodedTensor], decoded: dict[str, torch.Tensor], bases: dict[str, bytes] | None = None
) -> None:
    """Our tensors are those of the reader written from the page, bit for bit (`paper`: to the last digits)."""
    if any(tensor.dtype not in page_reader.DTYPES for tensor in tensors):
        return  # numpy has no such type
    with np.errstate(all="ignore"):
        expected = page_reader.read(blob, bases)
    assert list(expected) == list(decoded)
    for tensor in tensors:
        mine, theirs = decoded[tensor.name].numpy(), expected[tensor.name]
        assert mine.shape == theirs.shape == tensor.shape
        if tensor.codec != "paper":
            assert mine.tobytes() == theirs.astype(mine.dtype).tobytes(), f"{tensor.name}: other values than the page's"
        elif isinstance(tensor.params, PaperParams) and max(map(abs, tensor.params.centre + tensor.params.far)) < 1:
            limit = 1e-3 if tensor.dtype == "F16" else 1e-5  # an ulp apart before they are rounded
            assert np.abs(mine - theirs).max() < limit, f"{tensor.name}: other values than the page's"
