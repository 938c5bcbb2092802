"""A server of files by ranges, or in front of another server, with latency, faults and counts."""

from __future__ import annotations

import argparse
import http.client
import re
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request that was answered."""

    method: str
    path: str
    """With its query."""
    range: str
    """Its header, or nothing."""
    status: int
    sent: int
    """Bytes of the body."""


class Server(ThreadingHTTPServer):
    """Serves a folder, or passes on to `upstream` ("host:port"). `latency`: seconds before each answer.

    `faults` is a queue of what happens to the next GETs instead: a status, "reset" (the connection is
    torn down before the answer) or "cut" (in the middle of it).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path | None = None, *, upstream: str = "", latency: float = 0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.upstream, self.latency = root, upstream, latency
        self.faults: deque[int | str] = deque()
        self.asked: list[Asked] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Serve on a thread of this process."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def clear(self) -> None:
        """Forget what was asked."""
        self.asked.clear()

    @property
    def sent(self) -> int:
        """Bytes that went out as bodies."""
        return sum(asked.sent for asked in self.asked)


class Handler(BaseHTTPRequestHandler):
    """Answers a request in one write, so that no part of it waits for an acknowledgement."""

    protocol_version = "HTTP/1.1"
    server: Server
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def handle_one(self) -> None:
        """Answer whatever it is."""
        body = self.body()
        time.sleep(self.server.latency)
        path = self.path.partition("?")[0]
        fault = self.server.faults.popleft() if self.command == "GET" and self.server.faults else None
        if path == "/-asked":  # for a process that started this one
            sent, n = self.server.sent, len(self.server.asked)
            self.server.clear()
            self.answer(200, {}, f"{n} {sent}".encode(), note=False)
        elif fault == "reset":
            self.note(0, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, {}, b"<Error><Code>Fault</Code><Message>told to</Message></Error>")
        else:
            self.answer(*(self.passed_on(body) if self.server.upstream else self.file(path)), cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def body(self) -> bytes:
        """Read what came with the request."""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Ask the server behind this one."""
        drop = {"transfer-encoding", "content-length", "connection", "expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        found = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in (drop - {"content-length"}) | {"server", "date"}
        }
        connection.close()
        return answer.status, found, data

    def file(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Give a file of the folder, or the part of it that was asked for."""
        assert self.server.root is not None
        file = self.server.root / unquote(path.lstrip("/"))
        if not file.is_file():
            return 404, {}, b""
        said = file.stat()
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{said.st_mtime_ns:x}-{said.st_ino:x}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            return 200, headers | {"Content-Length": str(said.st_size)}, b""
        with file.open("rb") as opened:
            if asked is None:
                return 200, headers, opened.read()
            start = int(asked[1])
            stop = min(int(asked[2] or said.st_size - 1) + 1, said.st_size)
            opened.seek(start)
            return (
                206,
                headers | {"Content-Range": f"bytes {start}-{stop - 1}/{said.st_size}"},
                opened.read(stop - start),
            )

    def note(self, status: int, sent: int) -> None:
        """Keep what was asked."""
        found = Asked(self.command, self.path, self.headers.get("Range", ""), status, sent)
        self.server.asked.append(found)

    def answer(
        self, status: int, headers: dict[str, str], body: bytes, *, note: bool = True, cut: bool = False
    ) -> None:
        """Send an answer."""
        if note:
            self.note(status, len(body))
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        if "content-length" not in map(str.lower, headers) and status != 204:
            headers = headers | {"Content-Length": str(len(body))}
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.connection.sendall(head + (body[: len(body) // 2] if cut else body))
        if cut:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def main() -> None:
    """Serve a folder or another server until the standard input ends; prints the URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--upstream", default="", type=lambda url: urlsplit(url).netloc)
    parser.add_argument("--latency", type=float, default=0)
    args = parser.parse_args()
    with Server(args.root, upstream=args.upstream, latency=args.latency).running() as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
