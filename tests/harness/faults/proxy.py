"""A loopback proxy in front of an S3 server that counts requests by method and key, and does harm by rule.

It speaks as much HTTP/1.1 as S3 clients use: keep-alive, `Expect: 100-continue`, bodies by length or in chunks. The
Host header goes on as it came, so signatures hold. Answers are read whole before they go on, so a rule can change them.
"""

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from typing import IO
from urllib.parse import parse_qs, unquote, urlsplit

from tests.harness.faults.catalogue import Answer, Break, Fault, Request

_CONNECT_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Rule:
    """Which requests a fault meets: those of `method` whose key matches, after the first `skip`, `times` of them."""

    fault: Fault
    methods: tuple[str, ...]
    key: str
    skip: int = 0
    times: int = 1
    injected: int = 0
    hook: Callable[[], object] | None = None
    """Called before the fault takes effect: kills of processes at a stage."""

    def takes(self, request: Request) -> bool:
        """Whether this request is to be harmed; counts it if so."""
        if request.method not in self.methods or not re.match(self.key, request.key) or self.injected >= self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.injected += 1
        return True


@dataclass
class Proxy:
    """The proxy in front of the server at the port `target`; listens from the start until `close`."""

    target: int
    prefix: str = "/"
    """Cut off paths to get keys: `/bucket/folder/`."""
    rule: Rule | None = None
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by method and first part of the key."""

    def __post_init__(self) -> None:
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._calm = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody."""
        self._ended.set()
        self.arm(None)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def arm(self, rule: Rule | None) -> None:
        """Follow this rule from now on; None for no harm. Stalls end."""
        with self._lock:
            self.rule = rule
            self._calm.set()
            self._calm = threading.Event()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(client)
        try:
            with client, client.makefile("rb") as stream:
                while self._exchange(client, stream):
                    pass
        except (OSError, http.client.HTTPException):
            pass  # the client went, or the server: what a proxy can do is to hang up
        finally:
            with self._lock:
                self._open.discard(client)

    def _exchange(self, client: socket.socket, stream: IO[bytes]) -> bool:
        """One request and its answer; False at the end of the connection."""
        first = stream.readline(1 << 16).decode("latin-1").split()
        if len(first) != 3:
            return False
        headers = _headers(stream)
        request = _request(first[0], first[1], headers, self.prefix)
        fault = self._harm(request)
        try:
            if fault is not None and fault.early is not None:
                fault.early(client)
            if headers.get("Expect", "").lower() == "100-continue":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.body = _body(headers, stream)
            answer = None
            if fault is not None and fault.before is not None:
                answer = fault.before(request, self._calm)
            if answer is None:
                answer = self._forward(first[0], first[1], headers, request.body)
                if fault is not None and fault.after is not None:
                    fault.after(answer, self._calm)
            answer.send(client, bodiless=first[0] == "HEAD")
        except Break as broken:
            if broken.reset:  # no polite end: a RST, as from a machine that went away
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return True

    def _harm(self, request: Request) -> Fault | None:
        with self._lock:
            self.seen[request.method, request.key.split("/")[0]] += 1
            rule = self.rule
            taken = rule is not None and rule.takes(request)
        if rule is None or not taken:
            return None
        if rule.hook is not None:
            rule.hook()
        return rule.fault

    def _forward(self, method: str, target: str, headers: Message, body: bytes) -> Answer:
        server = http.client.HTTPConnection("127.0.0.1", self.target, timeout=_CONNECT_SECONDS)
        try:
            server.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("expect", "connection", "transfer-encoding", "content-length"):
                    server.putheader(name, value)
            if body or method == "PUT":
                server.putheader("Content-Length", str(len(body)))
            server.endheaders(body or None)
            response = server.getresponse()
            dropped = ("transfer-encoding", "connection")
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
            return Answer(status=response.status, reason=response.reason, headers=kept, body=response.read())
        finally:
            server.close()


def _headers(stream: IO[bytes]) -> Message:
    lines = []
    while (line := stream.readline(1 << 16)) not in (b"\r\n", b"\n", b""):
        lines.append(line)
    return BytesParser().parsebytes(b"".join(lines), headersonly=True)


def _body(headers: Message, stream: IO[bytes]) -> bytes:
    if headers.get("Transfer-Encoding", "").lower() != "chunked":
        return stream.read(int(headers.get("Content-Length") or 0))
    parts = []
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    _headers(stream)
    return b"".join(parts)


def _request(method: str, target: str, headers: Message, prefix: str) -> Request:
    parts = urlsplit(target)
    path, asked = unquote(parts.path), parse_qs(parts.query)
    named = {name.lower(): text for name, text in headers.items()}
    if "prefix" in asked or "list-type" in asked:
        folder = prefix.strip("/").partition("/")[2]
        return Request(method="LIST", key=asked.get("prefix", [""])[0].removeprefix(f"{folder}/"), headers=named)
    return Request(method=method, key=path.removeprefix(prefix), headers=named)
