"""Eight CPU devices for every test, so that sharding is always exercised; programs that are compiled fast, and once.

Tests start many processes, of which each would compile the same small programs. So they do without LLVM's optimisations
and the slower way to emit kernels (a third of the time; `runs.AS_USERS_COMPILE` undoes it), and share a cache of what
they compiled.
"""

import atexit
import functools
import os
import shutil
import tempfile
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):  # later ones abort at a flag that they know no more
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
else:  # products in float32, where a GPU would take TF32
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else it is that of the process which started this one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ktda_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module")
def all_recomputed():
    """Arrays of tests are small; with this they are computed again in the backward pass as large ones are."""
    from ktda_jax.models import recompute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "SMALL", 0)
        yield


@pytest.fixture
def toy(monkeypatch):
    """toy(quality=..., at=..., loss=...) replaces the program that is trained, for one test."""
    import toy

    return functools.partial(toy.install, monkeypatch)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """gs://bucket on a server of this machine; the folder where its objects lie."""
    import bucket_server

    with bucket_server.bucket(tmp_path_factory.mktemp("bucket")) as objects:
        yield objects


@pytest.fixture
def forbidding(bucket, monkeypatch):
    """From now on a server in its place refuses all."""
    import bucket_server

    with bucket_server.forbidding() as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        yield
