"""The training loss: cross entropy of both heads plus distillation (paper section III-D; reference page).

What else may stand beside the cross entropy is in region_losses.py.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ktda_jax import UserError
from ktda_jax.config.settings import Loss
from ktda_jax.data.datasets import IGNORE
from ktda_jax.models.ktda import Outputs, full_size
from ktda_jax.models.layers import at_least_float32
from ktda_jax.training import region_losses

EPS = float(jnp.finfo(jnp.float32).eps)  # mmsegmentation adds it to the denominator, which also saves 0 / 0
KL_AXES = {"width": (2,), "channel": (3,), "position": (1, 2)}  # axes of (B, H, W, C) the softmax runs over


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, class_weights: Sequence[float] | None = None,
    avg_non_ignore: bool = False, hard_share: float | None = None,
) -> jax.Array:  # fmt: skip
    """logits: (B, H, W, C), labels: (B, H, W) with 255 = ignore -> scalar.

    The mean is over all pixels, ignored ones counted in the denominator as mmsegmentation does by default;
    with `avg_non_ignore` over the (class-weighted) pixels that count, as torch's own weighted mean. `hard_share`: only
    those of the highest loss count, that share of the labelled ones, and the mean is over them alone.
    """
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits))
    valid = labels != IGNORE
    index = jnp.where(valid, labels, 0).astype(jnp.int32)
    nll = -jnp.take_along_axis(log_probabilities, index[..., None], axis=-1)[..., 0]
    weights = valid.astype(nll.dtype)
    if class_weights is not None:
        weights = weights * jnp.asarray(class_weights, nll.dtype)[index]
    if hard_share is not None:
        weights = weights * region_losses.hardest(nll, labels, hard_share)
    total = weights.sum() if avg_non_ignore or hard_share is not None else labels.size
    return (nll * weights).sum() / (total + EPS)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Percent of the labelled pixels that argmax gets right (mmsegmentation's acc_seg)."""
    valid = labels != IGNORE
    hits = (jnp.argmax(logits, axis=-1) == labels) & valid
    return 100.0 * hits.sum() / jnp.maximum(valid.sum(), 1)


def kl_divergence(student: jax.Array, teacher: jax.Array, *, temperature: float, axis: str) -> jax.Array:
    """KL(softmax(t / T) || softmax(s / T)) of (B, H, W, C) maps, summed, divided by the batch size."""
    log_s = jax.nn.log_softmax(student / temperature, axis=KL_AXES[axis])
    log_t = jax.nn.log_softmax(teacher / temperature, axis=KL_AXES[axis])
    return (jnp.exp(log_t) * (log_t - log_s)).sum() / student.shape[0]


def distillation(
    student: Sequence[jax.Array], taps: Sequence[jax.Array | None], *, alpha: float = 0.5, temperature: float = 1.0,
    axis: str = "width", distance: str = "published", weights: Sequence[float] | None = None,
) -> jax.Array:  # fmt: skip
    """FAM outputs against the teacher's taps, (B, h, w, C) per level -> scalar, averaged over the levels with a tap.

    `distance`: published (`alpha` of KL, the rest MSE), mse, or cosine (1 - cosine of a token's channels, in the mean
    over tokens); `weights`: of the four levels.
    """
    weights, total, levels = weights or (1.0,) * len(student), 0.0, 0
    for s, t, weight in zip(student, taps, weights, strict=True):
        if t is None:
            continue
        if s.shape != t.shape:
            raise UserError(
                f"the FAM's output is {s.shape[1]}x{s.shape[2]}x{s.shape[3]} but the teacher's features are "
                f"{t.shape[1]}x{t.shape[2]}x{t.shape[3]}; leave config.model.grid unset, or set it to the "
                "teacher's grid"
            )
        s, t, levels = at_least_float32(s), at_least_float32(t), levels + 1
        if distance == "cosine":
            total += weight * (1 - _cosine(s, t)).mean()
            continue
        share = alpha if distance == "published" else 0.0
        total += weight * (1 - share) * jnp.square(s - t).mean()
        if share != 0:
            total += weight * share * temperature**2 * kl_divergence(s, t, temperature=temperature, axis=axis)
    total = total / levels
    return total / 2 if distance == "published" and alpha == 0 else total  # upstream halves the pure-MSE form


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Over the last axis; the clamp keeps the gradient of a zero vector finite."""
    norms = jnp.maximum(jnp.square(a).sum(-1) * jnp.square(b).sum(-1), 1e-12)
    return (a * b).sum(-1) * jax.lax.rsqrt(norms)


def head_loss(logits: jax.Array, labels: jax.Array, config: Loss) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the losses that have a weight, and its parts; logits: (B, H, W, C), as large as the labels.

    The parts are weighted, too; there are none if the cross entropy is all there is.
    """
    losses = {
        "cross_entropy": functools.partial(
            cross_entropy, class_weights=config.class_weights, avg_non_ignore=config.avg_non_ignore,
            hard_share=config.hard_share,
        ),
        "dice": region_losses.dice,
        "focal": functools.partial(region_losses.focal, gamma=config.focal_gamma),
        "lovasz": region_losses.lovasz,
    }  # fmt: skip
    weights = {name: getattr(config, name) for name in losses if getattr(config, name) != 0}
    if weights == {"cross_entropy": 1}:  # as published
        return losses["cross_entropy"](logits, labels), {}
    parts = {name: weight * losses[name](logits, labels) for name, weight in weights.items()}
    return sum(parts.values()), parts if set(parts) != {"cross_entropy"} else {}


def total_loss(outputs: Outputs, labels: jax.Array | None, config: Loss) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`decode + aux_weight * aux + distill` and its terms; labels: (B, H, W) of the rows that have logits.

    Without logits it is the distillation alone. `config`: config.loss. Where `decode` is more than the cross entropy,
    its parts are terms as well; they are not added again.
    """
    terms, parts = {}, {}
    if outputs.logits is not None:
        logits = full_size(outputs.logits, labels.shape[1:3])
        terms["decode"], parts = head_loss(logits, labels, config)
    if outputs.aux_logits is not None:
        aux = full_size(outputs.aux_logits, labels.shape[1:3])
        terms["aux"] = config.aux_weight * head_loss(aux, labels, config)[0]
    if outputs.taps is not None:
        terms["distill"] = distillation(
            outputs.student, outputs.taps, alpha=config.alpha, temperature=config.temperature,
            axis=config.kl_axis, distance=config.distance, weights=config.tap_weights,
        )  # fmt: skip
    loss = sum(terms.values())
    if outputs.logits is None:
        return loss, {"loss": loss, **terms}
    return loss, {"loss": loss, **terms, **parts, "acc": accuracy(logits, labels)}
