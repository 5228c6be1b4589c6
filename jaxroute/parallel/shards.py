# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts on a mesh: tokens sharded, experts sharded, one `shard_map`.

| array | logical axes | sharded over |
| --- | --- | --- |
| tokens, expert_idx, weights, token_mask | tokens, ... | `token_axes` |
| expert parameters | experts, D, F | `expert_axis`, or `tensor_axis` on F |
| expert_bias, load | experts | nothing: replicated, global |
| group_sizes | experts | `expert_axis` |
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxroute import types
from jaxroute.parallel import all_to_all, placement
from jaxroute.parallel import mesh as mesh_lib

# (tokens, their routing, parameters of experts) -> (output, group_sizes)
RunExperts = Callable[
  [jax.Array, types.Routing, types.PyTree], tuple[jax.Array, jax.Array]
]


def exchange_of(
  x: jax.Array, partition: types.Partition | None
) -> types.Exchange | None:
  """How tokens and experts of a mesh meet; None where a device has all experts.

  Args:
    x: the tokens, of any shape.
    partition: layout on the mesh of `jax.set_mesh`, or None for one device.

  Returns:
    The exchange, as in `types.Partition`.

  Raises:
    ValueError: if no mesh is in force, or it lacks an axis.
    NotImplementedError: if its devices lack the exchange that was asked for.
  """
  if partition is None or partition.expert_axis is None:
    return None
  if not partition.exchanges_tokens:
    return "all_gather"  # of tokens that all devices have already
  mesh = mesh_lib.mesh_of(partition, x)
  exchange = all_to_all.choose(partition, mesh)
  if mesh.shape[partition.expert_axis] == 1 and not partition.drop:
    return None
  return exchange


def map_experts(
  run_shard: RunExperts,
  x: jax.Array,
  routing: types.Routing,
  params: types.PyTree,
  partition: types.Partition,
) -> tuple[jax.Array, jax.Array]:
  """Runs what every device does with its own tokens and its own experts.

  Args:
    run_shard: of a device's tokens, their routing, and the parameters of the
      experts that it holds; returns the outputs of these tokens, and the rows that
      each of these experts took. The `load` of a routing with a `rank` is that of
      these tokens alone.
    x: `[T, D]`, to be sharded over `partition.token_axes`.
    routing: of those tokens.
    params: pytree of `[E, ...]`, to be sharded over `partition.expert_axis`; an
      `ExpertParams` if there is a `tensor_axis`, which then shards F: every device
      has a slice of all experts, and one all-reduce, in the dtype of `x`, sums
      their outputs.
    partition: layout on the mesh of `jax.set_mesh`.

  Returns:
    `[T, D]`, sharded over `partition.token_axes`, and the global `group_sizes`,
    `[E]` int32.

  Raises:
    ValueError: if no mesh is in force, it lacks an axis, or T, E or F does not
      divide.
  """
  mesh = mesh_lib.mesh_of(partition, x)
  tokens, expert = partition.token_axes, partition.expert_axis
  num_experts = jax.tree.leaves(params)[0].shape[0]
  expert_axes = (expert,) if expert else ()
  mesh_lib.check_divides("tokens", x.shape[0], mesh, tokens)
  mesh_lib.check_divides("experts", num_experts, mesh, expert_axes)
  if not x.shape[0]:
    # XLA refuses to gather or exchange nothing.
    return x, jnp.zeros(num_experts, jnp.int32)
  over_tokens, over_experts = jax.P(tokens or None), jax.P(expert)

  over_params: types.PyTree = over_experts
  if partition.tensor_axis is not None:
    over_params = placement.hidden_specs(params, partition, mesh)

  def run(
    x: jax.Array, routing: types.Routing, params: types.PyTree
  ) -> tuple[jax.Array, jax.Array]:
    if routing.rank is not None:
      counts = types.Counts(load=_count(routing))
      routing = dataclasses.replace(routing, counts=counts)
    out, group_sizes = run_shard(x, routing, params)
    if partition.tensor_axis is not None:
      out = jax.lax.psum(out, partition.tensor_axis)
    sums = tuple(a for a in tokens if a != expert)
    if sums:
      group_sizes = jax.lax.psum(group_sizes, sums)
    return out, group_sizes

  # The load is of the global batch already; no expert needs a histogram.
  routing = dataclasses.replace(routing, counts=types.Counts(load=routing.load))
  routes = jax.tree.map(lambda _: over_tokens, routing)
  routes = dataclasses.replace(routes, counts=types.Counts(load=jax.P()))
  return mesh_lib.map_shards(
    run,
    (x, routing, params),
    mesh=mesh,
    in_specs=(over_tokens, routes, over_params),
    out_specs=(over_tokens, over_experts),
  )


def _count(routing: types.Routing) -> jax.Array:
  """The load of the tokens of this device, where that of all is known."""
  ones = jnp.broadcast_to(routing.token_mask[:, None], routing.expert_idx.shape)
  zeros = jnp.zeros_like(routing.load)
  zeros, expert_idx, ones = mesh_lib.vary_alike(
    (zeros, routing.expert_idx, ones.astype(jnp.int32))
  )
  return zeros.at[expert_idx].add(ones, mode="drop")
