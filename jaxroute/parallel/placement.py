# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where parameters and states lie at rest.

| array | logical axes | sharded over |
| --- | --- | --- |
| `w_gate`, `w_up` | expert, embed, mlp | `expert_axis`, `fsdp_axis`, `tensor_axis` |
| `w_down` | expert, mlp, embed | the same |
| other parameters | any | `fsdp_axis` |
| a router's bias, counts, rule | | nothing |

`expert_axis` shards "expert", `tensor_axis` "mlp", and `fsdp_axis` the largest of
the others that it divides.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from jaxroute import checks, types
from jaxroute.parallel import mesh as mesh_lib

LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
  "kernel": ("embed", None),
  "w_gate": ("expert", "embed", "mlp"),
  "w_up": ("expert", "embed", "mlp"),
  "w_down": ("expert", "mlp", "embed"),
  "shared_gate": ("embed", "mlp"),
  "shared_up": ("embed", "mlp"),
  "shared_down": ("mlp", "embed"),
}
"""The names of axes, for Flax's rules, by the names of a layer's parameters."""

# A router's variables, which every device needs whole.
_WHOLE = {"expert_bias", "load", "histogram"}

Path = tuple[str, ...]


def shardings(
  tree: types.PyTree, partition: types.Partition, mesh: jax.sharding.Mesh
) -> types.PyTree:
  """How parameters and states lie on a mesh, for `jax.device_put` and `jax.jit`.

  The experts' parameters, `[..., E, D, F]`, are sharded over
  `partition.expert_axis` on E, or `tensor_axis` on F. They are those with a
  logical axis "expert", and those named "w_gate", "w_up" and "w_down" in a layer
  of `jaxroute.linen` or `jaxroute.nnx` or an `ExpertParams`. What comes before E
  is a scan over layers.

  `fsdp_axis` shards all parameters, on the largest other dimension that it
  divides, and of equals on the last. Vectors stay whole, and so does what it
  divides nowhere. A router is replicated but for its projection.

  Of what is in an "opt_state", an array that is named and shaped like a parameter
  lies as that does, and any other is replicated.

  Args:
    tree: parameters of a layer or a model, variables of Flax linen, a
      `RouterState`, a `TrainState`, an `nnx.State`, or a tree of these; of arrays
      or `jax.ShapeDtypeStruct`s.
    partition: how tokens and parameters lie.
    mesh: that has its axes.

  Returns:
    `jax.NamedSharding`s, in the structure of `tree`.

  Raises:
    ValueError: if `partition` or `mesh` is of the wrong type, the mesh lacks an axis of
      `partition`, or does not divide E or F.

  Example:
    >>> mesh = jax.make_mesh((1, 1), ("data", "expert"))
    >>> partition = types.Partition(
    ...   token_axes=("data", "expert"), expert_axis="expert", fsdp_axis="data"
    ... )
    >>> w_up = jax.ShapeDtypeStruct((8, 64, 32), "float32")
    >>> kernel = jax.ShapeDtypeStruct((64, 8), "float32")
    >>> params = {"router": {"kernel": kernel}, "w_up": w_up}
    >>> tuple(shardings(params, partition, mesh)["w_up"].spec)
    ('expert', 'data')
  """
  fix = "On one device there is nothing to shard."
  checks.check_instance("partition", partition, types.Partition, fix)
  fix = "Pass what `jax.make_mesh` returns."
  checks.check_instance("mesh", mesh, jax.sharding.Mesh, fix)
  mesh_lib.check_mesh(partition, mesh.abstract_mesh)
  found, structure = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: isinstance(x, types.RouterState) or _is_boxed(x)
  )
  leaves = {_names(path): x for path, x in found}
  layers = _layers(tree, leaves)
  # The path of a moment ends as that of its parameter does, which starts with
  # the name of another field.
  params = {path[1:]: path for path in leaves if "opt_state" not in path}

  def spec(path: Path) -> jax.P:
    x = leaves[path]
    if "opt_state" in path:
      ends = (path[i:] for i in range(1, len(path)))
      owner = next((params[end] for end in ends if end in params), None)
      if owner is not None:
        return spec(owner) if _shape(x) == _shape(leaves[owner]) else jax.P()
    if isinstance(x, types.RouterState) or _WHOLE & {*path[-1:]}:
      return jax.P()
    name = path[-1] if path and path[:-1] in layers else None
    return _spec(x, name, partition, mesh.abstract_mesh)

  def place(path: Path) -> Any:
    sharding = jax.NamedSharding(mesh, spec(path))
    return jax.tree.map(lambda _: sharding, leaves[path])

  return jax.tree.unflatten(structure, map(place, leaves))


def hidden_specs(
  params: types.PyTree,
  partition: types.Partition,
  mesh: jax.sharding.AbstractMesh,
) -> types.PyTree:
  """How experts' parameters lie while a layer runs that `tensor_axis` shards.

  Args:
    params: `ExpertParams` of `[E, ...]`.
    partition: its `tensor_axis` is used.
    mesh: that has it.

  Returns:
    `jax.P`s, in the structure of `params`.

  Raises:
    ValueError: if the axis does not divide F.
  """
  gathered = dataclasses.replace(partition, fsdp_axis=None)
  return jax.tree_util.tree_map_with_path(
    lambda path, w: _spec(w, _names(path)[-1], gathered, mesh), params
  )


def _names(path: tuple[Any, ...]) -> Path:
  """A path of JAX's, by names alone."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _layers(tree: types.PyTree, paths: Iterable[Path]) -> set[Path]:
  """Where "w_gate" is an expert's: beside a router, and in an `ExpertParams`."""
  routers = {path[:-2] for path in paths if path[-2:] == ("router", "kernel")}

  def is_experts(x: Any) -> bool:
    return isinstance(x, types.ExpertParams)

  parts, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_experts)
  return routers | {_names(path) for path, x in parts if is_experts(x)}


def _is_boxed(x: Any) -> bool:
  """Whether `x` is an array in one of Flax's boxes, which may name its axes."""
  is_box = hasattr(x, "unbox") or hasattr(x, "get_metadata")
  return is_box and len(jax.tree.leaves(x)) == 1


def _shape(x: Any) -> tuple[int, ...]:
  """The shape of an array, or of the one in a box."""
  (array,) = jax.tree.leaves(x)
  return getattr(array, "shape", ())


def _logical_axes(x: Any, name: str | None) -> tuple[str | None, ...]:
  """A name or None for each axis of an array, by its box or by its own name."""
  rank = len(_shape(x))
  axes: Any = None
  if hasattr(x, "get_metadata"):  # an nnx.Variable
    axes = x.get_metadata().get("out_sharding")
  elif hasattr(x, "unbox"):  # an nn.LogicallyPartitioned
    axes = getattr(x, "names", None)
  if not isinstance(axes, tuple | jax.P):
    axes = LOGICAL_AXES.get(name or "", ())
  if len(axes) > rank:
    axes = ()
  # Axes of a scan, which nobody need name, come first.
  return (None,) * (rank - len(axes)) + tuple(axes)


def _spec(
  x: Any,
  name: str | None,
  partition: types.Partition,
  mesh: jax.sharding.AbstractMesh,
) -> jax.P:
  """How one parameter is sharded.

  Args:
    x: an array, or one in a box.
    name: if it is of a layer, what the layer calls it.
    partition: see `shardings`.
    mesh: see there.
  """
  shape, logical = _shape(x), _logical_axes(x, name)
  axes: list[str | None] = [None] * len(shape)
  first = 0

  def shard(axis: str, what: str, mesh_axis: str | None) -> None:
    if axis in logical and mesh_axis is not None:
      i = logical.index(axis)
      mesh_lib.check_divides(what, shape[i], mesh, (mesh_axis,))
      axes[i] = mesh_axis

  if "expert" in logical:
    first = logical.index("expert")
    shard("expert", "experts", partition.expert_axis)
    shard("mlp", "units of an expert's width F", partition.tensor_axis)
  if partition.fsdp_axis is not None and len(shape) > 1:
    size = mesh.shape[partition.fsdp_axis]
    fit = [
      (shape[i], i)
      for i in range(first, len(shape))
      if axes[i] is None and logical[i] != "layers" and shape[i] % size == 0
    ]
    if fit:
      axes[max(fit)[1]] = partition.fsdp_axis
  while axes and axes[-1] is None:
    axes.pop()
  return jax.P(*axes)
