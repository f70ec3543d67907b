"""Arrays over a mesh, one process or many, and a sum whose order is ours."""

from collections.abc import Callable

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mpqfl_jax.types import PyTree


def put(tree: PyTree, mesh: Mesh, spec: PartitionSpec | None = None) -> PyTree:
  """Places arrays that every process holds onto the devices of a mesh.

  Each process copies the parts of its own devices; nothing crosses the network.

  Args:
    tree: of arrays and keys, the same in every process.
    mesh: the devices.
    spec: how they are split; whole on every device where None.
  """
  sharding = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def place(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = place(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # As device_put does: 64-bit numbers go to the device as 32-bit ones.
    value = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  return jax.tree.map(place, tree)


def ordered_sum(tree: PyTree, axis: str, size: int) -> PyTree:
  """Sum over a mesh axis, in the order of its devices.

  `lax.psum` leaves the order to the transport: inside a process, over gloo or
  over NCCL the same float32 numbers give other last bits. Here device i gets
  the i-th part of every device's numbers, adds them in order, hands the sum to
  all, so that a run's bits depend on the number of devices and not on how
  processes share them. As many bytes cross the network as in a ring.

  Args:
    tree: of float32 arrays, to be called under `shard_map`.
    axis: the mesh axis.
    size: devices on it.
  """
  if size == 1:
    return tree
  flat, unravel = ravel_pytree(tree)
  parts = jnp.pad(flat, (0, -flat.size % size)).reshape(size, -1)
  mine = jnp.sum(lax.all_to_all(parts, axis, 0, 0), axis=0)
  return unravel(lax.all_gather(mine, axis, tiled=True)[: flat.size])


def from_main(tree: PyTree) -> PyTree:
  """Process 0's values of a pytree of arrays, bit for bit, in every process.

  Args:
    tree: of NumPy arrays; other processes give the same structure, shapes and
      dtypes. Every process has to call this at the same place.
  """
  if jax.process_count() == 1:
    return tree
  leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, tree))
  # As bytes: adding zeros to a float would lose the sign of a zero.
  mine = np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8)
  mesh = Mesh(np.array(jax.devices()), ("all",))
  source = min(d.id for d in jax.devices() if d.process_index == 0)
  row = [d.id for d in mesh.devices.flat].index(source)

  def part(index):
    is_source = jax.process_index() == 0 and index[0].start in (row, None)
    return mine[None] if is_source else np.zeros((1, mine.size), np.uint8)

  shared = jax.make_array_from_callback(
    (mesh.size, mine.size), NamedSharding(mesh, PartitionSpec("all")), part
  )
  whole = NamedSharding(mesh, PartitionSpec())
  total: Callable = jax.jit(
    lambda x: jnp.sum(x, 0, dtype=jnp.uint8), out_shardings=whole
  )
  data = np.asarray(total(shared)).tobytes()
  ends = np.cumsum([leaf.nbytes for leaf in leaves])
  found = [
    np.frombuffer(bytearray(data[end - leaf.nbytes : end]), leaf.dtype).reshape(
      leaf.shape
    )
    for leaf, end in zip(leaves, ends, strict=True)
  ]
  return jax.tree.unflatten(treedef, found)
