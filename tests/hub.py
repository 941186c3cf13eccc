"""A model hub on this machine: the files of one repository, served like on huggingface.co, over plain HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def serving_hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields its address, for HF_ENDPOINT, and the requests it received: (path, user agent).

    files  by their paths, `timm/NAME/resolve/main/model.safetensors`
    """
    asked: list[tuple[str, str]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            path = self.path.lstrip("/")
            asked.append((path, self.headers["User-Agent"]))
            content = files.get(path)
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path.lstrip("/"), b""))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
