"""An HTTP server on the loopback address that keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HttpReceiver(ThreadingHTTPServer):
    """Keeps path, token and body of each request; answers with a code from a list, the last one for ever."""

    daemon_threads = True
    codes: list[int]
    bodies: list[bytes]
    paths: list[str]
    tokens: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HttpReceiver
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.server.paths.append(self.path)
        self.server.tokens.append(self.headers["authorization"])
        codes = self.server.codes
        self.send_response(codes.pop(0) if len(codes) > 1 else codes[0])
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@contextmanager
def run_receiver(*codes: int) -> Iterator[HttpReceiver]:
    """Run a server that answers with these codes."""
    made = HttpReceiver(("127.0.0.1", 0), _Handler)
    made.codes, made.bodies, made.paths, made.tokens = list(codes or (200,)), [], [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
