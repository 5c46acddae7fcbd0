"""What a user of DINOv3 meets first: access that Meta grants, and configs/dinov3.py with its arguments."""

import http.server
import json
import os
import pathlib
import runpy
import subprocess
import sys
import threading

import pytest

from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.models import vit

REPOSITORY = pathlib.Path(__file__).parents[1]


class Refusing(http.server.BaseHTTPRequestHandler):
    """The hub, as it answers about models of facebook (gated: listed, not given), and of others."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        listing, name = {"id": "x", "sha": "0" * 40, "siblings": []}, self.path.removeprefix("/api/models/")
        if "/tree/" in self.path:
            listing = [{"type": "file", "path": "model.safetensors", "size": 9, "oid": "0" * 40}]
        listed = self.path.startswith("/api/") and name.startswith("facebook/")
        self.send_response(200 if listed else 401 if "401" in self.path else 403)
        if not listed and "facebook" in self.path:
            self.send_header("X-Error-Code", "GatedRepo")
        body = json.dumps(listing).encode() if listed else b""
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_refused_download_says_how_one_gets_it(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys\nfrom ktda_jax import UserError\nfrom ktda_jax.weights import files\n"
        "for name in sys.argv[1:]:\n  try: files.locate(name)\n  except UserError as error: print(error)"
    )
    names = [f"hf://{name}" for name in ("facebook/dinov3-401", "facebook/dinov3-403", "other/401", "other/403")]
    local = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_CACHE=str(tmp_path), HF_TOKEN="")
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NO_PROXY": "*", **local},
    )  # fmt: skip
    server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout + done.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{name} is refused ({name[-3:]}): check its name, ask for access at https://"), line
        assert f"huggingface.co/{name.removeprefix('hf://')} " in line and "`hf auth login`" in line
        assert line.endswith("; DINOv2 (hf://facebook/dinov2-base) needs neither") is ("dinov3" in name)


@pytest.mark.parametrize(
    "config, both", [("dinov3", "satellite,web"), ("dinov3", "dinov3,nothing"), ("few_labels", "10,50")]
)
def test_of_arguments_that_exclude_each_other_one_is_asked(config, both):
    get_config = runpy.run_path(str(REPOSITORY / "configs" / f"{config}.py"))["get_config"]
    with pytest.raises(ValueError, match=f"config arguments {', '.join(both.split(','))} exclude each other"):
        get_config(both)


@pytest.mark.parametrize("student", ["imagenet", "dinov3", "nothing"])
@pytest.mark.parametrize("teacher", ["web", "satellite"])
def test_config(teacher, student, tmp_path):
    config = runpy.run_path(str(REPOSITORY / "configs" / "dinov3.py"))["get_config"](f"{teacher},{student}")
    config.data.root, config.data.classes = str(tmp_path), "water,road"
    settings = Settings.of(config)
    model = model_of(settings)
    assert model.teacher.rope and model.teacher.grid == (16, 16) and model.channels == (768,) * 4
    assert (model.teacher.mean == vit.MEAN) is (teacher == "web")
    assert ("sat493m" in settings.weights.teacher) is (teacher == "satellite")
    assert model.student.first_norms is (student != "dinov3") and model.student.channels[-1] == 1024
    assert (settings.weights.student is None) is (student == "nothing")
    tiny = runpy.run_path(str(REPOSITORY / "configs" / "dinov3.py"))["get_config"](f"{teacher},{student},tiny")
    assert tiny.weights.teacher is None and tiny.weights.student is None and tiny.model.teacher.preset == "laptop"
