# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The Mixture-of-Experts layer as pure functions of its parameters.

`jaxroute.linen` and `jaxroute.nnx` only hold the parameters and call these.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxroute import checks, dispatch, experts, ladder, remat, types
from jaxroute import routing as routing_lib
from jaxroute.parallel import all_gather, all_to_all, shards
from jaxroute.parallel import mesh as mesh_lib


def router(
  x: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: routing_lib.Implementation | None = None,
  fuse_projection: bool = False,
  partition: types.Partition | None = None,
) -> tuple[types.Routing, jax.Array | None]:
  """Projects tokens to float32 logits, whatever their dtype, and routes them.

  Args:
    x: `[..., D]`. The leading axes are flattened into T.
    router_weight: `[D, E]`. The router projection.
    expert_bias: `[E]` float32, or None.
    config: static router description.
    token_mask: bool, shaped like the leading axes of `x`. False is padding.
    implementation: as in `jaxroute.route`.
    fuse_projection: whether to leave out the logits, so that one kernel can do
      both where there is one; see `jaxroute.routing.project_and_route`.
    partition: how tokens lie on the mesh in force: every device routes its own,
      by a kernel where there is one. One all-reduce sums the counts where they are
      used; `Counts.parts` are not summed yet. None for one device, to leave it to
      the compiler, or where the axes of the mesh are explicit, for tokens that lie
      as `x` does.

  Returns:
    The `Routing` of the T tokens and their logits, `[T, E]` float32, or None.

  Raises:
    ValueError: if a shape or dtype does not fit, or the mesh not `partition`.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.
  """
  x, router_weight = map(checks.as_jax, (x, router_weight))
  check_tokens(x)
  routing_lib.check_router_weight(router_weight, x.shape[-1], config)
  if token_mask is not None:
    checks.check_mask_of(x, token_mask)
  partition = mesh_lib.partition_of(x, partition, config.num_experts)
  tokens = _flatten(x, partition)
  if token_mask is not None:
    token_mask = _flatten(token_mask[..., None], partition)[:, 0]
  # Whatever is wrong is said before anything is projected.
  logits = jax.ShapeDtypeStruct(
    (tokens.shape[0], config.num_experts), jnp.float32
  )
  routing_lib.check_inputs(logits, expert_bias, config, token_mask)
  names = get_args(routing_lib.Implementation)
  ladder.check_names("router", names, implementation)
  fix = "True leaves out the logits."
  fuse_projection = checks.as_bool("fuse_projection", fuse_projection, fix)
  run_shard = functools.partial(
    _shard_router,
    config=config,
    fuse_projection=fuse_projection,
    implementation=implementation,
    # A layer goes on to sort its assignments, by their ranks; but after an
    # all-gather a device also sorts those of others, which have ranks of their own.
    with_rank=shards.exchange_of(x, partition) != "all_gather",
  )
  routes, logits, parts = mesh_lib.map_over_tokens(
    run_shard,
    [tokens, token_mask, router_weight, expert_bias],
    are_per_token=[True, True, False, False],
    outputs_per_token=_are_per_token(config.histogram, fuse_projection),
    partition=partition,
  )
  if partition is not None:
    # If it is not saved, a loss that reads the load has it summed again in the
    # backward pass.
    load = remat.checkpoint_name("load", routes.load)
    counts = dataclasses.replace(routes.counts, load=load).made_of(parts)
    routes = dataclasses.replace(routes, counts=counts)
  return routes, logits


def _shard_router(
  tokens: jax.Array,
  token_mask: jax.Array | None,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  *,
  config: types.RouterConfig,
  fuse_projection: bool,
  implementation: routing_lib.Implementation | None,
  with_rank: bool,
) -> tuple[types.Routing, jax.Array | None, types.Parts]:
  """What a device does with its tokens; the counts are those of this shard."""
  how: Any = dict(implementation=implementation, with_rank=with_rank)
  if fuse_projection:
    operands = tokens, router_weight, expert_bias, config, token_mask
    logits, routes = None, routing_lib.project_and_route(*operands, **how)
  else:
    logits = routing_lib.project(tokens, router_weight, token_mask)
    operands = logits, expert_bias, config, token_mask
    routes = routing_lib.route(*operands, **how)
  load, histogram = routes.counts.load[None], routes.counts.histogram
  if histogram is not None:
    histogram = histogram[None]
  return routes, logits, types.Parts(load=load, histogram=histogram)


def _are_per_token(
  has_histogram: bool, fuse_projection: bool
) -> tuple[types.Routing, Any, types.Parts]:
  """Which outputs of a shard's router have a row for each token, or each shard."""
  yes: Any = True  # in the place of an array
  no: Any = False
  routing = types.Routing(
    expert_idx=yes,
    weights=yes,
    counts=types.Counts(load=no, histogram=no if has_histogram else None),
    cutoff=yes,
    token_mask=yes,
    rank=yes,  # or None, where what is per token is left as it is
  )
  parts = types.Parts(load=yes, histogram=yes if has_histogram else None)
  return routing, None if fuse_projection else yes, parts


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
  experts_implementation: experts.Implementation | None = None,
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
    partition: how tokens and experts lie on the mesh in force. None for one
      device, to leave it to the compiler, or where the axes of the mesh are
      explicit, for tokens that lie as `x` does and experts that every device
      has whole.
    experts_implementation: as in `jaxroute.experts.grouped_matmul`.

  Returns:
    The output, shaped and sharded like `x`, 0 for padding and NaN for tokens with NaN
    weights, and `group_sizes` `[E]` int32: the rows each expert processed.

  Raises:
    ValueError: if a shape or dtype does not fit, as where `routing`, `params`
      and `config` have different numbers of experts.
    NotImplementedError: if the implementation or exchange asked for cannot do
      this.
  """
  x, params, shared = jax.tree.map(checks.as_jax, (x, params, shared))
  check_tokens(x)
  routing_lib.check_config(config)
  experts.check_params("params", params, x.shape[-1], config.num_experts)
  if shared is not None:
    experts.check_params("shared", shared, x.shape[-1], is_dense=True)
  argument = "experts_implementation"
  names = get_args(experts.Implementation)
  ladder.check_names("moe", names, experts_implementation, argument=argument)
  partition = mesh_lib.partition_of(x, partition, config.num_experts)
  tokens = _flatten(x, partition)
  routing_lib.check_routing(routing, tokens.shape[0], config)
  if dtype is not None:
    dtype = checks.as_float_dtype("dtype", dtype)
    tokens = tokens.astype(dtype)
  params, shared = jax.tree.map(
    lambda w: w.astype(tokens.dtype), (params, shared)
  )
  capacity = None
  if capacity_factor is not None:
    num_shards = mesh_lib.token_shards(partition, x)
    capacity = dispatch.expert_capacity(
      config, tokens.shape[0] // num_shards, capacity_factor
    )
  static: Any = dict(capacity=capacity, implementation=experts_implementation)
  if partition is None:
    out, group_sizes = local_moe(tokens, routing, params, **static)
  else:
    run_shard = functools.partial(
      _shard_moe,
      partition=partition,
      exchange=shards.exchange_of(x, partition),
      **static,
    )
    out, group_sizes = shards.map_experts(
      run_shard, tokens, routing, params, partition
    )
  if shared is not None:
    # The exchange does not depend on it: a compiler may do both at once.
    kept = _flatten(routing.token_mask[:, None], partition)
    tokens = jnp.where(kept, tokens, jnp.zeros((), tokens.dtype))
    shared = jax.tree.map(mesh_lib.whole, shared)
    out = out + experts.dense_swiglu(tokens, shared)
  axes = jax.typeof(x).sharding.spec
  return mesh_lib.reshape(out, x.shape, axes), group_sizes


def _flatten(x: jax.Array, partition: types.Partition | None) -> jax.Array:
  """`[..., D]` to `[T, D]`, sharded over the token axes where that is known."""
  axes = partition.token_axes if partition else ()
  return mesh_lib.reshape(x, (-1, x.shape[-1]), (axes, ()))


def local_moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  *,
  capacity: int | None = None,
  implementation: experts.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sends tokens to the experts that are here, and sums what these return.

  Args:
    x: `[T, D]`. Tokens.
    routing: of those tokens. Tokens that its mask leaves out give 0, or NaN if
      their weights are NaN, and reach no parameter's gradient. If it has a `rank`,
      its `load` has to be of these tokens alone.
    params: with the E axis, of the dtype of `x`. An index of `routing` outside
      `[0, E)` is of an expert that is not here, and adds nothing.
    capacity: C. An expert keeps its first C assignments in token order and the
      others are dropped; None drops nothing.
    implementation: as in `jaxroute.experts.grouped_matmul`.

  Returns:
    `[T, D]`, the dtype of `x`, and `group_sizes`, `[E]` int32: the rows each
    expert processed, `min(load, C)`.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.
  """
  x, params = jax.tree.map(checks.as_jax, (x, params))
  fix = "Flatten batch and sequence into T, and embed integer tokens first."
  checks.check_array("x", x, "[T, D]", "floating point", fix)
  experts.check_params("params", params, x.shape[1], dtype=x.dtype.name)
  routing_lib.check_routing(routing, x.shape[0])
  if params.w_gate.shape[0] > routing.load.shape[0]:
    raise ValueError(
      f"`params` must be of at most the E={routing.load.shape[0]} experts of"
      f" `routing`, got {params.w_gate.shape[0]}. Pass those that are here."
    )
  if capacity is not None:
    capacity = checks.as_int("capacity", capacity, "None drops nothing.")
  names = get_args(experts.Implementation)
  ladder.check_names("local_moe", names, implementation)
  return _local_moe(
    x, routing, params, capacity=capacity, implementation=implementation
  )


@functools.partial(jax.jit, static_argnames=("capacity", "implementation"))
def _local_moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  *,
  capacity: int | None,
  implementation: experts.Implementation | None,
) -> tuple[jax.Array, jax.Array]:
  """See `local_moe`, which checks the arguments."""
  num_experts = params.w_gate.shape[0]
  order = _order(routing, num_experts, capacity)
  rows = dispatch.dispatch(x, order)
  # On one shard of the experts N counts all assignments, but only this shard's
  # experts own rows: expect their share.
  expected_rows = -(-rows.shape[0] * num_experts // routing.load.shape[0])
  rows = experts.swiglu(
    rows,
    params,
    order.group_sizes,
    implementation=implementation,
    expected_rows=expected_rows,
  )
  return dispatch.combine(rows, routing.weights, order), order.group_sizes


def _shard_moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  *,
  partition: types.Partition,
  exchange: types.Exchange | None,
  **static: Any,
) -> tuple[jax.Array, jax.Array]:
  """What a device does with its tokens and its experts, inside `jax.shard_map`."""
  if exchange in ("ragged", "equal"):
    how: Any = dict(partition=partition, exchange=exchange, **static)
    return _exchanged_moe(x, routing, params, **how)
  run_experts = functools.partial(local_moe, **static)
  return all_gather.run(run_experts, x, routing, params, partition)


@functools.partial(
  jax.jit,
  static_argnames=("partition", "exchange", "capacity", "implementation"),
)
def _exchanged_moe(
  x: jax.Array,
  routing: types.Routing,
  params: experts.ExpertParams,
  *,
  partition: types.Partition,
  exchange: types.Exchange,
  capacity: int | None,
  implementation: experts.Implementation | None,
) -> tuple[jax.Array, jax.Array]:
  """Like `local_moe`, with rows sent to the devices of their experts and back."""
  order = _order(routing, routing.load.shape[0])
  rows = dispatch.dispatch(x, order)
  run_experts = functools.partial(
    experts.swiglu, implementation=implementation, expected_rows=rows.shape[0]
  )
  rows, group_sizes = all_to_all.run(
    run_experts,
    rows,
    params,
    order.group_sizes,
    partition=partition,
    exchange=exchange,
    capacity=capacity,
  )
  return dispatch.combine(rows, routing.weights, order), group_sizes


def _order(
  routing: types.Routing, num_experts: int, capacity: int | None = None
) -> dispatch.Permutation:
  """Sorts assignments by expert; only the first `num_experts` may be here."""
  known: Any = {}
  # Ranks are those among the assignments of all experts, which must all be here.
  if routing.rank is not None and num_experts == routing.load.shape[0]:
    known = dict(rank=routing.rank, load=routing.load)
  return dispatch.sort_by_expert(
    routing.expert_idx, num_experts, routing.token_mask, capacity, **known
  )


def check_tokens(x: jax.Array) -> None:
  """Raises ValueError unless `x` is `[..., D]` floating point.

  Args:
    x: what was passed.
  """
  fix = "Embed integer tokens first, and pass D last."
  checks.check_array("x", x, "[..., D]", "floating point", fix)


def check_layer(
  config: types.RouterConfig,
  initializers: Mapping[str, Any],
  sizes: Mapping[str, int],
  param_dtype: Any = jnp.float32,
) -> None:
  """Raises ValueError unless a Flax layer can be made of its arguments.

  Args:
    config: what the router computes.
    initializers: functions, by the names of the arguments.
    sizes: at least 1, that of shared experts at least 0; by name.
    param_dtype: of the expert parameters.
  """
  routing_lib.check_config(config)
  for name, init in initializers.items():
    fix = "Pass one of jax.nn.initializers."
    checks.check_instance(name, init, Callable, fix)
  for name, size in sizes.items():
    low = 0 if name == "shared_hidden_size" else 1
    checks.as_int(name, size, "Pass that of the model.", low=low)
  checks.as_float_dtype("param_dtype", param_dtype)
