"""Times the two operations that have several forms, attention and depthwise convolution, on the device at hand.

    python benchmarks/ops.py                                    # two CPU cores, float32
    python benchmarks/ops.py --batch=64 --dtype=bfloat16        # a GPU; without the plain form where it does not fit

Every form of ours, the one that a model takes marked by a star, and, where it can be imported, torch on the same
device. Milliseconds, the minimum over the repeats; "both" is forward and backward. MB is the temporary memory of the
compiled "both".
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from ktda_jax.models import attention, depthwise

try:
    import torch
except ImportError:
    torch = None

# Tokens, heads, head_dim: FMM's levels for grass, DINOv2 on grass (without the class token), and FMM's first for cloud.
ATTENTION = [(5776, 8, 96), (1444, 8, 96), (361, 8, 96), (361, 12, 64)]
ATTENTION_LONG = [(21904, 8, 96)]
# Side, channels: ConvNeXt-B's four stages at 256 px.
DEPTHWISE = [(64, 128), (32, 256), (16, 512), (8, 1024)]
PLAIN_SCORES_LIMIT = {"cpu": 2e9, "gpu": 1.5e10, "tpu": 2e9}  # bytes; the plain backward holds four arrays of this size


def fastest(function, repeats: int) -> float:
    """Milliseconds of the fastest call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def time_jax(function, arrays, repeats: int) -> tuple[float, float, float]:
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


def time_torch(function, arrays, dtype: str, repeats: int) -> tuple[float, float]:
    """Forward and both passes in ms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    tensors = [torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, dtype)) for x in arrays]
    tensors = [x.requires_grad_() for x in tensors]
    dout = torch.ones_like(function(*tensors))

    def forward():
        with torch.no_grad():
            function(*tensors)
        wait()

    def both():
        function(*tensors).backward(dout)
        wait()

    return fastest(forward, repeats), fastest(both, repeats)


def torch_attention(query, key, value):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first)


def torch_depthwise(x, kernel):
    # Channels-last memory seen as NCHW, which torch's convolution handles natively.
    return torch.nn.functional.conv2d(
        x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1).contiguous(), padding=3, groups=x.shape[-1]
    )


def row(operation: str, shape, form: str, values) -> None:
    cells = " ".join(x if isinstance(x, str) else f"{x:10.3f}" for x in values)
    print(f"{operation:<10} {shape!s:<20} {form:<9} {cells}", flush=True)


def compare(operation, function, forms, peer, arrays, dtype: str, repeats: int, left_out=()) -> None:
    """Prints a row for each form of `function`, and one for torch."""
    for form in (None, *forms):
        if form in left_out:
            continue
        try:
            values = time_jax(functools.partial(function, implementation=form), arrays, repeats)
        except Exception as error:  # not on this device, or not enough memory
            values = [str(error).splitlines()[0][:80]]
        row(operation, arrays[0].shape, form or "*", values)
    if torch is not None:
        row(operation, arrays[0].shape, "torch", time_torch(peer, arrays, dtype, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="also 21,904 tokens: a minute or more on CPU")
    given = parser.parse_args()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), given.dtype)

    print(f"{jax.devices()[0].device_kind}, {given.dtype}, jax {jax.__version__}")
    row("operation", "shape", "form", [f"{name:>10}" for name in ("forward", "both", "MB")])
    for tokens, heads, width in ATTENTION + ATTENTION_LONG * given.long:
        arrays = [normal(given.batch, tokens, heads, width) for _ in range(3)]
        scores = 4 * given.batch * heads * tokens**2
        left_out = {"unrolled", "xla"}  # for exports: another form of plain, and one of the others by N
        if scores > PLAIN_SCORES_LIMIT[jax.default_backend()]:
            left_out.add("plain")
        if jax.default_backend() != "gpu":
            left_out.add("cudnn")
        forms = attention.IMPLEMENTATIONS
        compare("attention", attention.attention, forms, torch_attention, arrays, given.dtype, given.repeats, left_out)
    for side, channels in DEPTHWISE:
        arrays = normal(given.batch, side, side, channels), normal(7, 7, 1, channels)
        forms = depthwise.IMPLEMENTATIONS
        compare("depthwise", depthwise.depthwise_conv, forms, torch_depthwise, arrays, given.dtype, 4 * given.repeats)


if __name__ == "__main__":
    main()
