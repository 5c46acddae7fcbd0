"""Self-attention over long token sequences in memory that grows with N, not with N squared."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = ('plain', 'chunked', 'cudnn')


def attention(query, key, value, *, implementation=None):
    """softmax(query key^T / sqrt(head_dim)) value; all (B, N, heads, head_dim), any floating dtype."""
    if implementation is None:
        implementation = _choose(query)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention implementation {implementation!r} is none of {IMPLEMENTATIONS}')
    if implementation == 'cudnn' and query.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(query, key, value, implementation='cudnn')
    if implementation == 'plain':
        return _plain(query, key, value)
    return _chunked(query, key, value)


def _choose(query):
    batch, tokens, heads, head_dim = query.shape
    if jax.default_backend() == 'gpu' and query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0:
        return 'cudnn'
    return 'plain' if tokens <= 1024 else 'chunked'


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _plain(query, key, value):
    dtype = _accumulator(query.dtype)
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=dtype) * scale
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value, preferred_element_type=dtype).astype(query.dtype)


def _chunked(query, key, value):
    chunk = 128
    tokens = query.shape[1]
    pad = -tokens % chunk
    query = jnp.pad(query, ((0, 0), (0, pad), (0, 0), (0, 0)))
    # heads lead: (heads, B, N, head_dim)
    query, key, value = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    out = lax.map(lambda qkv: _one_head(chunk, *qkv), (query, key, value))
    return jnp.moveaxis(out, 0, 2)[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_head(chunk, query, key, value):
    return _one_head_fwd(chunk, query, key, value)[0]


def _split(x, chunk):
    """(B, N, D) -> (N / chunk, B, chunk, D)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _one_head_fwd(chunk, query, key, value):
    dtype = _accumulator(query.dtype)
    scale = query.shape[-1] ** -0.5

    def rows(q):
        scores = jnp.einsum('bqd,bkd->bqk', q, key, preferred_element_type=dtype) * scale
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum('bqk,bkd->bqd', weights.astype(value.dtype), value, preferred_element_type=dtype)
        return (out / total).astype(query.dtype), (top + jnp.log(total))[..., 0]

    out, lse = lax.map(rows, _split(query, chunk))
    out, lse = _join(out), _join(lse)
    return out, (query, key, value, out, lse)


def _one_head_bwd(chunk, residuals, dout):
    query, key, value, out, lse = residuals
    dtype = _accumulator(query.dtype)
    scale = query.shape[-1] ** -0.5
    delta = (dout.astype(dtype) * out.astype(dtype)).sum(-1)

    def rows(carry, x):
        dkey, dvalue = carry
        q, do, lse, delta = x
        scores = jnp.einsum('bqd,bkd->bqk', q, key, preferred_element_type=dtype) * scale
        weights = jnp.exp(scores - lse[..., None])
        dvalue += jnp.einsum('bqk,bqd->bkd', weights.astype(do.dtype), do, preferred_element_type=dtype)
        dweights = jnp.einsum('bqd,bkd->bqk', do, value, preferred_element_type=dtype)
        dscores = (weights * (dweights - delta[..., None]) * scale).astype(q.dtype)
        dkey += jnp.einsum('bqk,bqd->bkd', dscores, q, preferred_element_type=dtype)
        dq = jnp.einsum('bqk,bkd->bqd', dscores, key, preferred_element_type=dtype)
        return (dkey, dvalue), dq.astype(q.dtype)

    zeros = jnp.zeros(key.shape, dtype)
    (dkey, dvalue), dquery = lax.scan(
        rows, (zeros, zeros), tuple(_split(x, chunk) for x in (query, dout, lse, delta)))
    return _join(dquery), dkey.astype(key.dtype), dvalue.astype(value.dtype)


_one_head.defvjp(_one_head_fwd, _one_head_bwd)
