# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What mesh is in force, and how arrays lie on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
from jax.sharding import AxisType

from jaxroute import checks, types


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


def map_shards(
  function: Callable[..., types.PyTree],
  operands: Sequence[types.PyTree],
  *,
  mesh: jax.sharding.AbstractMesh,
  in_specs: Sequence[types.PyTree],
  out_specs: types.PyTree,
  check_vma: bool = True,
) -> types.PyTree:
  """`jax.shard_map` of operands that lie anyhow.

  Where axes are explicit, `jax.shard_map` refuses what does not lie as its
  specifications say; here it is brought there first.

  Args:
    function: of the operands' shards.
    operands: pytrees of arrays.
    mesh: all of its axes become manual.
    in_specs: for each operand, its specification or a tree of them.
    out_specs: the same of the outputs.
    check_vma: as in `jax.shard_map`.

  Returns:
    What `function` returns, as `out_specs` say.
  """
  if AxisType.Explicit in mesh.axis_types:
    shardings = jax.tree.map(lambda spec: _explicit_part(mesh, spec), in_specs)
    operands = jax.sharding.reshard(tuple(operands), tuple(shardings))
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=tuple(in_specs),
    out_specs=out_specs,
    check_vma=check_vma,
  )(*operands)


def map_over_tokens(
  function: Callable[..., types.PyTree],
  operands: Sequence[Any],
  *,
  are_per_token: Sequence[bool],
  outputs_per_token: types.PyTree,
  partition: types.Partition | None = None,
  check_vma: bool = True,
) -> types.PyTree:
  """Calls a function shard by shard, where it is known how tokens are sharded.

  Args:
    function: of the operands.
    operands: arrays or None, the first `[T, D]`.
    are_per_token: for each, whether it is `[T, ...]`, or whole on every device.
    outputs_per_token: the same of the outputs, a tree of bools in their
      structure. Outputs that are whole are summed over the shards, in one
      all-reduce.
    partition: whose `token_axes` the tokens are sharded over; None for the
      axes that the first operand is sharded over explicitly, if there are any.
    check_vma: as in `jax.shard_map`.

  Returns:
    What `function` returns, of all tokens.

  Raises:
    ValueError: if the mesh in force does not fit `partition`.
  """
  tokens = operands[0]
  assert tokens is not None  # the others may be
  partition = partition_of(tokens, partition)
  if partition is None:
    return function(*operands)
  axes = partition.token_axes

  def spec(is_per_token: bool) -> jax.P:
    return jax.P(axes) if is_per_token and axes else jax.P()

  def call_shard(*operands):
    outputs = function(*operands)
    if not axes:
      return outputs
    whole = jax.tree.map(
      lambda is_per_token, x: None if is_per_token else x,
      outputs_per_token,
      outputs,
    )
    return jax.tree.map(
      lambda is_per_token, x, total: x if is_per_token else total,
      outputs_per_token,
      outputs,
      sum_together(whole, axes),
    )

  return map_shards(
    call_shard,
    operands,
    mesh=mesh_of(partition, tokens),
    in_specs=[spec(x) for x in are_per_token],
    out_specs=jax.tree.map(spec, outputs_per_token),
    check_vma=check_vma,
  )


def sum_together(tree: types.PyTree, axis_name: str | Sequence[str]) -> Any:
  """Sums arrays over mesh axes that are manual, all in one all-reduce.

  Args:
    tree: pytree of arrays of one dtype.
    axis_name: the axes.

  Returns:
    The sums, in the structure of `tree`.
  """
  flat, unravel = jax.flatten_util.ravel_pytree(tree)
  return unravel(jax.lax.psum(flat, axis_name))


def reshape(
  x: jax.Array, shape: Sequence[int], axes: Sequence[Any]
) -> jax.Array:
  """`x.reshape(shape)`, sharded so where axes are explicit, however `x` lies.

  Args:
    x: an array.
    shape: of the same size.
    axes: for each dimension, the mesh axes that it is sharded over. What is
      not explicit among them is left to the compiler.

  Returns:
    An array of this shape.
  """
  mesh = mesh_in_force(x)
  if AxisType.Explicit not in mesh.axis_types:
    return x.reshape(shape)
  sharding = _explicit_part(mesh, jax.P(*axes))
  return jax.numpy.reshape(x, shape, out_sharding=sharding)


def whole(x: jax.Array, first_dimension: int = 0) -> jax.Array:
  """An array that no explicit axis shards, from a dimension on.

  Args:
    x: an array.
    first_dimension: the first that every device needs whole.

  Returns:
    The same values.
  """
  sharding = jax.typeof(x).sharding
  spec = sharding.spec[:first_dimension]
  if all(axes is None for axes in sharding.spec[first_dimension:]):
    return x
  return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))


def replicated_like(x: jax.Array) -> Any:
  """The sharding of a vector that every device has whole, on the mesh of an array.

  Args:
    x: an array.

  Returns:
    What `out_sharding` takes; None where there is no mesh.
  """
  mesh = jax.typeof(x).sharding.mesh
  return None if mesh.empty else jax.NamedSharding(mesh, jax.P(None))


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
  allowed = {AxisType.Manual}
  if over_shards:
    allowed.add(AxisType.Explicit)
  others = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind not in allowed and mesh.shape[name] > 1
  ]
  if not others:
    return None
  return (
    f"XLA does not partition a kernel over the mesh axes {others}; give the layer a"
    " `partition`, or call it inside `jax.shard_map` over them"
    + (", or make them explicit" if over_shards else "")
  )


def mesh_in_force(x: jax.Array) -> jax.sharding.AbstractMesh:
  """The mesh of `jax.set_mesh`, or else the one an array is typed with.

  Args:
    x: an array.

  Returns:
    An abstract mesh, empty if there is none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return jax.typeof(x).sharding.mesh if mesh.empty else mesh


def partition_of(
  x: jax.Array,
  partition: types.Partition | None,
  num_experts: int | None = None,
) -> types.Partition | None:
  """The partition that a layer works by.

  Args:
    x: `[..., D]`. The leading axes are those of the tokens.
    partition: what the caller says, or None.
    num_experts: E, if it has to divide.

  Returns:
    `partition`; or, where it is None and axes are explicit, one that says how
    the leading dimensions of `x` are sharded; or else None.

  Raises:
    ValueError: if the mesh in force does not fit `partition`, or T or E does
      not divide.
  """
  if partition is None:
    if AxisType.Explicit not in mesh_in_force(x).axis_types:
      return None
    names = []
    for axes in jax.typeof(x).sharding.spec[:-1]:
      names += _names(axes)
    return types.Partition(token_axes=tuple(names))
  fix = "None is for one device."
  checks.check_instance("partition", partition, types.Partition, fix)
  mesh = mesh_of(partition, x)
  num_tokens = math.prod(x.shape[:-1])
  check_divides("tokens", num_tokens, mesh, partition.token_axes)
  if num_experts is not None and partition.expert_axis is not None:
    check_divides("experts", num_experts, mesh, (partition.expert_axis,))
  return partition


def mesh_of(
  partition: types.Partition, x: jax.Array | None = None
) -> jax.sharding.AbstractMesh:
  """The mesh in force.

  Args:
    partition: what has to lie on it.
    x: an array, whose mesh is taken if there is no other.

  Returns:
    The abstract mesh.

  Raises:
    ValueError: if there is none, it lacks an axis of `partition`, or the call is
      inside a `jax.shard_map` over one.
  """
  mesh = jax.sharding.get_abstract_mesh() if x is None else mesh_in_force(x)
  check_mesh(partition, mesh)
  return mesh


def check_mesh(
  partition: types.Partition, mesh: jax.sharding.AbstractMesh
) -> None:
  """Raises ValueError unless a mesh has all axes of a partition, none of them mapped.

  Args:
    partition: what has to lie on it.
    mesh: empty if none is in force.
  """
  others = partition.expert_axis, partition.fsdp_axis, partition.tensor_axis
  wanted = {*partition.token_axes, *filter(None, others)}
  names = f"`partition` names the mesh axes {sorted(wanted)}"
  if mesh.empty and wanted:
    raise ValueError(
      f"{names}, got no mesh in force. Put the call under `jax.set_mesh(mesh)`, or"
      " leave `partition` out (None) on one device."
    )
  if not wanted <= set(mesh.axis_names):
    raise ValueError(
      f"{names}, got a mesh with {mesh.axis_names}. Name its axes, or put the call"
      " under `jax.set_mesh` of a mesh that has them."
    )
  if mapped := sorted(wanted & set(mesh.manual_axes)):
    raise ValueError(
      f"{names}, got a call inside a `jax.shard_map` over {mapped}, where the"
      " arrays are those of one device. Leave `partition` out (None) there, and"
      f" sum the counts by `jaxroute.update(..., axis_name={tuple(mapped)})`."
    )


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


def token_shards(
  partition: types.Partition | None, x: jax.Array | None = None
) -> int:
  """Number of shards that the tokens of one dispatch come from.

  Args:
    partition: layout on the mesh in force, or None.
    x: as in `mesh_of`.

  Returns:
    How many dispatches share the tokens: 1 without a partition.
  """
  if partition is None:
    return 1
  mesh = mesh_of(partition, x)
  return math.prod(
    mesh.shape[a] for a in partition.token_axes if a != partition.expert_axis
  )


def _explicit_part(
  mesh: jax.sharding.AbstractMesh, spec: jax.P
) -> jax.NamedSharding:
  """A sharding over those axes of a specification that are explicit."""

  def keep(axes: Any) -> tuple[str, ...] | None:
    return tuple(a for a in _names(axes) if a in mesh.explicit_axes) or None

  return jax.NamedSharding(mesh, jax.P(*map(keep, spec)))


def _names(axes: Any) -> tuple[str, ...]:
  """The mesh axes of one entry of a specification."""
  return (axes,) if isinstance(axes, str) else axes or ()
