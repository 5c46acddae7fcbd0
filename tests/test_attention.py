import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ktda_jax.models import attention as attention_module
from ktda_jax.models.attention import attention


def inputs(*shape, count=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count))


def value_and_grads(implementation, query, key, value, dout):
    """Output and the gradients of query, key and value."""

    def function(*args):
        return attention(*args, implementation=implementation)

    out, pullback = jax.vjp(function, query, key, value)
    return (out, *pullback(dout))


def relative_error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def torch_value_and_grads(arrays, dout):
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in arrays]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors)
    out.backward(torch.tensor(np.asarray(dout)).transpose(1, 2))
    return [x.detach().transpose(1, 2).numpy() for x in (out, *(t.grad for t in tensors))]


# Below, at and above the chunks of 128 and 512 queries; sizes that it does not divide; head widths of the models.
SHAPES = [(2, 9, 2, 3), (1, 128, 2, 96), (2, 129, 3, 8), (2, 300, 1, 64), (1, 1, 2, 2), (1, 600, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["plain", "chunked", "unrolled", None])
def test_equals_torch_in_float64(shape, implementation):
    with jax.enable_x64(True):
        *arrays, dout = inputs(*shape, count=4, dtype=np.float64)
        ours = jax.jit(value_and_grads, static_argnums=0)(implementation, *arrays, dout)
        for a, b in zip(ours, torch_value_and_grads(arrays, dout), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("implementation", ["plain", "chunked", "cudnn"])
def test_precision_of_narrow_types(dtype, tolerance, implementation):
    if implementation == "cudnn" and dtype != "float32" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    arrays = inputs(2, 200, 2, 32, count=4)
    narrow = value_and_grads(implementation, *(x.astype(dtype) for x in arrays))
    with jax.enable_x64(True):
        # The reference starts from the same rounded inputs, so only the computation is judged.
        reference = value_and_grads("plain", *(jnp.asarray(x.astype(dtype), jnp.float64) for x in arrays))
    for a, b in zip(narrow, reference, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < tolerance


def _raises(*args):
    raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nof 8 lines")


@pytest.mark.parametrize("fault", [_raises, lambda q, k, v: 0 * (q + k + v)])
def test_where_cudnn_fails_or_is_wrong_another_form_trains(fault, monkeypatch):
    """Both on a GPU that is said to be fit: tried once, said once, also while a model is being traced."""
    said, tried = [], []
    monkeypatch.setattr(attention_module, "_has_cudnn_attention", lambda: True)
    monkeypatch.setattr(attention_module.logging, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **options: tried.append(1) or fault(*args, **options)
    )
    attention_module._cudnn_fault.cache_clear()
    try:
        query, key, value, dout = inputs(2, 64, 2, 16, count=4, dtype=jnp.bfloat16)
        found = jax.jit(functools.partial(value_and_grads, None))(query, key, value, dout)
        jax.jit(functools.partial(value_and_grads, None))(query, key, value, 2 * dout)
    finally:
        attention_module._cudnn_fault.cache_clear()
    for ours, expected in zip(found, value_and_grads("plain", query, key, value, dout), strict=True):
        assert relative_error(ours, expected) < 1e-2
    assert len(said) == len(tried) == 1 and "cuDNN's attention does not work here" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("tokens", [361, 362, 1369, 1444])
@pytest.mark.parametrize("implementation", [None, "cudnn"])
def test_odd_numbers_of_tokens_do_not_go_to_cudnn(tokens, implementation, monkeypatch):
    """JAX refuses them where gradients are wanted, which stopped the grass model's training on an H200."""

    @jax.custom_vjp
    def fused(query, key, value):
        return attention(query, key, value, implementation="chunked")

    def forward(query, key, value):
        if query.shape[1] % 2:
            raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}, KV {key.shape[1]}.")
        return jax.vjp(functools.partial(attention, implementation="chunked"), query, key, value)

    fused.defvjp(forward, lambda pullback, dout: pullback(dout))
    calls = []
    monkeypatch.setattr(attention_module, "_has_cudnn_attention", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **_: calls.append(a) or fused(*a))
    arrays = inputs(1, tokens, 2, 16, count=4, dtype=jnp.bfloat16)
    found = jax.jit(value_and_grads, static_argnums=0)(implementation, *arrays)
    assert bool(calls) == (tokens % 2 == 0)
    for a, b in zip(found, value_and_grads("plain", *arrays), strict=True):
        assert relative_error(a, b) < 2e-2


def test_layout_of_accelerators():
    """The form that GPU and TPU compile, all heads at once, run here on CPU."""
    function = attention_module._chunked
    *arrays, dout = inputs(2, 300, 3, 8, count=4)
    expected = value_and_grads("plain", *arrays, dout)

    def platform_dependent(*args, cpu, default):
        return default(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module.lax, "platform_dependent", platform_dependent)
        out, pullback = jax.vjp(function, *arrays)
        for a, b in zip((out, *pullback(dout)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    query, key, value = (30 * x for x in inputs(1, 140, 1, 8))  # exp(88) is infinite
    out = attention(query, key, value, implementation="chunked")
    expected = attention(query, key, value, implementation="plain")
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-2)


def test_long_sequences_need_little_memory():
    tokens, heads = 8192, 8
    x = jax.ShapeDtypeStruct((1, tokens, heads, 96), jnp.float32)

    def loss(*args):
        return attention(*args).sum()

    square = tokens * tokens * heads * 4
    for function in (attention, jax.grad(loss, (0, 1, 2))):
        compiled = jax.jit(function).lower(x, x, x).compile()
        # Accelerators take all heads at once: 395 MB on an H200.
        most = square / 8 if jax.default_backend() == "cpu" else square / 4
        assert compiled.memory_analysis().temp_size_in_bytes < most
        assert f"{tokens},{tokens}" not in compiled.as_text()  # no such array at all


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_batch_stays_sharded(implementation):
    devices = jax.devices("cpu")
    assert len(devices) == 8, "conftest.py sets 8 CPU devices"
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arrays = inputs(8, 150, 2, 4, count=4)
    expected = value_and_grads(implementation, *arrays)
    step = jax.jit(value_and_grads, static_argnums=0)
    sharded = [jax.device_put(x, sharding) for x in arrays]
    text = step.lower(implementation, *sharded).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in text
    for a, b in zip(step(implementation, *sharded), expected, strict=True):
        assert a.sharding.is_equivalent_to(sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_other_platforms(platform):
    """A CPU host that lowers for an accelerator gets the accelerator's layout: dots over all heads."""
    if jax.default_backend() != "cpu":
        pytest.skip("of a CPU host")
    x = jax.ShapeDtypeStruct((2, 2048, 8, 96), jnp.bfloat16)
    text = jax.jit(attention).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert "8x2x256x2048xf32" in text
    assert "8x2x256x2048xf32" not in jax.jit(attention).lower(x, x, x).as_text()


def test_rejects_unknown_implementation():
    with pytest.raises(ValueError, match=r"'flash' is none of"):
        attention(*inputs(1, 4, 1, 2), implementation="flash")
