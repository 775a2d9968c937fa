"""One page for a browser on this machine, or behind an SSH tunnel."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from converters.errors import UsageError
from mbx.cli.output import out


class _OnePage(BaseHTTPRequestHandler):
    """Answers every path with `page`; nothing else of this machine can be asked for."""

    page = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.page)))
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: what a browser asks for is no news."""


def serve_page(path: Path, port: int) -> None:
    """Serve the page at 127.0.0.1 until Ctrl-C, which is how it ends; UsageError for a port that is taken."""
    handler = type("OnePage", (_OnePage,), {"page": path.read_bytes()})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UsageError(
            f"port {port} cannot be served: {error.strerror}", hint="‹port› 0 takes a free one"
        ) from error
    number = server.server_address[1]
    url = f"http://127.0.0.1:{number}/"
    out.result({"report": str(path), "url": url}, lambda: [url])
    out.message(f"Ctrl-C ends it; from another machine: ssh -L {number}:127.0.0.1:{number} HOST")
    sys.stdout.flush()
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
