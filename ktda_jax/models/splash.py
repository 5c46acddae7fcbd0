"""JAX's splash attention for TPUs: neither forward nor backward do the scores leave the chip.

A Mosaic kernel cannot be partitioned by the compiler, so it runs under `shard_map` on the mesh that the caller has set
(`jax.sharding.use_abstract_mesh`), every axis of which splits the batch. Tokens are padded to whole blocks. The padding
is kept out by one more channel, in which all queries are 1 and its keys far below 0: channels are padded to 128 lanes
anyway, and segment ids, the kernel's own way, are read once more for every head.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

LANES = 128  # what blocks are multiples of
LEAST = 256  # tokens from which it touches fewer bytes than the plain form: half at 361, the same at 81
BLOCK = 1024  # queries and keys at most whose scores are held at a time
BACKWARD = 512  # the same of the backward pass, which holds four such squares; more does not fit into a v5e's 16 MB
KEYS = (2048, 1536)  # of the backward pass for long sequences: it keeps a partial gradient of all queries for each
OUT = -30_000.0  # a score whose exponential is 0


def fits(query: jax.Array) -> bool:
    """Whether (B, N, heads, D) is bfloat16, long enough, and on a mesh of TPUs that divides B.

    Of the published teachers the largest, whose heads fill the 128 lanes, is left out.
    """
    mesh, (batch, tokens, _, head_dim) = jax.sharding.get_abstract_mesh(), query.shape
    device = mesh.abstract_device  # None of a mesh that names none
    if mesh.empty or device is None or device.platform != "tpu" or batch % mesh.size:
        return False
    return query.dtype == jnp.bfloat16 and tokens >= LEAST and head_dim % LANES != 0


def splash(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """softmax(query key^T / sqrt(D)) value on the mesh that is set, or without one; all (B, N, heads, D)."""
    tokens, heads, head_dim = query.shape[1:]
    padded, sizes = blocks(tokens)
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((padded, padded))] * heads)
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    last = jnp.arange(head_dim + 1) == head_dim
    beyond = jnp.arange(padded)[:, None] >= tokens

    def whole(x, channels):  # (B, N, heads, D) -> (B, heads, padded, D + channels)
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, channels))), 2, 1)

    def local(query, key, value):
        query = whole(query * head_dim**-0.5, 1) + last.astype(query.dtype)
        key = whole(key, 1) + jnp.where(last & beyond, OUT, 0).astype(key.dtype)
        value = whole(value, 0)
        out = jax.vmap(kernel)(query, key, value)
        return jnp.moveaxis(out, 1, 2)[:, :tokens]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(query, key, value)
    rows = PartitionSpec(mesh.axis_names)
    # The kernel does not say over which axes its results vary, so that this cannot be checked.
    return jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)(query, key, value)


def blocks(tokens: int) -> tuple[int, splash_attention.BlockSizes]:
    """The padded number of tokens, and blocks that divide it."""
    if tokens <= max(KEYS):
        step = LANES if tokens <= BACKWARD else 2 * LANES
        padded = keys = -(-tokens // step) * step
    else:
        padded, least = min((-(-tokens // keys) * keys, -keys) for keys in KEYS)
        keys = -least
    forward, backward = (
        max(block for block in range(LANES, most + 1, LANES) if padded % block == 0) for most in (BLOCK, BACKWARD)
    )
    return padded, splash_attention.BlockSizes(
        block_q=forward, block_kv=forward, block_kv_compute=forward,
        block_q_dkv=backward, block_kv_dkv=keys, block_kv_dkv_compute=backward, use_fused_bwd_kernel=True,
    )  # fmt: skip
