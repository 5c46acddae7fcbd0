"""The notebook, executed from its first cell to its last; skipped where Jupyter's client is not installed (.[docs])."""

import json
import pathlib
import subprocess
import sys

import pytest
import runs

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = runs.REPOSITORY / "examples" / "quickstart.ipynb"


def test_the_notebook_holds_no_output():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_it_installs_where_the_folder_alone_is_there(tmp_path, monkeypatch):
    """As in Colab: JAX may be installed, and `ktda_jax` can be imported from the clone, but nothing that it needs."""
    clone = tmp_path / "clone"
    (clone / "configs").mkdir(parents=True)
    (clone / "configs" / "demo.py").touch()
    (clone / "ktda_jax").mkdir()
    (clone / "ktda_jax" / "__init__.py").touch()
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "pip.py").write_text(f"import sys; open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    hidden = (
        "import importlib.metadata as m\ndef version(name): raise m.PackageNotFoundError(name)\nm.version = version\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(fake)},
    )
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(tmp_path / "asked").read_text() == "install -q -e ."


def test_it_runs(tmp_path, monkeypatch):
    """With the demo's handful of steps, in the folder of the notebook as a browser starts it."""
    monkeypatch.setenv("QUICKSTART_CONFIG", "configs/demo.py:tiny")
    monkeypatch.setenv("QUICKSTART_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    last = notebook.cells[-2].outputs[0]["text"].splitlines()
    shares = [float(line.partition("%")[0].split()[-1]) for line in last]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5)
    assert (tmp_path / "run" / "map.tif").stat().st_size and (tmp_path / "run" / "report.html").exists()
