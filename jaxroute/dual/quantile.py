# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Quantile balancing: the bias that is best while the cutoffs stay, no step size.

Where the tokens' cutoffs stay, the dual function of one expert's bias has its
minimum at the quantile of `cutoff - score` with T K / E tokens below it. A step of
this rule goes there, for all experts at once.
"""

import math

import jax
import jax.numpy as jnp
import optax

from jaxroute import metrics, routing, types
from jaxroute.routing import bias_histogram, float_keys


def quantile(ema: float = 0.0) -> optax.GradientTransformationExtraArgs:
  """Quantile balancing, from histograms that add up over devices.

  `bias = ema * bias + (1 - ema) * (found - mean(found))`, where `found[e]` is the
  price of the token of rank `floor(T K / E) + 1`, as near as a histogram tells. It
  tells the sign of `found - bias` for sure and the size within a factor of 8 (where
  both are below 2^-16, a difference below 2^-15); between the edges of a bin it
  takes prices for evenly spread, which is mostly much closer, and the next step
  sees the rest through finer bins. Steps end at 32.

  An expert that fewer tokens can choose (the others' logits are -inf, or group
  limits exclude it) goes to the largest price of those; one that none can choose,
  or a batch without a token, stays.

  Args:
    ema: share of the bias that stays, in `[0, 1)`.

  Returns:
    A rule for a `RouterState` with histograms. It does not look at the violation.

  Raises:
    ValueError: if `ema` is out of range; in `update`, without a histogram.

  Example:
    >>> from jaxroute import route, types
    >>> config = types.RouterConfig(num_experts=2, top_k=1, histogram=True)
    >>> routing = route(jnp.array([[2.0, -2.0], [1.0, -0.5]]), None, config)
    >>> rule, bias = quantile(), jnp.zeros(2)
    >>> updates, _ = rule.update(
    ...   bias, rule.init(bias), bias,
    ...   load=routing.load, histogram=routing.counts.histogram)
    >>> [round(float(u), 3) for u in updates]
    [-0.141, 0.141]

  References:
    Su, 2026, https://kexue.fm/archives/11619.
    Kimi K3, https://arxiv.org/abs/2607.24653, which bins prices evenly.
  """
  if not 0 <= ema < 1:
    raise ValueError(f"`ema` must be in [0, 1), got {ema}.")

  def init(params):
    del params
    return optax.EmptyState()

  def update(
    updates, state, params=None, *, load=None, histogram=None, **extra
  ):
    del updates, extra
    if histogram is None or params is None:
      raise ValueError(
        "`dual.quantile` needs a histogram, got None. Set `histogram=True` in"
        " the `RouterConfig` and in `init_router_state`, and call"
        " `jaxroute.update`."
      )

    def increment(bias, load, histogram):
      found = bias + _step(load, histogram)
      found = found - jnp.mean(found, axis=-1, keepdims=True)
      counted = jnp.any(load > 0, axis=-1, keepdims=True)
      return jnp.where(counted, (1.0 - ema) * (found - bias), 0.0)

    return jax.tree.map(increment, params, load, histogram), state

  return optax.GradientTransformationExtraArgs(init, update)


def quantile_bias(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """A step of quantile balancing from the scores themselves, on one device.

  It sees the batch: to route the same batch with the result leaks later tokens
  into the routes of earlier ones. For training there is `quantile`.

  Args:
    scores: `[T, E]` float32, no bias; -inf forbids an expert. Where the bias is
      added to logits, pass those.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    `[E]` float32 of mean 0: `found - mean(found)`, where `found[e]` is the
    `floor(T K / E) + 1`-th smallest of `cutoff - scores[:, e]`. An expert is left
    where it is, or taken to the largest of these, as by `quantile`.

  Raises:
    ValueError: if a shape or dtype does not fit.

  References:
    Su, 2026, https://kexue.fm/archives/11619.
  """
  config = types.RouterConfig.on_scores(scores.shape[-1], top_k)
  routes = routing.route(scores, expert_bias, config, token_mask)
  found = quantile_prices(scores, expert_bias, routes)
  return found - jnp.mean(found)


def quantile_prices(
  scores: jax.Array,
  expert_bias: jax.Array,
  routes: types.Routing,
  lowest_cutoff: float = -math.inf,
) -> jax.Array:
  """The prices of rank `floor(T K / E) + 1` that `quantile_bias` centres.

  Args:
    scores: `[T, E]` float32.
    expert_bias: `[E]` float32.
    routes: of these scores and this bias.
    lowest_cutoff: smaller cutoffs count as this one.

  Returns:
    `[E]` float32; `expert_bias` where there is no finite price.
  """
  counted = routes.token_mask[:, None] & (scores > -jnp.inf)
  cutoff = jnp.maximum(routes.cutoff, lowest_cutoff)
  price = jnp.where(counted, cutoff[:, None] - scores, jnp.inf)
  mean, _ = metrics.mean_load(routes.load)
  rank = jnp.minimum(mean, jnp.sum(price < jnp.inf, axis=0) - 1)
  found = order_statistic(price, rank)
  # -inf: chosen whatever the bias.
  return jnp.where(jnp.isfinite(found) & (rank >= 0), found, expert_bias)


def order_statistic(x: jax.Array, rank: jax.Array) -> jax.Array:
  """The element of a rank in every column, without sorting.

  Args:
    x: `[T, E]` float32, not NaN.
    rank: `[E]` int32 from 0; the smallest element has rank 0.

  Returns:
    `[E]` float32.
  """
  keys = float_keys.to_keys(x)

  def add_bit(i, low):
    # From the lowest int32 up: the first bit is the sign's, so it wraps to 0.
    candidate = low + jnp.left_shift(jnp.int32(1), 31 - i)
    below = jnp.sum((keys < candidate[None]).astype(jnp.int32), axis=0)
    return jnp.where(below <= rank, candidate, low)

  lowest = jnp.full(x.shape[1:], jnp.iinfo(jnp.int32).min)
  found = jax.lax.fori_loop(0, 32, add_bit, lowest)
  return float_keys.from_keys(found)


def _step(load, histogram):
  """`[..., E]` float32: the distance of rank T K / E, read off a histogram."""
  up_to = jnp.cumsum(histogram, axis=-1)
  counted = up_to[..., -1]
  mean, _ = metrics.mean_load(load)
  rank = jnp.minimum(mean, counted - 1)
  found = jnp.sum(up_to <= rank[..., None], axis=-1)
  found = jnp.minimum(found, bias_histogram.BINS - 1)

  def at_found(x):
    return jnp.take_along_axis(x, found[..., None], axis=-1)[..., 0]

  within = at_found(histogram)
  before = (rank - (at_found(up_to) - within)).astype(jnp.float32)
  share = (before + 0.5) / jnp.maximum(within, 1).astype(jnp.float32)
  low, high = (
    jnp.asarray(edges)[found]
    for edges in (bias_histogram.EDGES[:-1], bias_histogram.EDGES[1:])
  )
  return jnp.where(counted > 0, low + share * (high - low), 0.0)
