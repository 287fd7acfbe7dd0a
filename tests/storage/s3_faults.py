"""An S3 server (moto) behind a small HTTP proxy that fails on request: what lies between a store and its bucket."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect", "date", "server"}


@dataclass
class Fault:
    """What goes wrong, with the next `times` requests of a method whose path matches.

    `kind` is "slow down" (503), "drop upload" (the connection ends after half of the request's body), "drop download"
    (after half of the answer's), or "lose answer" (the request is done, its answer never arrives).
    """

    kind: str
    method: str
    path: str = ""
    times: int = 1
    hit: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether the fault strikes this request; counts it."""
        if self.hit >= self.times or method != self.method or re.search(self.path, path) is None:
            return False
        self.hit += 1
        return True


@dataclass
class Faults:
    """Faults to come, and keys that listings leave out (as if they were written a moment ago)."""

    endpoint: str = ""
    pending: list[Fault] = field(default_factory=list)
    unlisted: str | None = None
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, method: str, path: str = "", times: int = 1) -> Fault:
        """Let something go wrong."""
        self.pending.append(Fault(kind, method, path, times))
        return self.pending[-1]

    def strike(self, method: str, path: str) -> str | None:
        """The kind of fault that this request meets."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            return next((fault.kind for fault in self.pending if fault.takes(method, path)), None)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self.pending.clear()
        self.unlisted = None


@contextmanager
def s3_with_faults() -> Iterator[Faults]:
    """A moto server with a bucket named `bucket`, reached through a proxy."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    faults = Faults()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(moto.get_host_and_port(), faults))
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    faults.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        _ask(moto.get_host_and_port(), "PUT", "/bucket", b"", {"Content-Length": "0"})
        yield faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        moto.stop()


def _ask(address: tuple[str, int], method: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read(), answer.getheader("Content-Length")
    finally:
        connection.close()


def _handler(address: tuple[str, int], faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

        def _pass_on(self) -> None:
            kind = faults.strike(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if kind == "drop upload":
                self.rfile.read(length // 2)
                self._hang_up()
                return
            body = self.rfile.read(length)
            if kind == "slow down":
                self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
                return
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            status, answer_headers, content, stated = _ask(address, self.command, self.path, body, headers)
            if kind == "lose answer":
                self._hang_up()
                return
            if faults.unlisted and "list-type=2" in self.path:
                content = _without(content, faults.unlisted)
            self._answer(status, answer_headers, content, stated, half=kind == "drop download")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

        def _answer(
            self, status: int, headers: list[Any], content: bytes, stated: str | None = None, half: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            length = stated if self.command == "HEAD" and stated else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
            if half:
                self._hang_up()

        def _hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


def _without(listing: bytes, key: str) -> bytes:
    """A listing of a bucket that does not know yet of keys matching a pattern."""

    def keep(match: re.Match[bytes]) -> bytes:
        return b"" if re.search(key.encode(), match[1]) else match[0]

    return re.sub(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", keep, listing, flags=re.DOTALL)
