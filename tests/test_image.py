"""launch/Dockerfile: what it says, and its steps in a fresh environment. No image is built here."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import runs
import yaml

LAUNCH = runs.REPOSITORY / "launch"
# Of Debian's libc6, libgcc-s1, libstdc++6 and zlib1g, on which dpkg and apt depend; and of libexpat1.
IN_THE_IMAGE = {
    *("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1", "libexpat.so.1"),
}


def instructions() -> list[tuple[str, str]]:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def copied() -> list[str]:
    """What the image holds of the repository."""
    lines = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line[1:] for line in lines if line.startswith("!")]


def needed(folder: pathlib.Path) -> set[str]:
    """The shared libraries that those below a folder take from the system."""
    ours = [path for path in folder.rglob("*.so*") if path.is_file()]
    text = subprocess.run(["readelf", "-d", *ours], capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", text)) - {path.name for path in ours}


def test_the_image_is_what_the_jobs_start():
    steps = instructions()
    assert steps[0] == ("FROM", "python:3.12-slim-bookworm")
    default = dict(steps)["ARG"].removeprefix("EXTRAS=")
    extras = tomllib.loads((runs.REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(default.split(",")) <= set(extras) and ("RUN", 'launch/install.sh "$EXTRAS"') in steps
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["python", "-m", "ktda_jax.main"]
    user = re.search(r"useradd .*--uid (\d+) (\w+)", (LAUNCH / "Dockerfile").read_text())
    assert dict(steps)["USER"] == user[2] and steps.index(("USER", user[2])) > steps.index(("COPY", ". ."))
    job, mapping = (yaml.safe_load((LAUNCH / name).read_text()) for name in ("jobset.yaml", "predict.yaml"))
    for spec in (job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"],
                 mapping["spec"]["template"]["spec"]):  # fmt: skip
        (container,) = spec["containers"]
        assert container["image"].removesuffix(":latest") in (LAUNCH / "Dockerfile").read_text()
        assert container.get("workingDir", "/ktda_jax") == dict(steps)["WORKDIR"]
    training = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]  # mapping has no volume to own
    assert training["securityContext"]["fsGroup"] == int(user[1])
    assert all((runs.REPOSITORY / path).exists() for path in copied())


def test_an_extra_that_there_is_not_is_refused():
    done = subprocess.run([LAUNCH / "install.sh", "tpu,gpus"], env={"PYTHON": sys.executable}, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("install.sh: error: no extra 'gpus'; give some of gpu, tpu, build, ")


@pytest.mark.slow
@pytest.mark.skipif("KTDA_IMAGE" not in os.environ, reason="minutes of pip; .ci/run runs install.sh by itself")
def test_the_steps_in_a_fresh_environment(tmp_path):
    """Of what the image holds, and nothing else: installed, it trains on a CPU."""
    for path in copied():
        source, target = runs.REPOSITORY / path, tmp_path / "ktda_jax" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    extras = dict(instructions())["ARG"].removeprefix("EXTRAS=")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"PYTHON": str(python), "PIP_CACHE_DIR": str(tmp_path / "cache")}
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": runs.xla_flags(1)}
    subprocess.run([tmp_path / "ktda_jax/launch/install.sh", extras], env=clean, check=True)
    assert not (tmp_path / "cache").exists()
    if shutil.which("readelf"):
        assert needed(tmp_path / "venv") <= IN_THE_IMAGE
    flags = runs.arguments(runs.make_tiles(tmp_path / "tiles"), tmp_path / "run")
    flags[0] = "--config=configs/grass.py:tiny"
    done = subprocess.run(
        [python, "-m", "ktda_jax.main", *flags],
        cwd=tmp_path / "ktda_jax",
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "val split, step 6:" in done.stdout, done.stderr
