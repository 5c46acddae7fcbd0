"""Hugging Face's hub for tests: the few answers of its API that `snapshot_download` asks for, from a folder."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

REVISION = hashlib.sha1(b"a commit").hexdigest()


@contextlib.contextmanager
def hub(folder: pathlib.Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with `folder` as its model `name`, for HF_ENDPOINT; and the files that were fetched."""
    fetched = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                return self._json({"id": name, "modelId": name, "sha": REVISION, "siblings": files})
            if path == f"/api/models/{name}/tree/{REVISION}":
                return self._json([self._entry(file) for file in sorted(folder.iterdir())])
            prefix, _, file = path.rpartition("/")
            if prefix == f"/{name}/resolve/{REVISION}" and (folder / file).is_file():
                content = (folder / file).read_bytes()
                if self.command == "GET":
                    fetched.append(file)
                return self._answer(200, content, {"ETag": f'"{_sum(folder / file)}"', "X-Repo-Commit": REVISION})
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def _entry(self, file: pathlib.Path) -> dict:
            return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _sum(file)}

        def _json(self, found) -> None:
            self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fetched
        finally:
            server.shutdown()


def _sum(file: pathlib.Path) -> str:
    """Git's name of a blob."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
