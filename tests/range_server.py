"""A web server for tests: the files of a folder, in parts as asked, and what goes wrong on the way."""

import contextlib
import http.server
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

PIECE = 1 << 14  # bytes written at once: what a client that hangs up did not take is hardly counted


class Server(http.server.ThreadingHTTPServer):
    """Under /NAME is the file NAME. Under /FAULT/NAME too, and then

    403, 503   this is the answer;
    signed     only a GET with the signature in its query is answered, as buckets do it;
    whole      there are no parts;
    silent     nothing comes;
    cut        of all but the beginning only half comes.
    """

    daemon_threads = True

    def __init__(self, root: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.address = root, f"http://127.0.0.1:{self.server_port}"
        self.requests, self.sent, self.alone, self.ended = [], 0, threading.Lock(), threading.Event()

    def taken(self) -> int:
        """Bytes of content sent since this was asked last."""
        with self.alone:
            sent, self.sent = self.sent, 0
            self.requests.clear()
            return sent

    def handle_error(self, *_):  # a client that has gone
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(head=True)

    def do_GET(self):
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        with self.server.alone:
            self.server.requests.append(f"{self.requestline} {self.headers.get('Range')}")
        address = urllib.parse.urlsplit(self.path)
        fault, _, name = urllib.parse.unquote(address.path).lstrip("/").rpartition("/")
        path = self.server.root / name
        if fault.isdigit() or not path.is_file():
            return self._start(int(fault) if fault.isdigit() else 404, 0)
        if fault == "signed" and (head or "sig=se%2Fcret" not in address.query):
            return self._start(403, 0)
        if fault == "silent":
            self.server.ended.wait(60)
        size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or fault == "whole":
            self._start(200, size)
            return head or self._send(path, 0, size)
        first, end = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if first >= size:
            return self._start(416, 0)
        self._start(206, end - first, ("Content-Range", f"bytes {first}-{end - 1}/{size}"))
        if fault == "cut" and first:
            end, self.close_connection = (first + end) // 2, True
        self._send(path, first, end)

    def _start(self, status: int, length: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(length))):
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: pathlib.Path, first: int, end: int) -> None:
        with open(path, "rb") as file:
            file.seek(first)
            for place in range(first, end, PIECE):
                self.wfile.write(file.read(min(PIECE, end - place)))
                with self.server.alone:
                    self.server.sent += min(PIECE, end - place)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[Server]:
    with Server(root) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
