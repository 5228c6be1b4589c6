# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`route` by the GPU kernel, with its gradient.

Under explicit sharding the kernel runs shard by shard. Its gradient is that of
`weights.weigh` for the chosen experts.

Mosaic GPU is not in every jaxlib: what needs it is imported where it is used.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxroute import ladder, remat, types
from jaxroute.kernels.gpu import device
from jaxroute.parallel import mesh
from jaxroute.routing import weights


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
  *,
  by_name: bool,
  interpret: Any,
  with_rank: bool,
) -> types.Routing:
  """See `jaxroute.route`, which checks the arguments.

  Args:
    logits: `[T, E]` floating point.
    expert_bias: `[E]` float32, or None.
    config: static router description.
    token_mask: `[T]` bool, or None.
    by_name: whether the kernel was asked for, and may be on its way to a GPU that is
      not here.
    interpret: as in `jaxroute.route`.
    with_rank: as in `jaxroute.route`.

  Returns:
    A `Routing`.

  Raises:
    ladder.Refusal: if the kernel cannot do this, or not here.
  """
  ladder.check_can_run(
    device.too_old() or ladder.symbolic_size(logits) or _unsupported(logits),
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=interpret,
    over_shards=True,
  )
  from jaxroute.kernels.gpu import route as kernel

  if reason := kernel.unsupported(config, logits.dtype):
    raise ladder.Refusal(reason)
  if expert_bias is not None:
    expert_bias = jax.lax.stop_gradient(expert_bias)

  def call_shard(*operands: Any) -> types.Routing:
    call = functools.partial(_route, config, with_rank, interpret)
    return call(*mesh.vary_alike(operands))

  yes: Any = True  # in the place of an array
  no: Any = False
  return mesh.map_over_tokens(
    call_shard,
    [logits, expert_bias, token_mask],
    are_per_token=[True, False, True],
    outputs_per_token=types.Routing(
      expert_idx=yes,
      weights=yes,
      counts=types.Counts(load=no, histogram=no if config.histogram else None),
      cutoff=yes,
      token_mask=yes,
      # Every shard has ranks of its own.
      rank=yes if with_rank else None,
    ),
    # The interpreter mixes varying and other values itself.
    check_vma=not interpret,
  )


def _unsupported(logits: jax.Array) -> str | None:
  if logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"logits may be float32, bfloat16 or float16, got {logits.dtype}"
  # An index of theirs, padded, is an int32.
  if logits.size >= 2**30:
    return f"there may be less than 2**30 logits, got {logits.size}"
  return None


def _call_kernel(
  config: types.RouterConfig,
  with_rank: bool,
  interpret: Any,
  with_chosen: bool,
  *operands: jax.Array | None,
) -> tuple[types.Routing, jax.Array | None]:
  """Calls the kernel; compiled for another platform it raises.

  Returns:
    A `Routing`; and the chosen logits, `[T, K]`, if asked for.
  """
  from jaxroute.kernels.gpu import route as kernel

  call = functools.partial(
    kernel.route,
    config=config,
    with_chosen=with_chosen,
    with_rank=with_rank,
    interpret=bool(interpret),
  )
  # One by one in a batch: blocks add to one load.
  call = jax.custom_batching.sequential_vmap(call)
  out = ladder.call_kernel("route", "cuda", call, interpret, *operands)
  routing = types.Routing(
    expert_idx=remat.checkpoint_name("expert_idx", out.expert_idx),
    weights=remat.checkpoint_name("weights", out.weights),
    counts=types.Counts(load=out.load, histogram=out.histogram),
    cutoff=out.cutoff,
    token_mask=out.token_mask,
    rank=out.rank,
  )
  return routing, out.chosen


class _Residuals(NamedTuple):
  """What the gradient needs.

  Attributes:
    logits: `[T, E]`, for weights that depend on all; else None.
    chosen: `[T, K]`, the logits of the chosen experts, for all others; else None.
    expert_idx: `[T, K]` int32.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
  """

  logits: jax.Array | None
  chosen: jax.Array | None
  expert_idx: jax.Array
  expert_bias: jax.Array | None
  token_mask: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _route(
  config: types.RouterConfig,
  with_rank: bool,
  interpret: Any,
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> types.Routing:
  operands = logits, expert_bias, token_mask
  return _call_kernel(config, with_rank, interpret, False, *operands)[0]


def _route_fwd(
  config: types.RouterConfig,
  with_rank: bool,
  interpret: Any,
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> tuple[types.Routing, _Residuals]:
  keeps_all = config.weighs_all_logits
  operands = logits, expert_bias, token_mask
  routing, chosen = _call_kernel(
    config, with_rank, interpret, not keeps_all, *operands
  )
  if chosen is not None:
    chosen = remat.checkpoint_name("chosen_logits", chosen)
  return routing, _Residuals(
    logits=logits if keeps_all else None,
    chosen=chosen,
    expert_idx=routing.expert_idx,
    expert_bias=expert_bias,
    token_mask=token_mask,
  )


def _route_bwd(
  config: types.RouterConfig,
  with_rank: bool,
  interpret: Any,
  residuals: _Residuals,
  d_routing: types.Routing,
) -> tuple[jax.Array | None, ...]:
  del with_rank, interpret
  logits, chosen, expert_idx, expert_bias, token_mask = residuals

  def weigh_all(logits: jax.Array) -> jax.Array:
    return weights.weigh(logits, expert_idx, config, token_mask)[0]

  def weigh_chosen(chosen: jax.Array) -> jax.Array:
    chosen = weights.fill_padding(chosen, token_mask)
    return weights.weigh_chosen(chosen, config, token_mask)[0]

  if chosen is None:
    _, pull = jax.vjp(weigh_all, logits)
    (d_logits,) = pull(d_routing.weights)
  else:
    _, pull = jax.vjp(weigh_chosen, chosen)
    (d_chosen,) = pull(d_routing.weights)
    d_logits = _spread(d_chosen, expert_idx, config.num_experts)
  d_bias = None if expert_bias is None else jnp.zeros_like(expert_bias)
  return d_logits, d_bias, None


_route.defvjp(_route_fwd, _route_bwd)


def _spread(
  values: jax.Array, expert_idx: jax.Array, num_experts: int
) -> jax.Array:
  """`[T, E]` with `[T, K]` values at their experts and 0 elsewhere."""
  # One pass that writes, where a scatter fills with 0 before.
  expert = jnp.arange(num_experts, dtype=jnp.int32)[None]
  total = jnp.zeros((values.shape[0], num_experts), values.dtype)
  for k in range(values.shape[1]):
    is_chosen = expert_idx[:, k : k + 1] == expert
    total = jnp.where(is_chosen, values[:, k : k + 1], total)
  return total
