# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts on a mesh: tokens sharded, experts sharded, one `shard_map`.

| array | logical axes | sharded over |
| --- | --- | --- |
| tokens, expert_idx, weights, token_mask | tokens, ... | `token_axes` |
| expert parameters | experts, D, F | `expert_axis`, or `tensor_axis` on F |
| expert_bias, load | experts | nothing: replicated, global |
| group_sizes | experts | `expert_axis` |

Every device sorts the tokens it sees by its own experts; assignments to other
devices' experts take part as rows of no group. Where tokens are sharded over
the expert axis too, they are gathered before and the sums scattered after
(all-gather and reduce-scatter expert parallelism); else the partial outputs are
summed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxroute import types
from jaxroute.parallel import mesh as mesh_lib
from jaxroute.parallel import placement

# (tokens, their routing, parameters of experts) -> (output, group_sizes)
RunExperts = Callable[
  [jax.Array, types.Routing, types.PyTree], tuple[jax.Array, jax.Array]
]


def map_experts(
  run_experts: RunExperts,
  x: jax.Array,
  routing: types.Routing,
  params: types.PyTree,
  partition: types.Partition,
) -> tuple[jax.Array, jax.Array]:
  """Runs every device's experts on the tokens that chose them.

  Args:
    run_experts: what a device does with the tokens it sees and the experts it
      holds: an index one past its own experts stands for an expert of another
      device.
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
  over_tokens, over_experts = jax.P(tokens or None), jax.P(expert)
  over_params: types.PyTree = over_experts
  if partition.tensor_axis is not None:
    over_params = placement.hidden_specs(params, partition, mesh)

  def run_shard(
    x: jax.Array, routing: types.Routing, params: types.PyTree
  ) -> tuple[jax.Array, jax.Array]:
    x, routing = _bring_tokens(x, routing, params, partition)
    out, group_sizes = run_experts(x, routing, params)
    out, group_sizes = _take_outputs_back(out, group_sizes, partition)
    if partition.tensor_axis is not None:
      out = jax.lax.psum(out, partition.tensor_axis)
    return out, group_sizes

  # The load is of the global batch already; no expert needs a histogram.
  routing = dataclasses.replace(routing, counts=types.Counts(load=routing.load))
  routes = jax.tree.map(lambda _: over_tokens, routing)
  routes = dataclasses.replace(routes, counts=types.Counts(load=jax.P()))
  return mesh_lib.map_shards(
    run_shard,
    (x, routing, params),
    mesh=mesh,
    in_specs=(over_tokens, routes, over_params),
    out_specs=(over_tokens, over_experts),
  )


def _is_gathered(partition: types.Partition) -> bool:
  """Whether a device's tokens are fewer than those its experts have to see."""
  return partition.expert_axis in partition.token_axes


def _bring_tokens(
  x: jax.Array,
  routing: types.Routing,
  params: types.PyTree,
  partition: types.Partition,
) -> tuple[jax.Array, types.Routing]:
  """What a device's experts have to see, with experts numbered from its first."""
  expert = partition.expert_axis

  def everyone(v: jax.Array) -> jax.Array:
    if not _is_gathered(partition):
      return v
    return jax.lax.all_gather(v, expert, tiled=True)

  expert_idx = everyone(routing.expert_idx)
  counts, rank = routing.counts, None
  if expert is None and routing.rank is not None:
    rank, counts = routing.rank, types.Counts(load=_count(routing))
  if expert is not None:
    count = jax.tree.leaves(params)[0].shape[0]
    expert_idx = expert_idx - jax.lax.axis_index(expert) * count
    is_here = (expert_idx >= 0) & (expert_idx < count)
    expert_idx = jnp.where(is_here, expert_idx, count)
  return everyone(x), dataclasses.replace(
    routing,
    expert_idx=expert_idx,
    weights=everyone(routing.weights),
    token_mask=everyone(routing.token_mask),
    counts=counts,
    rank=rank,
  )


def _count(routing: types.Routing) -> jax.Array:
  """The load of the tokens of this device, where that of all is known."""
  ones = jnp.broadcast_to(routing.token_mask[:, None], routing.expert_idx.shape)
  zeros = jnp.zeros_like(routing.load)
  zeros, expert_idx, ones = mesh_lib.vary_alike(
    (zeros, routing.expert_idx, ones.astype(jnp.int32))
  )
  return zeros.at[expert_idx].add(ones, mode="drop")


def _take_outputs_back(
  out: jax.Array, group_sizes: jax.Array, partition: types.Partition
) -> tuple[jax.Array, jax.Array]:
  """A device's own tokens, summed over the experts of all; rows of all tokens."""
  expert = partition.expert_axis
  if _is_gathered(partition):
    out = jax.lax.psum_scatter(out, expert, tiled=True)
  elif expert is not None:
    out = jax.lax.psum(out, expert)
  sums = tuple(a for a in partition.token_axes if a != expert)
  if sums:
    group_sizes = jax.lax.psum(group_sizes, sums)
  return out, group_sizes
