# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What mesh is in force, and how arrays lie on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxroute import types


def vary_alike(tree: types.PyTree) -> types.PyTree:
  """Marks arrays as varying over every mesh axis that one of them varies over.

  Inside `jax.shard_map`, a function with a derivative of its own needs all
  arguments to vary over the same axes. The transpose of the mark sums their
  gradients.

  Args:
    tree: pytree of arrays.

  Returns:
    The same values; unchanged outside `jax.shard_map`.
  """

  def varying(x: jax.Array) -> Any:
    return jax.typeof(x).manual_axis_type.varying

  axes = set().union(*map(varying, jax.tree.leaves(tree)))

  def mark(x: jax.Array) -> jax.Array:
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, tree)


def map_over_tokens(
  function: Callable[..., types.PyTree],
  operands: Sequence[jax.Array | None],
  *,
  are_per_token: Sequence[bool],
  outputs_per_token: types.PyTree,
  check_vma: bool = True,
) -> types.PyTree:
  """Calls a function shard by shard where the tokens are sharded explicitly.

  Args:
    function: of the operands.
    operands: arrays, the first `[T, ...]`.
    are_per_token: for each, whether it is `[T, ...]`, or whole on every device.
    outputs_per_token: the same of the outputs, a tree of bools in their
      structure. An output that is whole is summed over the shards.
    check_vma: as in `jax.shard_map`.

  Returns:
    What `function` returns, of all tokens.
  """
  sharding = jax.typeof(operands[0]).sharding
  if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
    return function(*operands)
  axes = sharding.spec[0]

  def spec(is_per_token: bool) -> jax.P:
    return jax.P(axes) if is_per_token else jax.P()

  def call_shard(*operands):
    outputs = function(*operands)
    if axes is None:
      return outputs
    # One sum for all of them.
    whole = jax.tree.map(
      lambda is_per_token, x: None if is_per_token else x,
      outputs_per_token,
      outputs,
    )
    return jax.tree.map(
      lambda is_per_token, x, total: x if is_per_token else total,
      outputs_per_token,
      outputs,
      jax.lax.psum(whole, axes),
    )

  return jax.shard_map(
    call_shard,
    mesh=sharding.mesh,
    in_specs=tuple(map(spec, are_per_token)),
    out_specs=jax.tree.map(spec, outputs_per_token),
    check_vma=check_vma,
  )(*operands)


def replicated_like(x: jax.Array) -> Any:
  """The sharding of a vector that every device has whole, on the mesh of an array.

  Args:
    x: an array.

  Returns:
    What `out_sharding` takes; None where there is no mesh.
  """
  mesh = jax.typeof(x).sharding.mesh
  return None if mesh.empty else jax.NamedSharding(mesh, jax.P(None))


def explicit_axes(x: jax.Array, first_dimension: int = 0) -> tuple[Any, ...]:
  """The mesh axes that an array is sharded over explicitly.

  Args:
    x: an array.
    first_dimension: the first of its dimensions to look at.

  Returns:
    One entry of its specification for each dimension that is sharded.
  """
  spec = jax.typeof(x).sharding.spec[first_dimension:]
  return tuple(axes for axes in spec if axes is not None)


def kernel_refusal(by_name: bool, over_shards: bool = False) -> str | None:
  """Why a kernel may not run under the mesh in force, or None if it may.

  XLA does not partition a kernel: every axis of the mesh has to be manual, as
  inside `jax.shard_map`, or of size 1.

  Args:
    by_name: whether the user asked for the kernel, and so vouches that its
      operands are on one device where no mesh is in force.
    over_shards: whether the caller maps the kernel over axes of explicit
      sharding.

  Returns:
    The reason, for an error message.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    if by_name or jax.device_count() == 1:
      return None
    return (
      f"no mesh is in force and there are {jax.device_count()} devices, over which"
      " its operands may be sharded; call it under `jax.set_mesh`"
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
    + (", or make them explicit" if over_shards else "")
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
