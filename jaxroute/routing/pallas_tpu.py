# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`route` and `project_and_route` by the TPU kernel, with their gradients.

Under explicit sharding the kernel runs shard by shard. The gradient of the
weights is that of `weights.weigh` for the chosen experts; a second kernel puts
it into the rows of E logits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import ladder, remat, types
from jaxroute.kernels.tpu import device, scatter
from jaxroute.kernels.tpu import route as kernel
from jaxroute.parallel import mesh
from jaxroute.routing import weights
from jaxroute.routing.projection import project

_check_can_run = functools.partial(
  ladder.check_can_run, unavailable=device.unavailable, over_shards=True
)


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
  *,
  by_name: bool,
  interpret: Any,
) -> types.Routing:
  """See `jaxroute.route`, which checks the arguments.

  Args:
    logits: `[T, E]` floating point.
    expert_bias: `[E]` float32, or None.
    config: static router description.
    token_mask: `[T]` bool, or None.
    by_name: whether the kernel was asked for, and may be on its way to a TPU
      that is not here.
    interpret: as in `jaxroute.route`.

  Returns:
    A `Routing`.

  Raises:
    ladder.Refusal: if the kernel cannot do this, or not here.
  """
  unsupported = ladder.symbolic_size(logits) or kernel.unsupported(config)
  _check_can_run(unsupported, by_name=by_name, interpret=interpret)
  call = functools.partial(_route, config, interpret)
  return _map_shards(call, [logits], expert_bias, token_mask, interpret)


def project_and_route(
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
  *,
  by_name: bool,
  interpret: Any,
) -> types.Routing:
  """See `jaxroute.routing.project_and_route`, which checks the arguments.

  Args:
    tokens: `[T, D]` floating point.
    router_weight: `[D, E]`. The router projection.
    expert_bias: as in `route`.
    config: as in `route`.
    token_mask: as in `route`.
    by_name: as in `route`.
    interpret: as in `route`.

  Returns:
    A `Routing`.

  Raises:
    ladder.Refusal: as in `route`.
  """
  unsupported = ladder.symbolic_size(tokens)
  unsupported = unsupported or kernel.unsupported_projection(
    config, tokens.shape[1], tokens.dtype
  )
  _check_can_run(unsupported, by_name=by_name, interpret=interpret)
  call = functools.partial(_project_and_route, config, interpret)
  inputs = [tokens, router_weight]
  return _map_shards(call, inputs, expert_bias, token_mask, interpret)


def _map_shards(
  call: Callable[..., kernel.Outputs],
  inputs: list[jax.Array],
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  interpret: Any,
) -> types.Routing:
  """Calls the kernel on every shard of the tokens, or on all of them.

  The first of `inputs` and the mask have tokens in front, and are sharded
  alike.
  """
  if expert_bias is not None:
    expert_bias = jax.lax.stop_gradient(expert_bias)
  per_token = {"expert_idx", "weights", "cutoff", "chosen"}
  out = mesh.map_over_tokens(
    lambda *operands: call(*mesh.vary_alike(operands)),
    [*inputs, expert_bias, token_mask],
    are_per_token=[True, *[False] * len(inputs), True],
    outputs_per_token=kernel.Outputs._make(
      name in per_token for name in kernel.Outputs._fields
    ),
    # The interpreter mixes varying and other values itself.
    check_vma=not interpret,
  )
  is_valid = ~jnp.any(jnp.isnan(out.weights), axis=1)
  return types.Routing(
    expert_idx=out.expert_idx,
    weights=out.weights,
    counts=types.Counts(load=out.load, histogram=out.histogram),
    cutoff=out.cutoff,
    token_mask=is_valid if token_mask is None else token_mask & is_valid,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Residuals:
  """What the backward pass needs.

  Attributes:
    chosen: `[T, K]` float32. The chosen logits; or their log scores, where
      weights depend on the logits of all experts.
    expert_idx: `[T, K]` int32.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    logits: `[T, E]`, where a softmax over them has to be taken anew; else
      `[0, E]`, for their dtype. None if they were projected.
    tokens: `[T, D]`, where they were projected; else None.
    router_weight: `[D, E]`, where tokens were projected; else None.
  """

  chosen: jax.Array
  expert_idx: jax.Array
  expert_bias: jax.Array | None
  token_mask: jax.Array | None
  logits: jax.Array | None = None
  tokens: jax.Array | None = None
  router_weight: jax.Array | None = None


def _call_kernel(
  function: Callable[..., kernel.Outputs],
  config: types.RouterConfig,
  interpret: Any,
  with_chosen: bool,
  *operands: jax.Array | None,
) -> kernel.Outputs:
  """Calls a kernel; compiled for another platform it raises."""
  call = functools.partial(
    function, config=config, with_chosen=with_chosen, interpret=interpret
  )
  operation = function.__name__
  return ladder.call_kernel(operation, "tpu", call, interpret, *operands)


def _keep_chosen(
  out: kernel.Outputs,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  **inputs: jax.Array,
) -> tuple[kernel.Outputs, _Residuals]:
  """Names what rematerialisation keeps, and takes `chosen` out of the outputs."""
  chosen = out.chosen
  assert chosen is not None  # it was asked for
  out = out._replace(
    expert_idx=remat.checkpoint_name("expert_idx", out.expert_idx),
    weights=remat.checkpoint_name("weights", out.weights),
  )
  residuals = _Residuals(
    chosen=remat.checkpoint_name("chosen_logits", chosen),
    expert_idx=out.expert_idx,
    expert_bias=expert_bias,
    token_mask=token_mask,
    **inputs,
  )
  return out._replace(chosen=None), residuals


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(
  config: types.RouterConfig,
  interpret: Any,
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> kernel.Outputs:
  operands = logits, expert_bias, token_mask
  return _call_kernel(kernel.route, config, interpret, False, *operands)


def _route_fwd(
  config: types.RouterConfig,
  interpret: Any,
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> tuple[kernel.Outputs, _Residuals]:
  operands = logits, expert_bias, token_mask
  out = _call_kernel(kernel.route, config, interpret, True, *operands)
  kept = logits if config.weighs_all_logits else logits[:0]
  return _keep_chosen(out, expert_bias, token_mask, logits=kept)


def _route_bwd(
  config: types.RouterConfig,
  interpret: Any,
  residuals: _Residuals,
  d_out: kernel.Outputs,
) -> tuple[jax.Array | None, ...]:
  d_logits = _gradient_to_logits(config, interpret, residuals, d_out.weights)
  return d_logits, _zero_like(residuals.expert_bias), None


_route.defvjp(_route_fwd, _route_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_and_route(
  config: types.RouterConfig,
  interpret: Any,
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> kernel.Outputs:
  operands = tokens, router_weight, expert_bias, token_mask
  return _call_kernel(
    kernel.project_and_route, config, interpret, False, *operands
  )


def _project_and_route_fwd(
  config: types.RouterConfig,
  interpret: Any,
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> tuple[kernel.Outputs, _Residuals]:
  operands = tokens, router_weight, expert_bias, token_mask
  out = _call_kernel(
    kernel.project_and_route, config, interpret, True, *operands
  )
  inputs = dict(tokens=tokens, router_weight=router_weight)
  return _keep_chosen(out, expert_bias, token_mask, **inputs)


def _project_and_route_bwd(
  config: types.RouterConfig,
  interpret: Any,
  residuals: _Residuals,
  d_out: kernel.Outputs,
) -> tuple[jax.Array | None, ...]:
  d_logits = _gradient_to_logits(config, interpret, residuals, d_out.weights)
  _, pull = jax.vjp(
    lambda x, w: project(x, w, residuals.token_mask),
    residuals.tokens,
    residuals.router_weight,
  )
  return *pull(d_logits), _zero_like(residuals.expert_bias), None


_project_and_route.defvjp(_project_and_route_fwd, _project_and_route_bwd)


def _gradient_to_logits(
  config: types.RouterConfig,
  interpret: Any,
  residuals: _Residuals,
  d_weights: jax.Array,
) -> jax.Array:
  """`[T, E]`: the gradient of `d_weights`, `[T, K]`, by the scatter kernels."""
  token_mask, logits = residuals.token_mask, residuals.logits
  chosen = weights.fill_padding(residuals.chosen, token_mask)
  weigh = (
    weights.weigh_log_scores
    if config.weighs_all_logits
    else weights.weigh_chosen
  )
  _, pull = jax.vjp(lambda x: weigh(x, config, token_mask)[0], chosen)
  (d_chosen,) = pull(d_weights)
  if config.weighs_all_logits:
    return scatter.softmax_gradient(
      logits,
      residuals.expert_idx,
      d_chosen,
      multiplier=config.logit_multiplier,
      soft_cap=config.logit_soft_cap,
      interpret=interpret,
    )
  return scatter.scatter(
    residuals.expert_idx,
    d_chosen,
    num_experts=config.num_experts,
    dtype=jnp.float32 if logits is None else logits.dtype,
    interpret=interpret,
  )


def _zero_like(x: jax.Array | None) -> jax.Array | None:
  return None if x is None else jnp.zeros_like(x)
