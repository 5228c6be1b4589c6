# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""From the logits of all experts and the choice of K to the routing weights.

The XLA implementation weighs by these functions, and every kernel's gradient is
their gradient.
"""

import jax
import jax.numpy as jnp

from jaxroute import remat, types
from jaxroute import scores as scores_lib


def weigh(
  logits: jax.Array,
  expert_idx: jax.Array,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Weights of the chosen experts, and which tokens count.

  Args:
    logits: `[T, E]` floating point.
    expert_idx: `[T, K]` int32. The chosen experts.
    config: static router description.
    token_mask: `[T]` bool, or None.

  Returns:
    `[T, K]` float32 weights, 0 for padding and NaN for tokens with a NaN among
    their chosen logits; and `token_mask`, False for those tokens too.
  """

  def choose(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, expert_idx, axis=1, mode="promise_in_bounds")

  if not config.weighs_all_logits:
    chosen = remat.checkpoint_name("chosen_logits", choose(logits))
    return weigh_chosen(fill_padding(chosen, token_mask), config, token_mask)
  logits = fill_padding(logits, token_mask)
  logits = scores_lib.prepare_logits(logits, config)
  terms = scores_lib.softmax_terms(choose(logits), logits)
  return _weigh_terms(terms, config, token_mask)


def weigh_chosen(
  chosen: jax.Array, config: types.RouterConfig, token_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """As `weigh`, from the logits of the chosen experts alone.

  Args:
    chosen: `[T, K]` floating point, after `fill_padding`.
    config: static; its weights do not depend on the logits of all experts.
    token_mask: `[T]` bool, or None.

  Returns:
    What `weigh` does.
  """
  chosen = scores_lib.prepare_logits(chosen, config)
  terms = scores_lib.terms(chosen, config.score_fn)
  return _weigh_terms(terms, config, token_mask)


def weigh_log_scores(
  log_scores: jax.Array,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """As `weigh`, from the logarithms of the chosen experts' scores.

  Args:
    log_scores: `[T, K]` float32, of logits after `fill_padding`.
    config: static router description.
    token_mask: `[T]` bool, or None.

  Returns:
    What `weigh` does.
  """
  ones = jnp.ones_like(log_scores)
  terms = scores_lib.Terms(log_scores, factor=ones, divisor=ones[:, :1])
  return _weigh_terms(terms, config, token_mask)


def _weigh_terms(
  terms: scores_lib.Terms,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """As `weigh`, from the scores of the chosen experts."""
  weights = scores_lib.weights(terms, config) * config.scaling_factor
  is_nan = jnp.any(jnp.isnan(weights), axis=1)
  if token_mask is None:
    token_mask = jnp.ones_like(is_nan)
  # One NaN spreads to all weights of its token.
  spread = jax.lax.stop_gradient(jnp.sum(weights, axis=1, keepdims=True))
  weights = jnp.where(is_nan[:, None], spread, weights)
  weights = jnp.where(token_mask[:, None], weights, 0.0)
  return weights, token_mask & ~is_nan


def fill_padding(x: jax.Array, token_mask: jax.Array | None) -> jax.Array:
  """Replaces the logits of padding by 1, before they are weighed.

  A NaN in padding would get the gradient 0 * NaN.

  Args:
    x: `[T, ...]` floating point.
    token_mask: `[T]` bool, or None.

  Returns:
    An array like `x`.
  """
  return x if token_mask is None else jnp.where(token_mask[:, None], x, 1.0)
