# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Experts on the tokens of all devices, inside `jax.shard_map`.

Every device sorts the tokens it sees by its own experts; assignments to other
devices' experts take part as rows of no group. Where tokens are sharded over
the expert axis too, they are gathered before and the sums scattered after
(all-gather and reduce-scatter expert parallelism); else the partial outputs are
summed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxroute import types
from jaxroute.parallel import shards


def run(
  run_experts: shards.RunExperts,
  x: jax.Array,
  routing: types.Routing,
  params: types.PyTree,
  partition: types.Partition,
) -> tuple[jax.Array, jax.Array]:
  """Runs a device's experts on all tokens that chose them.

  Args:
    run_experts: what a device does with the tokens it sees and the experts it
      holds: an index one past its own experts stands for an expert of another
      device.
    x: `[t, D]`. The device's tokens.
    routing: of those tokens.
    params: pytree of `[E / P, ...]`.
    partition: its `expert_axis` and `token_axes` are axes of the `shard_map`.

  Returns:
    `[t, D]`, the sums over the experts of all devices, and `[E / P]` int32, the
    rows that each expert of this device took.
  """
  expert = partition.expert_axis
  if expert is None:
    return run_experts(x, routing, params)
  if partition.exchanges_tokens and jax.lax.axis_size(expert) == 1:
    return run_experts(x, routing, params)

  def everyone(v: jax.Array) -> jax.Array:
    if not partition.exchanges_tokens:
      return v
    return jax.lax.all_gather(v, expert, tiled=True)

  count = jax.tree.leaves(params)[0].shape[0]
  expert_idx = everyone(routing.expert_idx)
  expert_idx = expert_idx - jax.lax.axis_index(expert) * count
  is_here = (expert_idx >= 0) & (expert_idx < count)
  routing = dataclasses.replace(
    routing,
    expert_idx=jnp.where(is_here, expert_idx, count),
    weights=everyone(routing.weights),
    token_mask=everyone(routing.token_mask),
    rank=None,
  )
  out, group_sizes = run_experts(everyone(x), routing, params)
  if partition.exchanges_tokens:
    return jax.lax.psum_scatter(out, expert, tiled=True), group_sizes
  return jax.lax.psum(out, expert), group_sizes
