"""Operations counted from the traced program: known products, and the whole model against XLA's count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ktda_jax.models import flat
from ktda_jax.models.attention import attention
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.recompute import norm_linear
from ktda_jax.models.vit import ViT, ViTConfig
from ktda_jax.plan import flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
    assert flops.count(jnp.matmul, shape(3, 5, 7), shape(3, 7, 11)) == 2 * 3 * 5 * 7 * 11

    def conv(x, kernel, groups):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert flops.count(lambda x, k: conv(x, k, 1), shape(2, 8, 8, 6), shape(3, 3, 6, 10)) == 2 * 2 * 4 * 4 * 10 * 9 * 6
    assert flops.count(lambda x, k: conv(x, k, 6), shape(2, 8, 8, 6), shape(7, 7, 1, 6)) == 2 * 2 * 4 * 4 * 6 * 49


def test_a_gradient_costs_as_much_as_the_product():
    def strided(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=numbers).sum()

    args = shape(2, 8, 8, 6), shape(2, 2, 6, 10)
    assert flops.count(jax.value_and_grad(strided, (0, 1)), *args) == 3 * flops.count(strided, *args)


def test_what_a_recomputation_does_not_need_is_not_counted():
    """Of norm and linear layer the norm is computed again, and the product, which no gradient needs, is not."""
    norm, linear = nnx.LayerNorm(8, rngs=nnx.Rngs(0)), nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    graphdef, params, _ = flat.split(nnx.List([norm, linear]))

    def loss(params, x):
        norm, linear = flat.merge(graphdef, params, {})
        return jnp.square(norm_linear(norm, linear, x)).sum()

    found = flops.count(jax.grad(loss, (0, 1)), params, shape(5, 8))
    assert found == 3 * 2 * 5 * 8 * 16


def test_bytes_of_products_in_loops_from_the_second_turn_on():
    def turns(length):
        return lambda x: jax.lax.scan(lambda y, _: (y @ y, None), x, None, length)[0]

    def counted(function, accumulate=1):
        return flops.repeated_bytes(jax.make_jaxpr(function)(shape(5, 5)).jaxpr, accumulate)

    assert counted(turns(6)) == 5 * 3 * 25 * 4 and counted(turns(1)) == 0
    twice = lambda x: jax.lax.scan(lambda y, _: (turns(6)(y), None), x, None, 2)[0]  # noqa: E731
    assert counted(twice) == 2 * 5 * 300 + 300 and counted(twice, 2) == 2 * 5 * 300


def test_loops_count_every_turn_and_branches_once():
    def looped(x):
        return jax.lax.fori_loop(0, 6, lambda _, y: y @ y, x)

    assert flops.count(looped, shape(5, 5)) == 6 * 2 * 5**3
    assert flops.count(jax.jit(jax.checkpoint(looped)), shape(5, 5)) == 6 * 2 * 5**3
    with pytest.raises(ValueError, match="a while loop's length is not known"):
        flops.count(lambda x: jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ y, x), shape(5, 5))


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_attention_costs_the_same_however_it_is_computed(implementation):
    query = shape(2, 256, 3, 16)
    found = flops.count(lambda q: attention(q, q, q, implementation=implementation), query)
    assert found == 2 * 2 * 2 * 3 * 256 * 256 * 16


def test_a_model_agrees_with_xla():
    """XLA counts elementwise work too, but no products with padding, and a depthwise convolution by its CPU form: hence
    a student without blocks."""
    model = KTDAConfig(
        num_classes=3, student=ConvNeXtConfig((0, 0, 0, 0), (32, 64, 64, 128)), fmm=FMMConfig(blocks=2, heads=2),
        teacher=ViTConfig(width=64, depth=4, heads=2, image_size=(64, 64)), head_channels=64, aux_channels=32,
    )  # fmt: skip
    found = flops.of_model(model, (64, 64))
    graphdef, params, stats = flat.abstract(lambda: KTDA(model, rngs=nnx.Rngs(0)))

    def xla(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    forward = xla(lambda p, s, x: flat.merge(graphdef, p, s)(x).logits, params, stats, shape(1, 64, 64, 3))
    vit, arrays, _ = flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))
    teacher = xla(lambda a, x: flat.merge(vit, a, {})(x), arrays, shape(1, 64, 64, 3))
    assert found["inference"] == pytest.approx(forward, rel=0.05)
    assert found["teacher"] == pytest.approx(teacher, rel=0.05)
    assert found["training"] > 3 * found["inference"] + found["teacher"]  # and the auxiliary head
    assert np.diff([flops.of_model(model, (64, 64), distill=d)["training"] for d in (False, True)]) == found["teacher"]
