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

  if not config.needs_row_softmax:
    chosen = remat.checkpoint_name("chosen_logits", choose(logits))
    return weigh_chosen(fill_padding(chosen, token_mask), config, token_mask)
  logits = fill_padding(logits, token_mask)
  scores = choose(scores_lib.scores(logits, config))
  return weigh_scores(scores, config, token_mask)


def weigh_chosen(
  chosen: jax.Array, config: types.RouterConfig, token_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """As `weigh`, from the logits of the chosen experts alone.

  Args:
    chosen: `[T, K]` floating point, after `fill_padding`.
    config: static; its scores do not depend on the logits of all experts.
    token_mask: `[T]` bool, or None.

  Returns:
    What `weigh` does.
  """
  return weigh_scores(scores_lib.scores(chosen, config), config, token_mask)


def weigh_scores(
  scores: jax.Array, config: types.RouterConfig, token_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """As `weigh`, from the scores of the chosen experts.

  Args:
    scores: `[T, K]` float32, of logits after `fill_padding`.
    config: static router description.
    token_mask: `[T]` bool, or None.

  Returns:
    What `weigh` does.
  """
  weights = scores
  if config.normalize_weights:
    # The backward pass squares the divisor, and the square of a `norm_eps` of
    # 1e-20 would be zero. A power of two scales it exactly.
    weights = weights * 2.0**40
    total = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / (total + config.norm_eps * 2.0**40)
  weights = weights * config.scaling_factor
  is_nan = jnp.any(jnp.isnan(weights), axis=1)
  if token_mask is None:
    token_mask = jnp.ones_like(is_nan)
  weights = jnp.where(is_nan[:, None], jnp.nan, weights)
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
