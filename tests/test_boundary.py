"""Boundary IoU against explicit loops over every pixel's surroundings, and the corner cases by hand."""

import cv2
import numpy as np
import pytest

from ktda_jax.metrics import boundary


def by_hand(label, prediction, num_classes, distance):
    """Per class, from the definition: a pixel is boundary where a neighbour within d is another class or outside."""
    height, width = label.shape
    out = np.zeros((2, num_classes), np.int64)
    ignored = label >= num_classes
    for row, column in np.argwhere(~ignored):
        found = []
        for ids in (label, prediction):
            own, edge = ids[row, column], False
            for y in range(row - distance, row + distance + 1):
                for x in range(column - distance, column + distance + 1):
                    if not (0 <= y < height and 0 <= x < width):
                        edge = True
                    elif not ignored[y, x] and ids[y, x] != own:
                        edge = True
            found.append(own if edge else None)
        for index in range(num_classes):
            out[0, index] += found[0] == index and found[1] == index
            out[1, index] += found[0] == index or found[1] == index
    return out


def authors(mask, distance):
    """The boundary of a mask as the paper's authors get it: a border of background, then d erosions by 3 x 3."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


def blobs(seed, shape=(24, 30), classes=3, side=6):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (shape[0] // side, shape[1] // side))
    out = coarse.repeat(side, 0).repeat(side, 1).astype(np.uint8)
    noise = rng.random(out.shape) < 0.02
    return np.where(noise, rng.integers(0, classes, out.shape), out).astype(np.uint8)


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("ignored", [0, 0.02, 0.5])
def test_equals_explicit_loops(distance, ignored):
    label, prediction = blobs(0), np.roll(blobs(0), 1, 1)
    rng = np.random.default_rng(distance)
    label[rng.random(label.shape) < ignored] = 255
    if ignored:
        label[:9, 11:17] = 255  # at the image's border too
    got = boundary.count(label, prediction, 3, distance=distance)
    assert got.dtype == np.int64 and got.shape == (2, 3)
    np.testing.assert_array_equal(got, by_hand(label, prediction, 3, distance))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_equals_the_authors_way_class_by_class(dtype):
    label, prediction = blobs(1, (120, 90)).astype(dtype), blobs(2, (120, 90)).astype(dtype)
    distance = boundary.default_distance(120, 90)
    got = boundary.count(label, prediction, 3)
    for index in range(3):
        a, b = authors(label == index, distance), authors(prediction == index, distance)
        assert got[:, index].tolist() == [(a & b).sum(), (a | b).sum()]


def test_default_distance():
    assert boundary.default_distance(512, 512) == 14  # 0.02 * 724.08 = 14.48
    assert boundary.default_distance(256, 256) == 7
    assert boundary.default_distance(4, 4) == 1


def test_an_ignored_area_makes_no_boundary():
    label = np.zeros((40, 40), np.uint8)
    prediction = np.zeros((40, 40), np.uint8)
    whole = boundary.count(label, prediction, 2, distance=2)
    assert whole[:, 0].tolist() == [40**2 - 36**2] * 2  # the image's border alone
    label[15:25, 15:25] = 255
    np.testing.assert_array_equal(boundary.count(label, prediction, 2, distance=2), whole)
    prediction[15:25, 15:25] = 1  # what is predicted there does not matter
    np.testing.assert_array_equal(boundary.count(label, prediction, 2, distance=2), whole)


def test_a_boundary_seen_across_an_ignored_seam_counts():
    """Two classes with one ignored column between them: d = 2 sees the other class, d = 1 only what is unknown."""
    label = np.zeros((30, 31), np.uint8)
    label[:, 16:], label[:, 15] = 1, 255
    inner = slice(10, 20)
    near = boundary.count(label, label, 2, distance=1, rows=inner)
    far = boundary.count(label, label, 2, distance=2, rows=inner)
    assert near[1].tolist() == [10, 10]  # the image's left and right border
    assert far[1].tolist() == [30, 30]  # two columns there, one at the seam


def test_sums_of_strips_are_those_of_the_scene():
    label, prediction = blobs(3, (96, 60)), blobs(4, (96, 60))
    label[30:50, 20:30] = 255
    d, total = 3, np.zeros((2, 3), np.int64)
    for start in range(0, 96, 20):
        stop = min(start + 20, 96)
        top, bottom = max(start - d, 0), min(stop + d, 96)
        rows = slice(start - top, stop - top)
        total += boundary.count(label[top:bottom], prediction[top:bottom], 3, distance=d, rows=rows)
    np.testing.assert_array_equal(total, boundary.count(label, prediction, 3, distance=d))


def test_values_that_are_no_class():
    label, prediction = np.zeros((20, 20), np.int32), np.zeros((20, 20), np.int32)
    label[4, 4], prediction[10, 10] = 7, 9
    got = boundary.count(label, prediction, 2, distance=1)
    other = np.where(prediction == 9, 1, 0)  # as an edge for its neighbours it is like another class
    want = boundary.count(np.where(label == 7, 255, 0), other, 2, distance=1)
    np.testing.assert_array_equal(got[:, 0], want[:, 0])
    assert not got[:, 1].any()
    with pytest.raises(ValueError, match="should both be"):
        boundary.count(label, prediction[1:], 2)
    with pytest.raises(ValueError, match="at least 1"):
        boundary.count(label, prediction, 2, distance=0)


def test_scores(recwarn):
    iou, mean = boundary.boundary_iou(np.array([[30, 0, 0], [40, 0, 5]]))
    assert iou[[0, 2]].tolist() == [75, 0] and np.isnan(iou[1]) and mean == 37.5
    label = np.full((16, 16), 255, np.uint8)
    iou, mean = boundary.boundary_iou(boundary.count(label, np.zeros_like(label), 2))
    assert np.isnan(iou).all() and np.isnan(mean)
    label = blobs(5)
    assert boundary.boundary_iou(boundary.count(label, label, 3))[1] == 100
    assert not recwarn.list


def test_a_shifted_edge_costs_more_than_it_does_in_iou():
    label = np.zeros((200, 200), np.uint8)
    label[50:150, 50:150] = 1
    prediction = np.roll(label, 3, 1)
    got, _ = boundary.boundary_iou(boundary.count(label, prediction, 2))
    inside, either = ((label == 1) & (prediction == 1)).sum(), ((label == 1) | (prediction == 1)).sum()
    assert got[1] < 100 * inside / either - 20
