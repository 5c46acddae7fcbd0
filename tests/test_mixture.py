"""Labelled and unlabelled rows of a batch: the same share on every device and in every micro-batch."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from ktda_jax import UserError
from ktda_jax.data.mixture import Mixture


@pytest.mark.parametrize("share, rows, accumulate", [(0.5, 2, 1), (0.5, 4, 2), (0.75, 8, 1), (1 / 3, 3, 4)])
def test_every_device_and_every_micro_batch_gets_the_share(share, rows, accumulate):
    """As training divides them: devices take blocks of rows, micro-batches every `accumulate`-th row."""
    mixture, devices = Mixture.of(share, rows, accumulate), 3
    batch = rows * devices * accumulate
    for first in (0, 5 * batch):
        kinds = np.array([mixture.place(first + row)[0] for row in range(batch)])
        by_device = kinds.reshape(devices, rows * accumulate)
        np.testing.assert_allclose(by_device.mean(1), 1 - share)
        for micro in range(accumulate):
            own = kinds.reshape(-1, accumulate)[:, micro]
            np.testing.assert_array_equal(
                mixture.labelled(jnp.asarray(own)), np.ones(round(len(own) * (1 - share)), bool)
            )


def test_rows_of_a_kind_are_numbered_without_gaps():
    mixture = Mixture.of(0.25, 4, 2)
    found = collections.defaultdict(list)
    for row in range(80):
        kind, number = mixture.place(row)
        found[kind].append(number)
    assert found == {True: list(range(60)), False: list(range(20))}


def test_a_share_that_is_no_whole_row_is_refused():
    with pytest.raises(UserError, match="unlabelled_share is 0.3, but a device's 4 row.*possible: 0.25, 0.5, 0.75"):
        Mixture.of(0.3, 4)
    with pytest.raises(UserError, match="a device's 1 row.*possible: none: give it more rows"):
        Mixture.of(0.5, 1)
