"""A Hugging Face hub on the loopback, as much of it as streaming asks for."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class FakeHub:
    """Serves files of repositories; `fail` may answer a request in its place.

    Attributes:
      files: "datasets/allenai/c4/en/x.json.gz" -> content.
      fail: (method, path) -> HTTP status to answer with, 0 to hang up, None to serve.
      requests: (method, path) of every request so far.
    """

    def __init__(self, files):
        self.files = files
        self.fail = lambda method, path: None
        self.requests = []

    @contextlib.contextmanager
    def running(self):
        """Yields the address."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_one(self):
                hub.requests.append((self.command, self.path))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status = hub.fail(self.command, self.path)
                if status is None:
                    hub.serve(self)
                elif status == 0:
                    self.close_connection = True
                else:
                    self.answer(status, b"{}", {})

            do_GET = do_HEAD = do_POST = handle_one

            def answer(self, status, body, headers):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def serve(self, request):
        path = request.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if path.startswith("api/") and "tree" in parts:
            index = parts.index("tree")
            repository, folder = "/".join(parts[1:index]), "/".join(parts[index + 2 :])
            self._tree(request, repository, folder)
        elif path.startswith("api/") and "revision" in parts:
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}
            request.answer(200, json.dumps(info).encode(), {})
        elif "resolve" in parts:
            index = parts.index("resolve")
            self._file(request, "/".join(parts[:index] + parts[index + 2 :]))
        else:
            request.answer(404, b"{}", {})

    def _tree(self, request, repository, folder):
        found = [
            {
                "type": "file",
                "path": name.removeprefix(f"{repository}/"),
                "size": len(content),
                "oid": "0" * 40,
            }
            for name, content in self.files.items()
            if name.startswith(f"{repository}/{folder}/")
        ]
        request.answer(200, json.dumps(found).encode(), {})

    def _file(self, request, name):
        content = self.files.get(name)
        if content is None:
            request.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        span = request.headers.get("Range")
        if span is None:
            request.answer(200, content, headers)
            return
        start, _, stop = span.removeprefix("bytes=").partition("-")
        start, stop = int(start), min(int(stop or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        request.answer(206, content[start:stop], headers)
