import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ktda_jax.models.depthwise import depthwise_conv


def inputs(shape, size=(7, 7), dtype=np.float32):
    """Image, kernel and the gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = shape, (*size, 1, shape[-1]), shape
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def value_and_grads(implementation, x, kernel, dy):
    """Output and the gradients of image and kernel."""

    def function(x, kernel):
        return depthwise_conv(x, kernel, implementation=implementation)

    y, pullback = jax.vjp(function, x, kernel)
    return (y, *pullback(dy))


def relative_error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def torch_value_and_grads(x, kernel, dy):
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1).requires_grad_()
    padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    y = torch.nn.functional.conv2d(x, kernel, padding=padding, groups=x.shape[1])
    y.backward(torch.tensor(np.asarray(dy)).permute(0, 3, 1, 2))
    to_nhwc, to_hwio = (0, 2, 3, 1), (2, 3, 1, 0)
    return [a.detach().permute(*axes).numpy() for a, axes in ((y, to_nhwc), (x.grad, to_nhwc), (kernel.grad, to_hwio))]


# Widths around the tile of 8 columns, images smaller than the kernel, other odd kernels.
CASES = [
    ((2, 9, 13, 6), (7, 7)),
    ((1, 8, 8, 5), (7, 7)),
    ((2, 2, 1, 3), (7, 7)),
    ((1, 5, 17, 4), (3, 5)),
    ((1, 6, 4, 2), (1, 1)),
    ((3, 4, 16, 8), (5, 3)),
]


@pytest.mark.parametrize("shape, size", CASES)
@pytest.mark.parametrize("implementation", ["conv", "shifts", None])
def test_equals_torch_in_float64(shape, size, implementation):
    with jax.enable_x64(True):
        arrays = inputs(shape, size, np.float64)
        ours = jax.jit(value_and_grads, static_argnums=0)(implementation, *arrays)
        for a, b in zip(ours, torch_value_and_grads(*arrays), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_precision_of_narrow_types(dtype, tolerance):
    arrays = inputs((2, 16, 16, 32))
    narrow = jax.jit(value_and_grads, static_argnums=0)("shifts", *(x.astype(dtype) for x in arrays))
    with jax.enable_x64(True):
        reference = value_and_grads("conv", *(jnp.asarray(x.astype(dtype), jnp.float64) for x in arrays))
    for a, b in zip(narrow, reference, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < tolerance


def test_kernel_of_another_dtype_keeps_its_gradient_dtype():
    x, kernel, dy = inputs((1, 8, 8, 4))
    for implementation in ("conv", "shifts"):
        y, dx, dkernel = value_and_grads(implementation, x.astype("bfloat16"), kernel, dy.astype("bfloat16"))
        assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", ["shifts", None])
def test_batch_stays_sharded(implementation):
    devices = jax.devices("cpu")
    assert len(devices) == 8, "conftest.py sets 8 CPU devices"
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, kernel, dy = inputs((8, 10, 12, 16))
    expected = value_and_grads(implementation, x, kernel, dy)
    sharded = (
        jax.device_put(x, batch),
        jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(dy, batch),
    )
    step = jax.jit(value_and_grads, static_argnums=0)
    text = step.lower(implementation, *sharded).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    assert "all-reduce" in text  # of the kernel's gradient
    for a, b in zip(step(implementation, *sharded), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_platform_is_that_of_the_lowering():
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 16, 8), (7, 7, 1, 8)))
    traced = jax.jit(depthwise_conv).trace(x, kernel)
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    "size, implementation, message", [((7, 7), "fft", "'fft' is none of"), ((4, 7), None, "odd kernel sizes")]
)
def test_rejects_bad_arguments(size, implementation, message):
    x, kernel, _ = inputs((1, 8, 8, 4), size)
    with pytest.raises(ValueError, match=message):
        depthwise_conv(x, kernel, implementation=implementation)
