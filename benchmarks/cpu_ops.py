"""Times the two operations that XLA's CPU backend does slowly: attention and depthwise convolution.

    python benchmarks/cpu_ops.py [--repeats 5] [--long]

Ours against plain XLA and, where it can be imported, torch. Milliseconds, the minimum over the repeats,
float32; "both" is forward and backward. MB is the temporary memory of the compiled "both".
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from ktda_jax.models.attention import attention
from ktda_jax.models.depthwise import depthwise_conv

try:
    import torch
except ImportError:
    torch = None

# (B, N, heads, head_dim): FMM's four levels for grass and DINOv2 on grass (without the class token).
ATTENTION = [(1, 5776, 8, 96), (2, 5776, 8, 96), (2, 1444, 8, 96), (2, 361, 8, 96), (2, 361, 12, 64)]
ATTENTION_LONG = [(1, 21904, 8, 96)]  # cloud
# (B, H, W, C): ConvNeXt-B's four stages at 256 px.
DEPTHWISE = [(b, s, s, c) for b in (1, 2) for s, c in ((64, 128), (32, 256), (16, 512), (8, 1024))]
PLAIN_SCORES_LIMIT = 2e9  # bytes; the plain form's backward holds four arrays of this size


def fastest(function, repeats):
    """Milliseconds of the fastest call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def time_jax(function, arrays, repeats):
    """Forward and both passes in ms, temporary MB of both."""

    def both(dout, *args):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(dout)

    forward = jax.jit(function).lower(*arrays).compile()
    dout = jnp.ones_like(forward(*arrays))
    both = jax.jit(both).lower(dout, *arrays).compile()
    return (
        fastest(lambda: jax.block_until_ready(forward(*arrays)), repeats),
        fastest(lambda: jax.block_until_ready(both(dout, *arrays)), repeats),
        both.memory_analysis().temp_size_in_bytes / 1e6,
    )


def time_torch(function, arrays, repeats):
    """Forward and both passes in ms."""
    tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in arrays]
    dout = torch.ones_like(function(*tensors))

    def forward():
        with torch.no_grad():
            function(*tensors)

    def both():
        function(*tensors).backward(dout)

    return fastest(forward, repeats), fastest(both, repeats)


def torch_attention(query, key, value):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first)


def torch_depthwise(x, kernel):
    # Channels-last memory seen as NCHW, which torch's convolution handles natively.
    return torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1).contiguous(), padding=3, groups=x.shape[-1]
    )


def row(name, shape, ours, plain, peer):
    """Numbers, or headings, in columns; a missing measurement is None."""

    def cells(values, count):
        return " ".join(x if isinstance(x, str) else f"{x:8.2f}" for x in values or ["       -"] * count)

    columns = cells(ours, 3), cells(plain, 3), cells(peer, 2)
    print(f"{name:<10} {shape!s:<18} | " + " | ".join(columns), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also 21,904 tokens: a minute or more")
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    row(
        "operation",
        "shape",
        ["    ours", "    both", "      MB"],
        ["     XLA", "    both", "      MB"],
        ["   torch", "    both"],
    )
    for shape in ATTENTION + ATTENTION_LONG * args.long:
        arrays = [normal(*shape) for _ in range(3)]
        batch, tokens, heads, _ = shape
        fits = 4 * batch * heads * tokens**2 < PLAIN_SCORES_LIMIT
        ours = time_jax(attention, arrays, args.repeats)
        plain = fits and time_jax(lambda *x: attention(*x, implementation="plain"), arrays, args.repeats)
        row("attention", shape, ours, plain, torch and time_torch(torch_attention, arrays, args.repeats))
    for shape in DEPTHWISE:
        arrays = normal(*shape), normal(7, 7, 1, shape[-1])
        ours = time_jax(depthwise_conv, arrays, 4 * args.repeats)
        plain = time_jax(lambda *x: depthwise_conv(*x, implementation="conv"), arrays, args.repeats)
        row("depthwise", shape, ours, plain, torch and time_torch(torch_depthwise, arrays, 4 * args.repeats))


if __name__ == "__main__":
    main()
