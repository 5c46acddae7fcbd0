"""The student against transformers' ConvNeXt backbones, in float64 with random weights; stochastic depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch_weights import (
    adopt,
    compiled,
    error,
    gradients,
    kept_for_backward,
    nchw,
    nhwc,
    ours,
    random,
    randomize,
    value_and_pullback,
    worst,
)

from ktda_jax.models import convnext, depthwise, flat
from ktda_jax.models.convnext import Block, ConvNeXt, ConvNeXtConfig
from ktda_jax.models.depthwise import depthwise_conv

pytestmark = pytest.mark.usefixtures("all_recomputed")

RENAMES = [
    (r"^embeddings\.patch_embeddings", "downsample.0.conv"),
    (r"^embeddings\.layernorm", "downsample.0.ln"),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.0", r"downsample.\1.ln"),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.1", r"downsample.\1.conv"),
    (r"^encoder\.stages\.(\d)\.layers", r"stages.\1"),
    (r"^hidden_states_norms\.stage(\d)", lambda match: f"norms.{int(match[1]) - 1}"),
    (r"dwconv", "depthwise_conv"),
    (r"pwconv", "pointwise_conv"),
    (r"(^|\.)layernorm", r"\1norm"),
    (r"layer_scale_parameter", "gamma"),
    (r"grn\.weight", "grn.gamma"),
    (r"grn\.bias", "grn.beta"),
]
SMALL = ConvNeXtConfig(depths=(1, 1, 2, 1), channels=(4, 8, 12, 16))
TWO_STAGES = ConvNeXtConfig(depths=(1, 1), channels=(4, 8))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick(monkeypatch):
    """XLA's own depthwise convolution, which compiles faster than the 49 products that a CPU gets."""
    implementation = functools.partial(depthwise_conv, implementation="conv")
    monkeypatch.setattr(convnext, "depthwise_conv", implementation)


def torch_model(config: ConvNeXtConfig) -> torch.nn.Module:
    settings = dict(
        depths=list(config.depths), hidden_sizes=list(config.channels), num_channels=config.bands,
        num_stages=len(config.depths), out_features=[f"stage{k + 1}" for k in range(len(config.depths))],
        drop_path_rate=config.drop_path,
    )  # fmt: skip
    if config.v2:
        return transformers.ConvNextV2Backbone(transformers.ConvNextV2Config(**settings)).eval()
    settings["layer_scale_init_value"] = config.layer_scale
    return transformers.ConvNextBackbone(transformers.ConvNextConfig(**settings)).eval()


def from_torch(tensors):
    """GRN's (1, 1, 1, C) as (C,)."""
    return {k: v.flatten() if ".grn." in k else v for k, v in tensors.items()}


def split_ours(config: ConvNeXtConfig, theirs: torch.nn.Module, dtype=jnp.float64):
    def build():
        return ConvNeXt(config, dtype=dtype, rngs=nnx.Rngs(0))

    return adopt(build, from_torch(theirs.state_dict()), RENAMES)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SMALL, (64, 96)),
        (dataclasses.replace(TWO_STAGES, v2=True), (16, 32)),
        (dataclasses.replace(TWO_STAGES, bands=5), (21, 38)),  # what fills no patch is dropped
    ],
    ids=["V1", "V2", "five bands, odd size"],
)
def test_feature_maps_equal_transformers(config, size):
    theirs = randomize(torch_model(config))
    x = random(2, *size, config.bands)
    with torch.no_grad():
        expected = theirs(nchw(x)).feature_maps
    for a, b in zip(compiled(*split_ours(config, theirs))(jnp.asarray(x)), expected, strict=True):
        assert error(a, nhwc(b)) < 1e-12


@pytest.mark.parametrize(("v2", "remat"), [(False, False), (True, True)], ids=["V1", "V2, remat"])
def test_gradients_equal_transformers(v2, remat, quick):
    """With XLA's depthwise convolution; test_depthwise.py has the gradients of ours."""
    config = dataclasses.replace(TWO_STAGES, v2=v2, remat=remat)
    theirs = randomize(torch_model(config))
    graphdef, params, _ = split_ours(config, theirs)
    x = nchw(random(2, 16, 24, 3)).requires_grad_()
    expected = theirs(x).feature_maps
    cotangents = [random(*nhwc(f).shape, seed=1) for f in expected]
    torch.autograd.backward(expected, [nchw(c) for c in cotangents])

    def function(primals):
        params, x = primals
        return flat.merge(graphdef, params, {})(x)

    _, (params_grad, x_grad) = value_and_pullback(
        function, (params, jnp.asarray(nhwc(x))), [jnp.asarray(c) for c in cotangents]
    )
    assert error(x_grad, nhwc(x.grad)) < 1e-11
    assert worst(params_grad, ours(from_torch(gradients(theirs)), RENAMES, params))[0] < 1e-11


@pytest.mark.parametrize(
    ("dtype", "v2", "tolerance"), [(jnp.float32, False, 1e-5), (jnp.bfloat16, False, 3e-2), (jnp.bfloat16, True, 3e-2)]
)
def test_precision_of_narrow_types(dtype, v2, tolerance, quick):
    config = dataclasses.replace(TWO_STAGES, v2=v2)
    theirs = randomize(torch_model(config))
    x = random(2, 32, 32, 3)
    outputs = compiled(*split_ours(config, theirs, dtype))(jnp.asarray(x, dtype))
    with torch.no_grad():
        expected = theirs(nchw(x)).feature_maps
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == dtype
        assert error(a, nhwc(b)) < tolerance


@pytest.mark.parametrize(("preset", "published"), [
    ("tiny", 28_589_128), ("base", 88_591_464), ("large", 197_767_336),
    ("v2_atto", 3_708_400), ("v2_femto", 5_233_240),
])  # fmt: skip
def test_presets_have_the_published_sizes(preset, published):
    """The published counts are of classifiers: a final LayerNorm and 1000 classes, no LayerNorm per stage."""
    config = ConvNeXtConfig(**convnext.PRESETS[preset])
    _, params, _ = flat.abstract(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))
    classifier = 2 * config.channels[-1] + 1000 * (config.channels[-1] + 1)
    assert flat.count(params) == published - classifier + 2 * sum(config.channels)
    if preset == "base":
        assert flat.count(params) == pytest.approx(87.6e6, abs=0.05e6)


def test_drop_path_rises_linearly_over_all_blocks():
    config = dataclasses.replace(SMALL, drop_path=0.4)
    model = nnx.eval_shape(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))
    rates = [block.rate for stage in model.stages for block in stage]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-15)
    modules = [m for stage in torch_model(config).encoder.stages for m in stage.layers]
    np.testing.assert_allclose(rates, [getattr(m.drop_path, "drop_prob", 0) for m in modules], atol=1e-7)


def test_drop_path_drops_the_branch_of_whole_samples(quick):
    theirs = randomize(torch_model(SMALL).encoder.stages[0].layers[0])

    def build():
        return Block(4, 0.75, SMALL, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    block = compiled(*adopt(build, theirs.state_dict(), RENAMES))
    x = jnp.asarray(random(64, 3, 3, 4))
    branch = block(x, None) - x
    ratio = np.asarray((block(x, jax.random.key(0)) - x) / branch).round(6)
    assert set(np.unique(ratio)) == {0, 4}
    assert (ratio == ratio[:, :1, :1, :1]).all()


def test_drop_path_draws(quick):
    """One key, one draw; another key or sample, another; no key, no drop. The first block has rate 0."""
    config = dataclasses.replace(TWO_STAGES, drop_path=0.5)
    theirs = randomize(torch_model(config))
    model = compiled(*split_ours(config, theirs))
    x = random(1, 16, 16, 3).repeat(8, 0)
    first, again, other = (model(jnp.asarray(x), key=jax.random.key(seed))[-1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert error(first, other) > 0.01
    assert len(np.unique(first[:, 0, 0, 0].round(9))) == 2  # equal samples meet the two fates of the last block
    with torch.no_grad():
        assert error(model(jnp.asarray(x))[-1], nhwc(theirs(nchw(x)).feature_maps[-1])) < 1e-12


def test_blocks_draw_independently(monkeypatch):
    draws = []

    def record(block, x, key):
        draws.append(jax.random.bernoulli(key, 0.5, (1000,)))
        return x

    monkeypatch.setattr(Block, "__call__", record)
    config = ConvNeXtConfig(depths=(1, 2, 1, 1), channels=(4, 4, 4, 4), drop_path=0.5)
    graphdef, params, _ = split_ours(config, randomize(torch_model(config)))

    @jax.jit
    def draw(key):
        flat.merge(graphdef, params, {})(jnp.zeros((1, 32, 32, 3)), key=key)
        return draws

    draws = draw(jax.random.key(0))
    assert len(draws) == 5
    assert np.abs(np.corrcoef(draws) - np.eye(5)).max() < 0.15


def test_remat_keeps_less_for_the_backward_pass():
    def kept(remat):
        config = ConvNeXtConfig(depths=(4, 4), channels=(4, 8), remat=remat)
        graphdef, params, _ = flat.abstract(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))
        x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return kept_for_backward(lambda params, x: flat.merge(graphdef, params, {})(x), params, x)

    less, more = kept(True), kept(False)
    assert less < 0.4 * more


def test_remat_changes_neither_outputs_nor_gradients(quick):
    """Also where drop path draws a second time."""
    config = ConvNeXtConfig(depths=(1,), channels=(4,))
    theirs = randomize(torch_model(config))
    x = jnp.asarray(random(4, 16, 16, 3))

    def run(remat):
        graphdef, params, _ = split_ours(dataclasses.replace(config, remat=remat), theirs)

        def function(primals):
            params, x = primals
            model = flat.merge(graphdef, params, {})
            model.stages[0][0].rate = 0.5
            outputs = model(x, key=jax.random.key(0))
            return outputs, sum(jnp.sum(jnp.sin(f)) for f in outputs)

        zeros = [jnp.zeros((4, 4, 4, 4))]
        return value_and_pullback(function, (params, x), (zeros, jnp.ones(())))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), run(True), run(False))


def test_shifted_products_are_not_compiled_for_each_of_their_readers(monkeypatch):
    """XLA's CPU backend would fuse the 49 products into a norm's mean, its variance and whatever else reads them."""
    config = ConvNeXtConfig(depths=(1, 1), channels=(8, 16))
    graphdef, params, _ = flat.abstract(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))

    def products():
        depthwise._shifts_grad.clear_cache()
        gradient = jax.grad(lambda params, x: sum(y.sum() for y in flat.merge(graphdef, params, {})(x)))
        lowered = jax.jit(gradient).lower(params, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
        return lowered.compile().as_text().count(" multiply(")

    ours = products()
    monkeypatch.setattr(depthwise, "_shifts", depthwise._shifted_sum)
    theirs = products()
    depthwise._shifts_grad.clear_cache()
    assert ours < 0.85 * theirs  # all multiplications; 0.4 of them with JAX 0.10, 0.7 with 0.12
