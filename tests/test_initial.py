"""Initial weights: numpy's draws have torch's distributions, JAX's likewise; seeds and streams."""

import jax
import numpy as np
import pytest
import torch

from ktda_jax.models import initial
from ktda_jax.models.initial import HostRngs

ORACLES = {
    "trunc_normal": lambda x: torch.nn.init.trunc_normal_(x, std=0.02),
    "kaiming_normal_fan_out": lambda x: torch.nn.init.kaiming_normal_(x, mode="fan_out", nonlinearity="relu"),
    "xavier_uniform": torch.nn.init.xavier_uniform_,
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("shape", [(3, 3, 64, 128), (256, 128)])
def test_both_draws_are_distributed_as_torchs(name, shape):
    """Same quantiles: nine deciles agree to 0.03 standard deviations."""
    torch.manual_seed(0)
    theirs = ORACLES[name](torch.empty((shape[-1], shape[-2], *shape[:-2]))).numpy()
    for key in (HostRngs(0).params(), jax.random.key(0)):
        ours = np.asarray(getattr(initial, name)(key, shape, np.float32))
        assert ours.shape == shape and ours.dtype == np.float32
        deciles = (np.quantile(x, np.linspace(0.1, 0.9, 9)) for x in (ours, theirs))
        np.testing.assert_allclose(*deciles, atol=0.03 * theirs.std())
        assert ours.std() == pytest.approx(theirs.std(), rel=0.02)


def test_seeds_and_places_have_streams_of_their_own():
    def draws(seed):
        rngs = HostRngs(seed)
        return [initial.trunc_normal(rngs.params(), (8,)) for _ in range(3)]

    np.testing.assert_array_equal(draws(1), draws(1))
    values = np.concatenate(draws(1) + draws(2))
    assert len(set(values.tolist())) == len(values)
