# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The Mixture-of-Experts layer as pure functions of its parameters.

`jaxroute.linen` and `jaxroute.nnx` only hold the parameters and call these.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import dispatch, experts, sharding, types
from jaxroute import routing as routing_lib


def router(
  x: jax.Array,
  kernel: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: types.Implementation | None = None,
  fuse_projection: bool = False,
) -> tuple[types.Routing, jax.Array | None]:
  """Projects tokens to float32 logits, whatever their dtype, and routes them.

  Args:
    x: `[..., D]`. The leading axes are flattened into T.
    kernel: `[D, E]`. The router projection.
    expert_bias: `[E]` float32, or None.
    config: static router description.
    token_mask: bool, shaped like the leading axes of `x`. False is padding.
    implementation: as in `jaxroute.route`.
    fuse_projection: whether to leave out the logits, so that one kernel can do
      both where there is one; see `jaxroute.routing.project_and_route`.

  Returns:
    The `Routing` of the T tokens and their logits, `[T, E]` float32, or None.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  routing_lib.check_kernel(kernel, x.shape[-1], config)
  if token_mask is not None:
    if token_mask.shape != x.shape[:-1]:
      raise ValueError(
        f"`token_mask` must have the leading shape of `x`, {x.shape[:-1]}, got"
        f" {token_mask.shape}. True marks real tokens."
      )
    token_mask = token_mask.reshape(-1)
  tokens = x.reshape(-1, x.shape[-1])
  if fuse_projection:
    routing = routing_lib.project_and_route(
      tokens, kernel, expert_bias, config, token_mask, implementation
    )
    return routing, None
  logits = routing_lib.project(tokens, kernel, token_mask)
  routing = routing_lib.route(
    logits, expert_bias, config, token_mask, implementation
  )
  return routing, logits


def moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  shared: experts.ExpertParams | None = None,
  *,
  config: types.RouterConfig,
  capacity_factor: float | None = None,
  dtype: Any = None,
  partition: types.Partition | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Dispatches tokens to their experts and combines what these return.

  Args:
    x: `[..., D]`. The leading axes are flattened into T.
    routing: of those T tokens.
    params: `[E, ...]` parameters of the routed experts.
    shared: parameters, without the E axis, of a SwiGLU every token passes.
    config: static router description.
    capacity_factor: see `jaxroute.dispatch.expert_capacity`; None drops
      nothing. Under a `partition` every token shard has its own capacity.
    dtype: of the expert computation; None for that of `x`.
    partition: how tokens and experts lie on the mesh; None for one device.

  Returns:
    The output, shaped like `x`, 0 for padding and NaN for tokens with NaN
    weights, and `group_sizes` `[E]` int32: the rows each expert processed.
  """
  tokens = x.reshape(-1, x.shape[-1])
  if dtype is not None:
    tokens = tokens.astype(dtype)
  params, shared = jax.tree.map(
    lambda w: w.astype(tokens.dtype), (params, shared)
  )
  capacity = None
  if capacity_factor is not None:
    shards = sharding.token_shards(partition)
    capacity = dispatch.expert_capacity(
      config, tokens.shape[0] // shards, capacity_factor
    )
  if partition is None:
    out, group_sizes = experts.moe(tokens, routing, params, capacity=capacity)
  else:
    out, group_sizes = sharding.moe(
      tokens, routing, params, partition, capacity=capacity
    )
  if shared is not None:
    kept = routing.token_mask[:, None]
    tokens = jnp.where(kept, tokens, jnp.zeros((), tokens.dtype))
    out = out + experts.dense_swiglu(tokens, shared)
  return out.reshape(x.shape), group_sizes
