"""Scores against the reference evaluator's golden numbers, and the cases that it leaves open."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktda_jax.metrics import confusion as metrics

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "metrics.npz"
COUNT = jax.jit(metrics.confusion_matrix, static_argnums=2)


def count_by_hand(labels, predictions, num_classes):
    out = np.zeros((num_classes, num_classes), np.int64)
    for label, prediction in zip(labels.ravel(), predictions.ravel(), strict=True):
        if 0 <= label < num_classes and 0 <= prediction < num_classes:
            out[label, prediction] += 1
    return out


@pytest.mark.parametrize("case, num_classes", [("grass5", 5), ("cloud4", 4), ("absent_class", 5)])
def test_equals_the_reference_evaluator(case, num_classes):
    golden = np.load(GOLDEN)
    labels, predictions = golden[f"{case}/label"], golden[f"{case}/pred"]
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):  # image by image, as an evaluation sums
        confusion += np.asarray(COUNT(label[None], prediction[None], num_classes), np.int64)
    got = metrics.summarize(confusion)
    assert list(got.summary) == ["aAcc"] + [f"m{name}" for name in metrics.PER_CLASS]
    for name, value in got.summary.items():
        assert abs(value - golden[f"{case}/summary/{name}"]) <= 0.00501, name  # golden: rounded to 0.01
    for name, values in got.per_class.items():
        np.testing.assert_allclose(values / 100, golden[f"{case}/perclass/{name}"], atol=1e-6, err_msg=name)
    assert np.isnan(got.per_class["IoU"]).any() == (case == "absent_class")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_counts_ignore_255_masked_rows_and_values_out_of_range(dtype):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 23, (4, 9, 7)).astype(dtype)  # 20 classes: 19 * 20 + 19 would wrap in uint8
    labels[:, :2] = 255
    predictions = rng.integers(0, 20, labels.shape).astype(np.int32)
    if dtype == np.int32:
        labels[0, 3], predictions[1, 4] = -1, 20
    mask = np.array([True, True, False, True])
    got = COUNT(labels, predictions, 20, mask)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, count_by_hand(labels[mask], predictions[mask], 20))
    np.testing.assert_array_equal(COUNT(labels, predictions, 20), count_by_hand(labels, predictions, 20))
    # Rows are labels: one pixel of class 1 called class 2.
    one = COUNT(np.array([[1]], np.uint8), np.array([[2]], np.uint8), 3)
    assert np.argwhere(np.asarray(one)).tolist() == [[1, 2]]


def test_a_sharded_batch_gives_the_same_counts():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    labels, predictions = np.random.default_rng(2).integers(0, 5, (2, 8, 16, 16)).astype(np.uint8)
    got = COUNT(*jax.device_put((labels, predictions), sharding), 5)
    np.testing.assert_array_equal(got, count_by_hand(labels, predictions, 5))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.confusion_matrix(jnp.zeros((1, 4, 4), jnp.uint8), jnp.zeros((1, 2, 2), jnp.int32), 3)


def test_never_labelled_but_predicted_class():
    got = metrics.summarize(np.array([[5, 0, 5], [0, 10, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(got.per_class["IoU"], [50, 100, 0])
    np.testing.assert_array_equal(got.per_class["Precision"], [100, 100, 0])
    for name in ("Acc", "Recall", "Fscore"):
        assert np.isnan(got.per_class[name]).tolist() == [False, False, True], name
    assert got.summary["mIoU"] == 50 and got.summary["mAcc"] == 75 and got.summary["aAcc"] == 75


def test_large_counts_and_empty_sets_need_no_care(recwarn):
    got = metrics.summarize(np.array([[3, 1], [0, 4]], np.int64) * 10**15)
    assert got.summary["aAcc"] == 87.5
    empty = np.zeros((3, 3), np.int64)
    assert all(np.isnan(value) for value in metrics.summarize(empty).summary.values())
    assert np.isnan(metrics.best_constant(empty))
    assert not recwarn.list


@pytest.mark.parametrize("bad", [np.zeros((2, 3), int), np.zeros((2, 2)), np.array([[1, -1], [0, 0]])])
def test_what_is_no_confusion_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="confusion matrix"):
        metrics.summarize(bad)


def test_best_constant_is_the_best_of_all_constants():
    rng = np.random.default_rng(1)
    labels = rng.choice(5, size=(2, 30, 30), p=[0.1, 0.5, 0.3, 0.1, 0.0]).astype(np.uint8)  # class 4 absent
    constants = []
    for answer in range(5):
        confusion = count_by_hand(labels, np.full(labels.shape, answer), 5)
        # A constant answer of the absent class adds a zero to the mean; it is never the best.
        constants.append(metrics.summarize(confusion).summary["mIoU"])
    assert metrics.best_constant(confusion) == pytest.approx(max(constants))


def test_table_is_aligned_and_complete():
    classes = ("Clear", "Cloud Shadow with a long name", "Thin Cloud")
    table = metrics.format_table(metrics.summarize(np.array([[9, 0, 1], [0, 0, 0], [2, 0, 8]])), classes)
    lines = table.splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert [line.split("  ")[0] for line in lines[2:5]] == list(classes)
    assert lines[3].split()[-6:] == ["-"] * 6
    assert lines[2].split()[1:4] == ["75.00", "90.00", "85.71"]
    assert lines[-1] == "aAcc 85.00  mIoU 73.86  mFscore 84.96"
