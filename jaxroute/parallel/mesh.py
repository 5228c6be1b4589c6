# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What mesh is in force: no other file asks, or marks what varies over it."""

import math
from collections.abc import Sequence

import jax

from jaxroute import types


def vary_alike(tree: types.PyTree) -> types.PyTree:
  """Marks arrays as varying over every mesh axis that one of them varies over.

  Inside `jax.shard_map`, functions with a derivative of their own get and return
  arrays of one varying type; the sums over the mesh are left to the transpose of
  the mark.

  Args:
    tree: pytree of arrays.

  Returns:
    The same values; unchanged outside `jax.shard_map`.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = set().union(*map(varying, jax.tree.leaves(tree)))

  def mark(x):
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, tree)


def kernel_refusal(by_name: bool, over_shards: bool = False) -> str | None:
  """Why a kernel may not run under the mesh in force, or None if it may.

  XLA does not partition a kernel: every axis of the mesh has to be manual, as inside
  `jax.shard_map`, or of size 1.

  Args:
    by_name: whether the user asked for the kernel, and so vouches that its operands
      are on one device where no mesh is in force.
    over_shards: whether the caller maps the kernel over axes of explicit sharding.

  Returns:
    The reason, for an error message.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    if by_name or jax.device_count() == 1:
      return None
    return (
      f"no mesh is in force and there are {jax.device_count()} devices, over which"
      " its operands may be sharded"
    )
  allowed = {jax.sharding.AxisType.Manual}
  if over_shards:
    allowed.add(jax.sharding.AxisType.Explicit)
  others = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind not in allowed and mesh.shape[name] > 1
  ]
  if not others:
    return None
  return (
    f"XLA does not partition a kernel over the mesh axes {others}; call it inside"
    " `jax.shard_map` over them"
  )


def mesh_of(partition: types.Partition) -> jax.sharding.AbstractMesh:
  """The mesh in force.

  Args:
    partition: what has to lie on it.

  Returns:
    The abstract mesh of `jax.set_mesh`.

  Raises:
    ValueError: if it lacks an axis of `partition`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  wanted = set(partition.token_axes)
  if partition.expert_axis is not None:
    wanted.add(partition.expert_axis)
  if not wanted <= set(mesh.axis_names):
    raise ValueError(
      f"`partition` names the mesh axes {sorted(wanted)}, got a mesh with"
      f" {mesh.axis_names}. Put the call under `jax.set_mesh(mesh)`."
    )
  return mesh


def check_divides(
  what: str, size: int, mesh: jax.sharding.AbstractMesh, axes: Sequence[str]
) -> None:
  """Raises ValueError unless a number of things is cut evenly over mesh axes.

  Args:
    what: their name, for the message.
    size: how many there are.
    mesh: that holds the axes.
    axes: their names.
  """
  shards = math.prod(mesh.shape[a] for a in axes)
  if size % shards:
    raise ValueError(
      f"`partition` shards {size} {what} over the mesh axes {tuple(axes)}, {shards}"
      " devices, which does not divide. Pad, or choose other axes."
    )


def token_shards(partition: types.Partition | None) -> int:
  """Number of shards that the tokens of one dispatch come from.

  Args:
    partition: layout on the mesh in force, or None.

  Returns:
    How many dispatches share the tokens: 1 without a partition.
  """
  if partition is None:
    return 1
  mesh = mesh_of(partition)
  return math.prod(
    mesh.shape[a] for a in partition.token_axes if a != partition.expert_axis
  )
