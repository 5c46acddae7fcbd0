"""Safetensors files of our own paths: a round trip, and a message for each way a file can be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktda_jax import weights

ARRAYS = {"stages/0/0/norm/scale": np.arange(4, dtype=np.float32), "head/kernel": np.ones((2, 3), np.float32)}
EXPECTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ARRAYS)


def test_what_is_saved_is_loaded(tmp_path):
    weights.save(tmp_path / "w.safetensors", ARRAYS)
    loaded = weights.load(str(tmp_path / "w.safetensors"), EXPECTED, "student")
    assert loaded.keys() == ARRAYS.keys()
    for path, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[path], value)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]  # nothing left aside


def test_transposed_views_are_saved_by_value(tmp_path):
    """safetensors writes the buffer as it lies in memory, which for a transposed view is another array."""
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2).T
    weights.save(tmp_path / "w.safetensors", {"kernel": kernel})
    expected = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    np.testing.assert_array_equal(weights.load(str(tmp_path / "w.safetensors"), expected, "student")["kernel"], kernel)


def test_the_model_decides_the_dtype(tmp_path):
    weights.save(tmp_path / "w.safetensors", {k: v.astype(np.float16) for k, v in ARRAYS.items()})
    loaded = weights.load(str(tmp_path / "w.safetensors"), EXPECTED, "student")
    assert all(v.dtype == np.float32 for v in loaded.values())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.safetensors", None, "config.weights.teacher: no file"),
        ("w.pth", b"torch", "is not a .safetensors file"),
        ("w.safetensors", b"short", "cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        weights.load(str(tmp_path / name), EXPECTED, "teacher")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path):
    weights.save(tmp_path / "w.safetensors", {**ARRAYS, "head/kernel": np.ones((2, 5), np.float32)})
    with pytest.raises(ValueError, match=r"w\.safetensors does not fit .* head/kernel \(2, 5\) instead of \(2, 3\)"):
        weights.load(str(tmp_path / "w.safetensors"), EXPECTED, "student")
