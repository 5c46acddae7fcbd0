"""The `(data, fsdp)` mesh, and shardings by rule. Both axes split the batch; `fsdp` also splits the parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ktda_jax import UserError

BATCH = ("data", "fsdp")
MIN_SIZE = 2**13  # smaller arrays stay whole: gathering them would cost more than they save


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices of all processes, or over `devices`; -1 takes what is left.

    One process may use fewer devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, given = len(devices), f"data={data}, fsdp={fsdp}"
    if fsdp == -1:
        fsdp = count // max(data, 1)
    if data == -1:
        data = count // max(fsdp, 1)
    used = data * fsdp
    if data < 1 or fsdp < 1 or used > count or (used < count and jax.process_count() > 1):
        raise UserError(f"config.mesh ({given}) does not fit {count} devices")
    # Auto axes: under Explicit ones a sharded convolution kernel is an error.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[:used])


def spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Splits the largest dimension that `fsdp` divides (the last of equals); small arrays are replicated."""
    if fsdp > 1 and np.prod(shape, dtype=np.int64) >= MIN_SIZE:
        for axis in sorted(range(len(shape)), key=lambda k: (shape[k], k), reverse=True):
            if shape[axis] % fsdp == 0:
                return P(*([None] * axis), "fsdp")
    return P()


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a tree of arrays or ShapeDtypeStructs; Adam's moments get those of their parameters."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape, mesh.shape["fsdp"])), tree)


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that say where the arrays of a tree lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function` traced with the mesh set, by which a model finds what it may not leave to the compiler to split."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P(BATCH))


def check_batch_size(mesh: Mesh, batch_size: int, name: str, accumulate: int = 1) -> None:
    """UserError unless every device gets whole rows of every micro-batch."""
    rows = mesh.size * accumulate
    if batch_size < 1 or batch_size % rows:
        micro = f" x {accumulate} accumulation steps" if accumulate > 1 else ""
        raise UserError(
            f"{name} is {batch_size}, which {mesh.size} devices{micro} do not divide; "
            f"use a multiple of {rows}, or fewer devices through config.mesh.data"
        )


def to_global(mesh: Mesh, batch: Any) -> Any:
    """A tree of this process's rows -> arrays over all devices of all processes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process fed in."""
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    return np.concatenate([np.asarray(s.data) for s in shards])


def on_each(tree: Any, mesh: Mesh, local: Mesh) -> Any:
    """Arrays on the `mesh` of all processes -> whole ones on every device of this process's own mesh, `local`."""
    whole, target = replicated(mesh), replicated(local)
    if jax.process_count() == 1:
        return jax.device_put(tree, target)
    if any(not x.sharding.is_equivalent_to(whole, x.ndim) for x in jax.tree.leaves(tree)):
        tree = _gathering(mesh)(tree)  # all processes call this
    shards = jax.tree.map(lambda x: [s.data for s in x.addressable_shards], tree)
    return jax.tree.map(lambda x, held: jax.make_array_from_single_device_arrays(x.shape, target, held), tree, shards)


@functools.cache  # a function anew would be compiled anew, at every evaluation
def _gathering(mesh: Mesh) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def sum_of_processes(array: np.ndarray) -> np.ndarray:
    """The sum over all processes, which all call this, of arrays of one shape and type."""
    if jax.process_count() == 1:
        return array
    rows = multihost_utils.process_allgather(np.ascontiguousarray(array).view(np.uint8).ravel())
    return rows.view(array.dtype).reshape(-1, *array.shape).sum(0)  # as bytes, since JAX makes 32 bits of 64


def any_process(condition: bool) -> bool:
    """Whether it holds in one of the processes, which all call this."""
    return bool(sum_of_processes(np.array([condition], np.int64))[0])


def rows_of_processes(array: np.ndarray) -> np.ndarray:
    """The rows of all processes, which all call this, one after the other: arrays that differ in their length alone."""
    if jax.process_count() == 1:
        return array
    lengths = multihost_utils.process_allgather(np.int32(len(array))).tolist()
    padded = np.zeros((max(lengths), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    gathered = multihost_utils.process_allgather(padded.view(np.uint8).ravel())
    rows = gathered.view(array.dtype).reshape(-1, *padded.shape)
    return np.concatenate([part[:length] for part, length in zip(rows, lengths, strict=True)])


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in every process, onto the mesh."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index, x=x: np.asarray(x)[index]),
        tree,
        shardings,
    )
