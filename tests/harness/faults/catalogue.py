"""The faults that the proxy can do, and what may come of each."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import MappingProxyType
from typing import Literal

Outcome = Literal["completes", "fails", "either"]

TRICKLE_PIECES = 8
TRICKLE_SECONDS = 0.02
DRIP_SECONDS = 0.2
"""Between the bytes of an answer that never ends: within the read time-out of the suite's clients."""


class Break(Exception):  # noqa: N818 - it is how a fault ends a connection
    """The connection ends here, with a reset or in order."""

    def __init__(self, *, reset: bool = True) -> None:
        super().__init__()
        self.reset = reset


@dataclass(slots=True, kw_only=True)
class Request:
    """What a client asks. `method` is LIST for listings, whose `key` is the prefix asked for."""

    method: str
    key: str
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """By lower-case names."""
    body: bytes = b""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What the server said, still to be sent, in `pieces`; after it `then` happens."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    declared: int | None = None
    """Content-Length, where it differs from the body's."""
    pieces: int = 1
    pause: float = TRICKLE_SECONDS
    """Seconds after each of several pieces."""
    then: Callable[[], None] | None = None

    def send(self, client: socket.socket, *, bodiless: bool) -> None:
        """Write it out. Raises Break."""
        length = len(self.body) if self.declared is None else self.declared
        headers = [(name, value) for name, value in self.headers if bodiless or name.lower() != "content-length"]
        if not bodiless and self.status != 204:
            headers.append(("Content-Length", str(length)))
        head = f"HTTP/1.1 {self.status} {self.reason}\r\n" + "".join(f"{name}: {text}\r\n" for name, text in headers)
        client.sendall(head.encode("latin-1") + b"\r\n")
        body = b"" if bodiless else self.body
        step = max(1, -(-len(body) // self.pieces))
        for place in range(0, len(body), step):
            client.sendall(body[place : place + step])
            if self.pieces > 1:
                time.sleep(self.pause)
        if self.then is not None:
            self.then()


Early = Callable[[socket.socket], None]
Before = Callable[[Request, threading.Event], "Answer | None"]
After = Callable[[Answer, threading.Event], None]

_ALL = ("GET", "HEAD", "PUT", "DELETE", "LIST")
_READS = ("GET", "LIST")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of harm.

    early: before the request's body was read. before: instead of the server, or with a changed request. after: to the
    server's answer. `once` and `lasting` say what must come of an operation that meets it once, or at every try,
    unless `exceptions` say otherwise for a stage.
    """

    name: str
    methods: tuple[str, ...] = _ALL
    early: Early | None = None
    before: Before | None = None
    after: After | None = None
    once: Outcome = "completes"
    lasting: Outcome = "fails"
    exceptions: Mapping[str, Outcome] = field(default_factory=lambda: MappingProxyType({}))

    def expected(self, stage: str, *, lasting: bool) -> Outcome:
        """What must come of it."""
        return self.exceptions.get(stage, self.lasting if lasting else self.once)


def refusal(
    request: Request, status: int, code: str, message: str = "", *headers: tuple[str, str], **elements: str
) -> Answer:
    """An answer with an error's XML; `elements` are those it has besides Code and Message."""
    inner = "".join(f"<{name}>{text}</{name}>" for name, text in elements.items())
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{inner}</Error>'
    body = b"" if request.method == "HEAD" else text.encode()
    return Answer(status=status, reason=code, headers=[("Content-Type", "application/xml"), *headers], body=body)


def _refuse(status: int, code: str, *headers: tuple[str, str]) -> Before:
    return lambda request, _: refusal(request, status, code, f"injected {code}", *headers)


def _page(request: Request, _: threading.Event) -> Answer:
    body = b"" if request.method == "HEAD" else b"<html>Sign in to the network</html>"
    return Answer(status=200, reason="OK", headers=[("Content-Type", "text/html")], body=body)


def _reset_early(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Break


def _reset(*_: object) -> None:
    raise Break


def _hang_up(*_: object) -> None:
    raise Break(reset=False)


def _stall(_: object, ended: threading.Event) -> None:
    ended.wait(30)
    raise Break


def _flip_request(request: Request, _: threading.Event) -> None:
    request.body = _flipped(request.body)


def _flipped(body: bytes) -> bytes:
    if not body:
        return body
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _flip(answer: Answer, _: threading.Event) -> None:
    if answer.status < 300:
        answer.body = _flipped(answer.body)


def _flip_unnoticed(answer: Answer, ended: threading.Event) -> None:
    answer.headers = [(name, text) for name, text in answer.headers if not name.lower().startswith("x-amz-checksum")]
    _flip(answer, ended)


def _half(answer: Answer) -> None:
    answer.declared = len(answer.body)
    answer.body = answer.body[: len(answer.body) // 2]


def _reset_midway(answer: Answer, _: threading.Event) -> None:
    _half(answer)
    answer.then = _reset


def _truncate(answer: Answer, _: threading.Event) -> None:
    _half(answer)
    answer.then = _hang_up


def _stall_midway(answer: Answer, ended: threading.Event) -> None:
    _half(answer)
    answer.then = lambda: _stall(answer, ended)


def _shorten(answer: Answer, _: threading.Event) -> None:
    if answer.status < 300:
        answer.body = answer.body[: len(answer.body) // 2]


def _trickle(answer: Answer, _: threading.Event) -> None:
    answer.pieces = TRICKLE_PIECES


def _drip(answer: Answer, _: threading.Event) -> None:
    answer.pieces, answer.pause = len(answer.body), DRIP_SECONDS


def _other_clock(answer: Answer, _: threading.Event) -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(hours=7), usegmt=True)
    answer.headers = [(name, then if name.lower() == "date" else text) for name, text in answer.headers]


_CONFLICT = "ConditionalRequestConflict"

_MADE_ANEW: Mapping[str, Outcome] = MappingProxyType({"find": "completes", "find statistics": "completes"})
"""A stored shard that reads as damaged is no error: it is made again; so are statistics."""

_NO_ANSWER: Mapping[str, Outcome] = MappingProxyType({"gc: sweep": "either"})
"""S3's answer to DELETE is empty, so that any 2xx passes for it; the next collection deletes what is still there."""

FAULTS: tuple[Fault, ...] = (
    Fault(name="500 InternalError", before=_refuse(500, "InternalError")),
    Fault(name="503 SlowDown", before=_refuse(503, "SlowDown")),
    Fault(name="reset before the request's body", early=_reset_early),
    Fault(name="reset after the request's body", before=_reset),
    Fault(name="stall instead of an answer", before=_stall),
    Fault(name="answer lost after the effect (reset)", after=_reset),
    Fault(name="answer lost after the effect (hang-up)", after=_hang_up),
    Fault(name="answer lost after the effect (stall)", after=_stall),
    Fault(name="409 ConditionalRequestConflict", methods=("PUT",), before=_refuse(409, _CONFLICT)),
    Fault(name="reset in the middle of the answer", methods=_READS, after=_reset_midway),
    Fault(name="body cut off, connection closed", methods=_READS, after=_truncate),
    Fault(name="body cut off, length agrees", methods=_READS, after=_shorten, exceptions=_MADE_ANEW),
    Fault(name="stall in the middle of the answer", methods=_READS, after=_stall_midway),
    Fault(name="slow trickle", methods=_READS, after=_trickle, lasting="completes"),
    Fault(name="a few bytes a second, for ever", methods=_READS, after=_drip),
    Fault(name="wrong byte, checksum sent", methods=("GET",), after=_flip, exceptions=_MADE_ANEW),
    Fault(
        name="wrong byte, no checksum", methods=("GET",), after=_flip_unnoticed, once="either", exceptions=_MADE_ANEW
    ),
    Fault(name="wrong byte on the way to the server", methods=("PUT",), before=_flip_request),
    Fault(name="a page of another server", before=_page, once="either", exceptions=_NO_ANSWER),
    Fault(name="403 ExpiredToken", before=_refuse(403, "ExpiredToken"), once="either"),
    Fault(name="403 RequestTimeTooSkewed", before=_refuse(403, "RequestTimeTooSkewed"), once="either"),
    Fault(name="Date seven hours ahead", after=_other_clock, lasting="completes"),
)
