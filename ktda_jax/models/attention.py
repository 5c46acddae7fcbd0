"""Self-attention whose memory grows with the number of tokens N, not with its square.

Five ways to the same result:
  plain     materialises (B, heads, N, N); fastest for short sequences.
  chunked   holds the scores of one chunk of queries at a time, forward and backward.
  unrolled  the same forward, as a graph without loops, for formats that have none to speak of (ONNX).
  cudnn     NVIDIA's flash attention, for bfloat16 and float16.
  splash    JAX's fused kernel for TPUs (splash.py), for bfloat16 on the mesh that the caller has set.

The batch axis is a batch dimension of every product and is never looped over, so it may be sharded.
"""

import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from ktda_jax.models import splash

IMPLEMENTATIONS = ("plain", "chunked", "unrolled", "cudnn", "splash", "xla")
PLAIN_TOKENS = 512  # on CPU plain is up to a third faster at 361 tokens, and half as fast from 1,024


def attention(query, key, value, *, implementation=None):
    """softmax(query key^T / sqrt(head_dim)) value; all (B, N, heads, head_dim), floating, one dtype.

    `implementation` is one of the above; None chooses by device, dtype and N, 'xla' by N alone, so that the program
    runs on any device. 'cudnn' takes 16-bit inputs of an even number of tokens only (JAX refuses odd ones
    in training) and is 'chunked' for others. Softmax is float32 or wider.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"attention implementation {implementation!r} is none of {IMPLEMENTATIONS}")
    tokens, head_dim = query.shape[1], query.shape[3]
    fused = query.dtype in (jnp.bfloat16, jnp.float16) and tokens % 2 == 0
    if implementation is None and splash.fits(query):
        implementation = "splash"
    if implementation in (None, "xla"):
        # cuDNN's kernels take head_dim up to 128 in multiples of 8.
        fits = implementation is None and fused and head_dim % 8 == 0 and head_dim <= 128
        cudnn = fits and _has_cudnn_attention() and not _cudnn_fault(head_dim, query.dtype)
        implementation = "cudnn" if cudnn else "plain" if tokens <= PLAIN_TOKENS else "chunked"
    if implementation == "cudnn" and fused:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    if implementation == "splash":
        return splash.splash(query, key, value)
    if implementation == "plain":
        return _plain(query, key, value)
    if implementation == "unrolled":
        rows = (query[:, start : start + PLAIN_TOKENS] for start in range(0, tokens, PLAIN_TOKENS))
        return jnp.concatenate([_plain(chunk, key, value) for chunk in rows], axis=1)
    return _chunked(query, key, value)


def _has_cudnn_attention():
    """The default device is an NVIDIA GPU of compute capability 8 (Ampere) or later."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # '9.0'; AMD says 'gfx90a'
    return device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8


@functools.cache
def _cudnn_fault(head_dim, dtype):
    """What is wrong with cuDNN's attention on this device, tried once on a tiny input, forward and backward; or None.

    Another cuDNN than JAX was built for, or a new GPU, fails at the first step otherwise, minutes after the start.
    """
    with jax.ensure_compile_time_eval():  # also where a model is being traced
        try:
            arrays = jax.random.normal(jax.random.key(0), (4, 2, 128, 2, head_dim), dtype)

            def products(attend, query, key, value, weights):
                return (attend(query, key, value) * weights).astype(jnp.float32).sum()

            cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            found, expected = (
                jax.jit(jax.grad(functools.partial(products, attend), (0, 1, 2)))(*arrays) for attend in (cudnn, _plain)
            )
            error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, expected, strict=True))
            fault = None if error < 0.05 else f"its gradients differ by {100 * error:.0f} %"
        except Exception as raised:  # of many kinds, and none that a user could do anything about
            fault = " ".join(str(raised).split())[:200] or type(raised).__name__
    if fault:
        logging.warning("cuDNN's attention does not work here (%s); a slower form is used", fault)
    return fault


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _plain(query, key, value):
    wide = _wide(query.dtype)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, preferred_element_type=wide).astype(query.dtype)


# Chunked. On CPU one head and 128 queries at a time: plain matrix products whose scores (3 MB for 5,776
# tokens) stay in cache. Accelerators take all heads at once. The platform is that of the lowering, not of
# this process: a CPU host may compile for TPU.


@jax.custom_vjp
def _chunked(query, key, value):
    return _chunked_forward(query, key, value)[0]


def _chunked_forward(query, key, value):
    out, lse = _over_heads(_head_forward, query, key, value, in_place=1)
    return out, (query, key, value, out, lse)


def _chunked_backward(residuals, dout):
    query, key, value, out, lse = residuals
    wide = _wide(query.dtype)
    # Sum over keys of weight times its gradient, (B, N, heads, 1): the softmax's share of the backward.
    delta = jnp.einsum("bnhd,bnhd->bnh", dout, out, preferred_element_type=wide)[..., None]
    return _over_heads(_head_backward, query, key, value, lse, dout, delta, in_place=3)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _over_heads(one_head, *arrays, in_place):
    """Applies one_head(*arrays, chunk=...), which sees (B, N, D), to every head of (B, N, heads, D).

    Its first `in_place` results look like its first arguments, and the loop writes them over those: XLA's CPU
    backend would fill new arrays with zeros long before the loop runs (three of 134 MB for a cloud block).
    """

    def run(looped, chunk, *arrays):
        arrays = tuple(jnp.moveaxis(x, 2, 0) for x in arrays)  # (heads, B, N, D)

        def body(stacks, xs):
            head, others = xs
            mine = (lax.dynamic_index_in_dim(x, head, keepdims=False) for x in stacks)
            results = one_head(*mine, *others, chunk=chunk)
            new = (lax.dynamic_update_index_in_dim(x, r, head, 0) for x, r in zip(stacks, results, strict=False))
            return tuple(new), results[in_place:]

        if looped:
            heads = jnp.arange(arrays[0].shape[0])
            stacks, others = lax.scan(body, arrays[:in_place], (heads, arrays[in_place:]))
            results = (*stacks, *others)
        else:
            results = jax.vmap(functools.partial(one_head, chunk=chunk))(*arrays)
        return tuple(jnp.moveaxis(x, 0, 2) for x in results)

    return lax.platform_dependent(
        *arrays, cpu=functools.partial(run, True, 128), default=functools.partial(run, False, 256)
    )


def _split(x, chunk):
    """(B, N, D) -> (chunks, B, chunk, D), with rows of zeros at the end where chunk does not divide N."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, x.shape[2]), 1, 0)


def _join(x, tokens):
    """(chunks, B, chunk, D) -> (B, tokens, D)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[3])[:, :tokens]


def _head_forward(query, key, value, *, chunk):
    """Output (B, N, D) of one head and the log of its softmax's denominator (B, N, 1)."""
    tokens, wide = query.shape[1], _wide(query.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)

    def rows(query):  # (B, chunk, D)
        scores = dot("bqd,bkd->bqk", query, key) * query.shape[-1] ** -0.5
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = dot("bqk,bkd->bqd", weights.astype(value.dtype), value) / total
        return out.astype(query.dtype), top + jnp.log(total)

    out, lse = lax.map(rows, _split(query, min(chunk, tokens)))
    return _join(out, tokens), _join(lse, tokens)


def _head_backward(query, key, value, lse, dout, delta, *, chunk):
    """Gradients of one head's query, key and value; the weights are computed again chunk by chunk."""
    tokens, wide = query.shape[1], _wide(query.dtype)
    scale = query.shape[-1] ** -0.5
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)

    def rows(sums, chunks):
        dkey, dvalue = sums
        query, lse, dout, delta = chunks  # padded rows are all zero and add nothing, since dout is
        weights = jnp.exp(dot("bqd,bkd->bqk", query, key) * scale - lse)
        dvalue += dot("bqk,bqd->bkd", weights.astype(dout.dtype), dout)
        dscores = weights * (dot("bqd,bkd->bqk", dout, value) - delta) * scale
        dscores = dscores.astype(query.dtype)
        dkey += dot("bqk,bqd->bkd", dscores, query)
        return (dkey, dvalue), dot("bqk,bkd->bqd", dscores, key).astype(query.dtype)

    zeros = jnp.zeros(key.shape, wide)
    chunks = tuple(_split(x, min(chunk, tokens)) for x in (query, lse, dout, delta))
    (dkey, dvalue), dquery = lax.scan(rows, (zeros, zeros), chunks)
    return _join(dquery, tokens), dkey.astype(key.dtype), dvalue.astype(value.dtype)
