"""Losses for classes of few pixels: Dice, focal and Lovász-softmax loss, and mining of hard pixels.

Dice: Milletari et al., V-Net, 2016. Focal: Lin et al., 2017. Lovász-softmax: Berman et al., 2018, Algorithm 1. Hard
pixels: Wu et al., Bridging Category-level and Instance-level Semantic Image Segmentation, 2016 (online bootstrapping);
Shrivastava et al., 2016 (OHEM). The three losses compute what DiceLoss, FocalLoss and LovaszLoss of
segmentation_models_pytorch 0.6.0 do with mode="multiclass" and ignore_index=255.

Everywhere logits are (B, H, W, C), labels (B, H, W) with 255 = ignore, and the computation is in float32 or wider. A
batch is one set of pixels: classes are summed over all of its images. Without a labelled pixel a loss is 0, as is its
gradient.
"""

import fractions

import jax
import jax.numpy as jnp

from ktda_jax.data.datasets import IGNORE
from ktda_jax.models.layers import at_least_float32

EPS = 1e-7  # smallest denominator of the Dice coefficient, as in segmentation_models_pytorch
SHARES = 10_000  # a share of pixels counts to four decimals


def dice(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 - 2 |P L| / (|P| + |L|) of probabilities P and labels L, in the mean over all C classes.

    A class that no pixel is labelled with adds 0 to the sum and still counts in C.
    """
    probabilities = jnp.where((labels != IGNORE)[..., None], jax.nn.softmax(at_least_float32(logits)), 0)
    hot = _one_hot(labels, logits.shape[-1])
    counts = hot.sum((0, 1, 2), dtype=jnp.int32)  # whole numbers: float32 stops counting at 2**24
    overlap = jnp.where(hot, probabilities, 0).sum((0, 1, 2))
    sizes = probabilities.sum((0, 1, 2)) + counts
    scores = overlap / jnp.maximum(sizes / 2, EPS)
    return jnp.where(counts > 0, 1 - scores, 0).mean()


def focal(logits: jax.Array, labels: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """(1 - p)^gamma * -log p of every class against all others, p a sigmoid's; the mean over labelled pixels and C.

    Absent classes count, since every pixel is an example against them. segmentation_models_pytorch before 0.6 summed
    over the classes instead: C times this.
    """
    logits = at_least_float32(logits)
    signed = jnp.where(_one_hot(labels, logits.shape[-1]), logits, -logits)
    # All in logarithms: the power of a difference that rounds to 0 has no gradient for gamma below 1.
    losses = -jnp.exp(gamma * jax.nn.log_sigmoid(-signed)) * jax.nn.log_sigmoid(signed)
    valid = labels != IGNORE
    total = jnp.where(valid[..., None], losses, 0).sum()
    return total / (jnp.maximum(valid.sum(), 1) * logits.shape[-1])


def lovasz(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The Lovász extension of 1 - IoU at |label - probability|, in the mean over the classes that are labelled."""
    classes = logits.shape[-1]
    probabilities = jax.nn.softmax(at_least_float32(logits)).reshape(-1, classes).T
    hot, valid = _one_hot(labels, classes).reshape(-1, classes).T, jnp.asarray(labels != IGNORE).reshape(-1)
    errors = jnp.where(valid, jnp.where(hot, 1 - probabilities, probabilities), 0)
    steps = jax.vmap(_jaccard_steps, in_axes=(0, 0, None))(jax.lax.stop_gradient(errors), hot, valid)
    present = hot.any(-1)
    losses = jnp.where(present, (errors * steps).sum(-1), 0)
    return losses.sum() / jnp.maximum(present.sum(), 1)


def _jaccard_steps(errors: jax.Array, foreground: jax.Array, valid: jax.Array) -> jax.Array:
    """By how much 1 - IoU rises as each pixel joins the wrong ones, the largest error first: (N,), in pixel order.

    Algorithm 1 subtracts neighbours of a running 1 - IoU, of which float32 leaves little when there are a million of
    them. These are the same differences in closed form: 1 / union for a pixel of the class, which leaves the
    intersection, and intersection / (union (union - 1)) for another, which joins the union.
    """
    order = jnp.argsort(jnp.where(valid, -errors, 1))  # ignored pixels last
    inside = foreground[order]
    outside = ~inside & valid[order]
    size = foreground.sum(dtype=jnp.int32)
    intersection = size - jnp.cumsum(inside, dtype=jnp.int32)
    union = size + jnp.cumsum(outside, dtype=jnp.int32)
    # The bounds are met by absent classes alone, whose loss is left out.
    union, before = (jnp.maximum(x, 1).astype(errors.dtype) for x in (union, union - 1))
    steps = jnp.where(inside, 1 / union, jnp.where(outside, intersection / union / before, 0))
    return jnp.zeros_like(errors).at[order].set(steps, unique_indices=True)


def hardest(nll: jax.Array, labels: jax.Array, share: float) -> jax.Array:
    """Which pixels are the `share` (above 0, to 1) of the labelled ones with the highest negative log-likelihood.

    nll: (B, H, W) -> bool (B, H, W): ceil(share * labelled pixels) of them, at least one. Of equal ones the first.
    """
    valid = (labels != IGNORE).reshape(-1)
    order = jnp.argsort(jnp.where(valid, -jax.lax.stop_gradient(nll).reshape(-1), 1))  # ignored pixels last
    part = fractions.Fraction(share).limit_denominator(SHARES)  # whole numbers: float32 would miscount
    whole, rest = jnp.divmod(valid.sum(dtype=jnp.int32), part.denominator)
    count = jnp.maximum(whole * part.numerator - (-rest * part.numerator // part.denominator), 1)
    kept = jnp.zeros(valid.shape, bool).at[order].set(jnp.arange(valid.size) < count, unique_indices=True)
    return (kept & valid).reshape(labels.shape)


def _one_hot(labels: jax.Array, classes: int) -> jax.Array:
    """bool (B, H, W, classes); none is true at ignored pixels."""
    return (labels[..., None] == jnp.arange(classes)) & (labels != IGNORE)[..., None]
