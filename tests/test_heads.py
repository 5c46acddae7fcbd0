"""The decoders against transformers' UperNet heads: the same computation as mmsegmentation's, less the dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch_weights import adopt, error, gradients, nchw, nhwc, ours, random, randomize, value_and_pullback, worst

from ktda_jax.models import flat, heads
from ktda_jax.models.heads import FCNHead, LinearHead, UPerHead

RENAMES = [
    (r"classifier", "conv_seg"),
    (r"psp_modules\.(\d)\.1", r"psp.\1"),
    (r"batch_norm", "bn"),
]
CHANNELS, CLASSES = (4, 6, 8, 10), 5
SIZES = [(20, 16), (10, 8), (5, 4), (2, 2)]  # of a 5 x 4 grid after the neck


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def torch_heads() -> torch.nn.Module:
    stages = [f"stage{k}" for k in (1, 2, 3, 4)]
    backbone = transformers.ConvNextConfig(hidden_sizes=list(CHANNELS), depths=[1] * 4, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=12, auxiliary_channels=7, num_labels=CLASSES
    )
    return transformers.UperNetForSemanticSegmentation(config)


def cases():
    """Name -> (what builds ours, the name of torch's)."""

    def uper():
        return UPerHead(CHANNELS, 12, CLASSES, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def fcn():
        return FCNHead(CHANNELS[2], 7, CLASSES, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    return {"decode": (uper, "decode_head"), "auxiliary": (fcn, "auxiliary_head")}


def prepare(name: str):
    """Torch's head, ours as of flat.split, and the input features."""
    build, attribute = cases()[name]
    theirs = randomize(getattr(torch_heads(), attribute))
    features = [random(3, *size, c, seed=k) for k, (size, c) in enumerate(zip(SIZES, CHANNELS, strict=True))]
    return theirs, adopt(build, theirs.state_dict(), RENAMES), features


def of(name: str, features):
    """What the head takes: all levels, or the third."""
    return features if name == "decode" else features[2]


@pytest.mark.parametrize("name", ["decode", "auxiliary"])
def test_training_equals_transformers(name):
    """Logits, BatchNorm statistics after the step, gradients of every input and parameter."""
    theirs, (graphdef, params, stats), features = prepare(name)
    tensors = [nchw(f).requires_grad_() for f in features]
    expected = theirs.train()(tensors)
    cotangent = random(*nhwc(expected).shape, seed=9)
    expected.backward(nchw(cotangent))

    def function(primals):
        params, features = primals
        head = flat.merge(graphdef, params, stats)
        return head(of(name, features), train=True, key=None), flat.batch_stats(head)

    (logits, new_stats), (params_grad, features_grad) = value_and_pullback(
        function,
        (params, [jnp.asarray(f) for f in features]),
        (jnp.asarray(cotangent), jax.tree.map(jnp.zeros_like, stats)),
    )
    assert error(logits, nhwc(expected)) < 1e-11
    expected_stats = {k: v for k, v in ours(theirs.state_dict(), RENAMES, stats).items() if k in stats}
    assert worst(new_stats, expected_stats)[0] < 1e-12
    assert worst(params_grad, ours(gradients(theirs), RENAMES, params))[0] < 1e-9
    for a, b in zip(features_grad, tensors, strict=True):
        if b.grad is not None:  # the auxiliary head uses one level
            assert error(a, nhwc(b.grad)) < 1e-9


@pytest.mark.parametrize("name", ["decode", "auxiliary"])
def test_evaluation_equals_transformers(name, monkeypatch):
    """And dropout stands just before the classifier: here it doubles, and so do the logits without their bias."""
    theirs, (graphdef, params, stats), features = prepare(name)
    calls = []

    def double(x, rate, key):
        calls.append((x.shape[-1], rate, key))
        return 2 * x

    monkeypatch.setattr(heads, "dropout2d", double)
    features = [jnp.asarray(f) for f in features]
    head = flat.merge(graphdef, params, stats)
    doubled = jax.jit(lambda features: head(of(name, features), train=False, key=None))(features)
    assert calls == [(12 if name == "decode" else 7, 0.1, None)]
    with torch.no_grad():
        expected = nhwc(theirs.eval()([nchw(f) for f in features]))
    bias = params["conv_seg/bias"]
    assert error((doubled - bias) / 2 + bias, expected) < 1e-12


def test_training_on_one_image_is_finite():
    """The pyramid's single bin then has one value to normalise: its variance is 0, not NaN."""
    _, (graphdef, params, stats), features = prepare("decode")

    @jax.jit
    def train(params, features):
        head = flat.merge(graphdef, params, stats)
        return head(features, train=True, key=None), flat.batch_stats(head)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train(params, [f[:1] for f in features])))


def test_the_linear_head_is_one_convolution_of_all_levels():
    """Against torch's 1x1 convolution of the levels resized and put together: logits and gradients."""
    head = LinearHead(CHANNELS, CLASSES, dropout=0.0, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    features = [random(3, *size, c, seed=k) for k, (size, c) in enumerate(zip(SIZES, CHANNELS, strict=True))]
    dout = random(3, *SIZES[0], CLASSES, seed=9)
    logits, pullback = jax.vjp(lambda x: head(x, train=True, key=None), [jnp.asarray(f) for f in features])
    tensors = [torch.tensor(np.moveaxis(f, -1, 1), requires_grad=True) for f in features]
    wide = [torch.nn.functional.interpolate(x, SIZES[0], mode="bilinear", align_corners=False) for x in tensors]
    kernel = np.concatenate([layer.kernel[...] for layer in head.conv_seg]).T[:, :, None, None]
    bias = sum(layer.bias[...] for layer in head.conv_seg)
    theirs = torch.nn.functional.conv2d(torch.cat(wide, 1), torch.tensor(kernel), torch.tensor(np.asarray(bias)))
    theirs.backward(torch.tensor(np.moveaxis(dout, -1, 1)))
    np.testing.assert_allclose(logits, np.moveaxis(theirs.detach().numpy(), 1, -1), rtol=1e-10, atol=1e-12)
    for ours_, tensor in zip(pullback(jnp.asarray(dout))[0], tensors, strict=True):
        np.testing.assert_allclose(ours_, np.moveaxis(tensor.grad.numpy(), 1, -1), rtol=1e-10, atol=1e-12)
