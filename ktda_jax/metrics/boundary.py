"""Boundary IoU: the IoU of what lies within a few pixels of a class's edge: large insides hide no bad edges here.

Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021 (arXiv 2103.16562).
A class's boundary is its pixels that an erosion by d takes away: those that a square of 2 d + 1 pixels around them
shows another class, or the outside of the image, which is background as in the authors' code.

Pixels labelled 255 are ignored in label and prediction alike. They are of every class for the erosion, since what is
beneath is not known, and so make no boundary of their own; then they are dropped and count for none.
"""

import numpy as np

from ktda_jax.data.datasets import IGNORE

LARGEST = 2048  # pixels
SHARE = 0.02  # of the image's diagonal, as in the paper


def default_distance(height: int, width: int) -> int:
    """d in pixels for an image of this size, at least 1; at most that of an image of LARGEST pixels a side."""
    return max(1, round(SHARE * min(float(np.hypot(height, width)), LARGEST * 2**0.5)))


def count(
    label: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    *,
    distance: int | None = None,
    rows: slice = slice(None),
) -> np.ndarray:
    """Boundary pixels of one image per class: int64 (2, C), intersection and union. Sum it over images.

    label, prediction: integers (H, W). A label that is no class is ignored as 255 is; a prediction that is no class
    is a neighbour of another class and counts for none. distance: d in pixels, `default_distance` unless given.
    rows: those to count. For a scene in strips give each strip d rows of its neighbours above and below, leave these
    out here and give the scene's `distance`: the sum is exactly that of the whole scene.
    """
    if label.shape != prediction.shape or label.ndim != 2:
        raise ValueError(f"label {label.shape} and prediction {prediction.shape} should both be (H, W)")
    if distance is None:
        distance = default_distance(*label.shape)
    if distance < 1:
        raise ValueError(f"a distance is at least 1 pixel, got {distance}")
    counted = (label >= 0) & (label < num_classes) & (label != IGNORE)
    sides = []
    for ids in (label, prediction):
        values = np.where((ids >= 0) & (ids < num_classes), ids, IGNORE).astype(np.uint8)
        edge = boundary(values, counted, distance) & (values < num_classes)
        sides.append((values[rows], edge[rows]))
    (label, of_label), (prediction, of_prediction) = sides
    both = of_label & of_prediction & (label == prediction)
    common = np.bincount(label[both], minlength=num_classes)
    either = np.bincount(label[of_label], minlength=num_classes)
    either += np.bincount(prediction[of_prediction], minlength=num_classes) - common
    return np.stack((common, either))


def boundary(ids: np.ndarray, counted: np.ndarray, distance: int) -> np.ndarray:
    """Which pixels of a map uint8 (H, W) belong to the boundary of their own class: bool (H, W).

    One erosion and one dilation of the map serve all classes: the erosion of a class keeps a pixel when the lowest
    and the highest value around it are its own.
    """
    import cv2  # only here: benchmarks run where it is not installed

    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)  # as d erosions by 3 x 3
    # The values that ignored pixels get change neither: 255 no minimum, 0 no maximum.
    lowest = cv2.erode(np.where(counted, ids, np.uint8(255)), square)
    highest = cv2.dilate(np.where(counted, ids, np.uint8(0)), square)
    edge = (lowest != ids) | (highest != ids)
    edge[:distance] = edge[-distance:] = True
    edge[:, :distance] = edge[:, -distance:] = True
    return edge & counted


def boundary_iou(counts: np.ndarray) -> tuple[np.ndarray, float]:
    """IoU per class, float64 (C,), and the mean of those that are not NaN, both in percent, of sums of `count`.

    NaN where the union is 0: no such class on either side.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = 100 * np.divide(counts[0], counts[1])
    present = iou[~np.isnan(iou)]
    return iou, float(present.mean()) if present.size else float("nan")
