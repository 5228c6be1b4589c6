# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts on a mesh: tokens sharded, experts sharded, one `shard_map`.

| array | logical axes | sharded over |
| --- | --- | --- |
| tokens, expert_idx, weights, token_mask | tokens, ... | `token_axes` |
| expert parameters | experts, ... | `expert_axis` |
| expert_bias, load | experts | nothing: replicated, global |
| group_sizes | experts | `expert_axis` |

Every device sorts the tokens it sees by its own experts; assignments to other
devices' experts take part as rows of no group. Where tokens are sharded over the
expert axis too, they are gathered before and the sums scattered after (all-gather
and reduce-scatter expert parallelism); else the partial outputs are summed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxroute import experts, types


def token_shards(partition: types.Partition | None) -> int:
  """Number of shards that the tokens of one dispatch come from.

  Args:
    partition: layout on the mesh in force, or None.

  Returns:
    How many dispatches share the tokens: 1 without a partition.
  """
  if partition is None:
    return 1
  mesh = _mesh(partition)
  return math.prod(
    mesh.shape[a] for a in partition.token_axes if a != partition.expert_axis
  )


def moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  partition: types.Partition,
  *,
  capacity: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`jaxroute.experts.moe` over the mesh in force.

  Args:
    x: `[T, D]`, sharded over `partition.token_axes`.
    routing: of those tokens.
    params: `[E, ...]`, sharded over `partition.expert_axis`.
    partition: layout on the mesh of `jax.set_mesh`.
    capacity: rows per expert *and token shard*, or None.

  Returns:
    `[T, D]`, sharded like `x`, and the global `group_sizes`, `[E]` int32.

  Raises:
    ValueError: if no mesh is in force, it lacks an axis, or T or E does not
      divide.
  """
  mesh = _mesh(partition)
  tokens, expert = partition.token_axes, partition.expert_axis
  num_experts = params.w_gate.shape[0]
  _check_divides("tokens", x.shape[0], mesh, tokens)
  _check_divides("experts", num_experts, mesh, (expert,) if expert else ())
  over_tokens, over_experts = jax.P(tokens or None), jax.P(expert)
  gather = expert is not None and expert in tokens

  def local(x, routing, params):
    def everyone(v):
      return jax.lax.all_gather(v, expert, tiled=True) if gather else v

    expert_idx = everyone(routing.expert_idx)
    if expert is not None:
      count = params.w_gate.shape[0]
      expert_idx = expert_idx - jax.lax.axis_index(expert) * count
      here = (expert_idx >= 0) & (expert_idx < count)
      expert_idx = jnp.where(here, expert_idx, count)
    routing = dataclasses.replace(
      routing,
      expert_idx=expert_idx,
      weights=everyone(routing.weights),
      token_mask=everyone(routing.token_mask),
    )
    out, group_sizes = experts.moe(
      everyone(x), routing, params, capacity=capacity
    )
    if gather:
      out = jax.lax.psum_scatter(out, expert, tiled=True)
    elif expert is not None:
      out = jax.lax.psum(out, expert)
    sums = tuple(a for a in tokens if a != expert)
    if sums:
      group_sizes = jax.lax.psum(group_sizes, sums)
    return out, group_sizes

  # The load is of the global batch already, as is a histogram, which no expert
  # needs; the rest is per token.
  routing = dataclasses.replace(routing, histogram=None)
  routes = jax.tree.map(lambda _: over_tokens, routing)
  routes = dataclasses.replace(routes, load=jax.P())
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(over_tokens, routes, over_experts),
    out_specs=(over_tokens, over_experts),
  )(x, routing, params)


def _mesh(partition):
  mesh = jax.sharding.get_abstract_mesh()
  wanted = set(partition.token_axes) | {partition.expert_axis} - {None}
  if not wanted <= set(mesh.axis_names):
    raise ValueError(
      f"`partition` names the mesh axes {sorted(wanted)}, got a mesh with"
      f" {mesh.axis_names}. Put the call under `jax.set_mesh(mesh)`."
    )
  return mesh


def _check_divides(what, size, mesh, axes):
  shards = math.prod(mesh.shape[a] for a in axes)
  if size % shards:
    raise ValueError(
      f"`partition` shards {size} {what} over the mesh axes {axes}, {shards}"
      " devices, which does not divide. Pad, or choose other axes."
    )
