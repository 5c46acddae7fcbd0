"""Feature modulation against torch's transformer layer and its own operations."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch_weights import adopt, error, gradients, kept_for_backward, ours, random, randomize, value_and_pullback, worst

from ktda_jax.models import flat, fmm
from ktda_jax.models.fmm import FMM, FMMConfig

pytestmark = pytest.mark.usefixtures("all_recomputed")

RENAMES = [
    (r"self_attn\.in_proj_(weight|bias)", r"attn.qkv.\1"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"linear(\d)", r"mlp.fc\1"),
    (r"\.0\.(weight|bias)$", r".fc1.\1"),
    (r"\.2\.(weight|bias)$", r".fc2.\1"),
]
WIDTHS = (16, 24)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def torch_block(form: str, width: int) -> torch.nn.Module:
    if form == "mlp":
        nn = torch.nn
        return nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, width))
    return torch.nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=4 * width, dropout=0, activation="gelu", layer_norm_eps=1e-5,
        batch_first=True, norm_first=True,
    )  # fmt: skip


def torch_fmm(form: str, blocks: int) -> torch.nn.Module:
    lists = [torch.nn.ModuleList(torch_block(form, width) for _ in range(blocks)) for width in WIDTHS]
    return randomize(torch.nn.ModuleDict({"adapters": torch.nn.ModuleList(lists)}))


def split_ours(theirs: torch.nn.Module, config: FMMConfig):
    def build():
        return FMM(WIDTHS, config, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    return adopt(build, theirs.state_dict(), RENAMES)


def inputs():
    """Levels of different sizes, not square."""
    return [random(2, 3, 5, WIDTHS[0]), random(2, 4, 2, WIDTHS[1])]


@pytest.mark.parametrize(
    ("form", "blocks", "remat"), [("transformer", 1, False), ("transformer", 1, True), ("mlp", 2, False)]
)
def test_equals_torch(form, blocks, remat):
    """Outputs and all gradients; every level has its own blocks and attends to its own tokens."""
    theirs = torch_fmm(form, blocks)
    graphdef, params, _ = split_ours(theirs, FMMConfig(form=form, blocks=blocks, heads=4, remat=remat))
    features, cotangents = inputs(), [random(*f.shape, seed=1) for f in inputs()]
    expected = []
    for level, feature, cotangent in zip(theirs["adapters"], features, cotangents, strict=True):
        leaf = torch.tensor(feature).requires_grad_()
        tokens = leaf.flatten(1, 2)
        for block in level:
            tokens = block(tokens)
        tokens.reshape(leaf.shape).backward(torch.tensor(cotangent))
        expected.append((tokens.detach().reshape(leaf.shape), leaf.grad))

    def function(primals):
        params, features = primals
        return flat.merge(graphdef, params, {})(features)

    outputs, (params_grad, features_grad) = value_and_pullback(
        function, (params, [jnp.asarray(f) for f in features]), [jnp.asarray(c) for c in cotangents]
    )
    for out, gradient, (expected_out, expected_gradient) in zip(outputs, features_grad, expected, strict=True):
        assert error(out, expected_out) < 1e-12
        assert error(gradient, expected_gradient) < 1e-11
    assert worst(params_grad, ours(gradients(theirs), RENAMES, params))[0] < 1e-11


@pytest.mark.parametrize(("form", "blocks"), [("transformer", 4), ("mlp", 1)])
def test_shapes_are_kept(form, blocks):
    shapes = [(2, size, size, 32) for size in (76, 38, 19, 9)]
    config = FMMConfig(form=form, blocks=blocks)
    module = nnx.eval_shape(lambda: FMM([32] * 4, config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert [len(blocks_of_level) for blocks_of_level in module.adapters] == [blocks] * 4
    features = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert [f.shape for f in nnx.eval_shape(lambda m, x: m(x), module, features)] == shapes


def test_remat_keeps_less_for_the_backward_pass():
    def kept(remat):
        graphdef, params, _ = split_ours(torch_fmm("transformer", 2), FMMConfig(blocks=2, heads=4, remat=remat))
        return kept_for_backward(lambda params, features: flat.merge(graphdef, params, {})(features), params, inputs())

    assert kept(True) < kept(False) / 4


def test_chunks_of_tokens_equal_the_whole(monkeypatch):
    """Also where the chunk does not divide the 15 and 8 tokens."""
    theirs = torch_fmm("transformer", 1)
    whole = flat.merge(*split_ours(theirs, FMMConfig(blocks=1, heads=4)))
    chunked = flat.merge(*split_ours(theirs, FMMConfig(blocks=1, heads=4, remat=True)))
    features = [jnp.asarray(f) for f in inputs()]
    monkeypatch.setattr(fmm, "CHUNK", 4)
    assert "scan" in str(jax.make_jaxpr(chunked)(features))
    for a, b in zip(jax.jit(chunked)(features), jax.jit(whole)(features), strict=True):
        assert error(a, b) < 1e-12


def test_unknown_form():
    with pytest.raises(ValueError, match=r"'conv'; choose 'transformer' or 'mlp'"):
        FMMConfig(form="conv")
