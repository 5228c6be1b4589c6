# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""From logits to scores, and to the selection scores that experts are chosen by.

The bias is added for selection only. An expert whose logit is -inf is masked:
its selection score is -inf whatever its bias, so it is chosen only when nothing
else is left. A NaN logit gets a NaN score and the same selection score, -inf.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute import types


def prepare_logits(logits: jax.Array, config: types.RouterConfig) -> jax.Array:
  """The logits as the score function sees them: float32, scaled, capped.

  Args:
    logits: `[T, E]` floating point. Router projection output.
    config: static router description.

  Returns:
    `[T, E]` float32, `cap * tanh(multiplier * logits / cap)`.
  """
  logits = logits.astype(jnp.float32)
  if config.logit_multiplier != 1.0:
    logits = logits * config.logit_multiplier
  if config.logit_soft_cap is not None:
    cap = config.logit_soft_cap
    # tanh would turn the -inf of a masked expert into -cap.
    capped = cap * jnp.tanh(logits / cap)
    logits = jnp.where(logits == -jnp.inf, -jnp.inf, capped)
  return logits


def apply_score_fn(logits: jax.Array, score_fn: types.ScoreFn) -> jax.Array:
  """Applies a score function over the last axis, NaN for NaN and 0 for -inf.

  A NaN logit does not reach the scores of its neighbours, also under softmax.

  Args:
    logits: `[..., E]` float32, from `prepare_logits`.
    score_fn: "softmax", "sigmoid" or "sqrtsoftplus".

  Returns:
    `[..., E]` float32. A softmax over -inf alone is all zeros.
  """
  if score_fn == "sigmoid":
    return jax.nn.sigmoid(logits)
  if score_fn == "sqrtsoftplus":
    return _sqrt_softplus(logits)
  is_nan = jnp.isnan(logits)
  softmax = _softmax(jnp.where(is_nan, -jnp.inf, logits))
  return jnp.where(is_nan, jax.lax.stop_gradient(logits), softmax)


def scores(logits: jax.Array, config: types.RouterConfig) -> jax.Array:
  """Scores of all experts, without the bias; what weights and losses use.

  Args:
    logits: `[T, E]` floating point. Router projection output.
    config: static router description.

  Returns:
    `[T, E]` float32.

  Example:
    >>> config = types.RouterConfig(num_experts=2, top_k=1)
    >>> scores(jnp.zeros((1, 2)), config)
    Array([[0.5, 0.5]], dtype=float32)
  """
  return apply_score_fn(prepare_logits(logits, config), config.score_fn)


class Terms(NamedTuple):
  """Scores as `factor * exp(exponent) / divisor`.

  A score may be too small for float32, and these parts are not.

  Attributes:
    exponent: `[T, K]` float32; -inf for a logit of -inf.
    factor: `[T, K]` float32. It or the exponent is NaN for a NaN logit.
    divisor: `[T, 1]` float32.
  """

  exponent: jax.Array
  factor: jax.Array
  divisor: jax.Array


def terms(logits: jax.Array, score_fn: types.ScoreFn) -> Terms:
  """The scores of `apply_score_fn`, in parts.

  Args:
    logits: `[T, K]` float32, from `prepare_logits`.
    score_fn: "softmax" (over these K), "sigmoid" or "sqrtsoftplus".

  Returns:
    `Terms`.
  """
  if score_fn == "softmax":
    return softmax_terms(logits, logits)
  start, slope = types.SCORE_TAILS[score_fn]
  far = logits < start
  near = apply_score_fn(jnp.where(far, 0.0, logits), score_fn)
  return Terms(
    exponent=jnp.where(far, slope * logits, 0.0),
    factor=jnp.where(far, 1.0, near),
    divisor=jnp.ones_like(logits[:, :1]),
  )


def softmax_terms(chosen: jax.Array, logits: jax.Array) -> Terms:
  """The scores of K experts in a softmax over E, in parts.

  Args:
    chosen: `[T, K]` float32. The logits of the K.
    logits: `[T, E]` float32. The logits of all, from `prepare_logits`.

  Returns:
    `Terms`.
  """
  logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
  peak = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
  peak = jnp.where(peak == -jnp.inf, 0.0, peak)
  total = jnp.sum(jnp.exp(logits - peak), axis=1, keepdims=True)
  exponent = chosen - peak
  return Terms(
    exponent=exponent,
    factor=1.0 + _rounded_off(chosen, peak),
    divisor=jnp.where(total == 0.0, 1.0, total),
  )


def weights(terms: Terms, config: types.RouterConfig) -> jax.Array:
  """The scores or, if the config says so, their shares of the sum + `norm_eps`.

  Scores of any size have finite shares with finite gradients: all exponents are
  taken relative to the largest, or to that of `norm_eps`.

  Args:
    terms: of `[T, K]` scores.
    config: static router description.

  Returns:
    `[T, K]` float32, without the scaling factor.
  """
  if not config.normalize_weights:
    return terms.factor * jnp.exp(terms.exponent) / terms.divisor
  eps_factor, eps_exponent = config.split_norm_eps
  shift = jnp.max(terms.exponent, axis=1, keepdims=True)
  shift = jax.lax.stop_gradient(jnp.maximum(shift, eps_exponent))
  shares = terms.factor * jnp.exp(terms.exponent - shift)
  total = jnp.sum(shares, axis=1, keepdims=True)
  if config.norm_eps:
    eps = eps_factor * jnp.exp(eps_exponent - shift)
    return shares / (total + eps * terms.divisor)
  return shares / jnp.where(total == 0.0, 1.0, total)


def selection_scores(
  logits: jax.Array, expert_bias: jax.Array | None, config: types.RouterConfig
) -> jax.Array:
  """What experts are compared by: scores (or logits) plus the bias.

  Args:
    logits: `[T, E]` floating point. Router projection output.
    expert_bias: `[E]` float32, or None for no bias.
    config: static router description.

  Returns:
    `[T, E]` float32 without NaN: -inf where the logit is -inf or the sum is
    NaN. Group limits are not applied. No gradient passes.
  """
  logits = jax.lax.stop_gradient(prepare_logits(logits, config))
  if config.selects_on_logits:
    selection = logits
  else:
    selection = apply_score_fn(logits, config.score_fn)
  if expert_bias is not None:
    selection = selection + jax.lax.stop_gradient(expert_bias)[None]
  masked = (logits == -jnp.inf) | jnp.isnan(selection)
  return jnp.where(masked, -jnp.inf, selection)


def _softmax(x: jax.Array) -> jax.Array:
  peak = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
  e = jnp.exp(x - jnp.where(peak == -jnp.inf, 0.0, peak))
  total = jnp.sum(e, axis=-1, keepdims=True)
  return e / jnp.where(total == 0.0, 1.0, total)


def _rounded_off(x: jax.Array, y: jax.Array) -> jax.Array:
  """What the rounding of `x - y` took off: exact; 0 if the difference is -inf."""
  x, y = jax.lax.stop_gradient((x, y))
  x = jnp.where(x - y > -jnp.inf, x, y)
  difference = x - y
  y_taken = difference - x
  return (x - (difference - y_taken)) - (y + y_taken)


def _sqrt_softplus(x: jax.Array) -> jax.Array:
  # The slope of a square root is infinite where softplus underflows; that of
  # exp(x / 2) is not.
  start, _ = types.SCORE_TAILS["sqrtsoftplus"]
  far = x < start
  near = jnp.sqrt(jax.nn.softplus(jnp.where(far, 0.0, x)))
  # exp must not overflow where it is not taken: the backward pass has 0 * inf
  # then.
  return jnp.where(far, jnp.exp(jnp.where(far, x, start) / 2), near)
