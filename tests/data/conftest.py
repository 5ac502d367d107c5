"""A server on the loopback that sends parts of files, and breaks off where a test asks it to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FileServer(ThreadingHTTPServer):
    """Serves `files` (path -> bytes).

    Attributes:
        cuts: for each GET to come, the number of bytes after which the connection closes; then whole answers.
        failures: for each GET to come, a status to refuse it with; used before `cuts`.
        ranges: False ignores Range headers.
        etag: mark of the files.
        asked: the Range header of each GET, None where there was none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.failures: list[int] = []
        self.ranges, self.etag = True, '"1"'
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        """Address without a slash at its end."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        if self.server.failures:
            self._refuse(self.server.failures.pop(0))
        else:
            self._answer(with_body=True)

    def _refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _answer(self, with_body: bool) -> None:
        data = self.server.files.get(self.path)
        if data is None:
            return self._refuse(404)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        fresh = self.headers.get("If-Range", self.server.etag) == self.server.etag
        start = int(asked[1]) if asked and fresh else 0
        if start >= len(data) and start:
            return self._refuse(416, Content_Range=f"bytes */{len(data)}")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if with_body:
            stop = start + self.server.cuts.pop(0) if self.server.cuts else len(data)
            self.wfile.write(data[start:stop])
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[FileServer]:
    """A running `FileServer`."""
    made = FileServer()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()
