# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Quantile balancing: at the current cutoffs each bias goes to its best value.

While the tokens' cutoffs are held, token i needs a bias of
`cutoff[i] - score[i, e]` to choose expert e, and the dual function of that bias
alone has its minimum at the quantile of the needed ones with T K / E tokens
below it. A step of this rule goes there, for all experts at once. It has no
step size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks, metrics, routing, types
from jaxroute.routing import bias_histogram, float_keys


def quantile(ema: float = 0.0) -> optax.GradientTransformationExtraArgs:
  """Quantile balancing, from histograms that add up over devices.

  `bias = ema * bias + (1 - ema) * (target - mean(target))`, where `target[e]`
  is the `floor(T K / E) + 1`-th smallest bias that a token needs to choose
  expert e, as near as a histogram tells. The histogram determines the sign of
  `target - bias` exactly and its size within a factor of 8 (if the size is
  below 2^-16, to 2^-15). Within a bin the needed biases are taken to be evenly
  spread, which is mostly much closer, and the next step sees the rest through
  finer bins. No step is larger than 32.

  An expert that fewer tokens can choose (the others' logits are -inf, or group
  limits exclude it) goes to the largest bias that one of them needs. An expert
  that no token can choose stays, and so do all in a batch without a token.

  Args:
    ema: share of the bias that stays, in `[0, 1)`.

  Returns:
    A rule for a `RouterState` with histograms. It does not look at the
    violation.

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
    Kimi K3, https://arxiv.org/abs/2607.24653, with bins of equal width.
  """
  fix = "It is the share of the bias that stays."
  ema = checks.as_float("ema", ema, "[0, 1)", fix, may_be_traced=True)

  def init(params: optax.Params) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    load: types.PyTree = None,
    histogram: types.PyTree = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    del extra_args
    if histogram is None or params is None:
      raise ValueError(
        "`dual.quantile` needs a histogram, got None. Set `histogram=True` in"
        " the `RouterConfig`, and without a Flax layer in"
        " `jaxroute.init_router_state`; call `jaxroute.update`. Not all wrappers of"
        " optax pass it on."
      )

    def increment(bias: Any, load: jax.Array, histogram: jax.Array) -> Any:
      if isinstance(bias, optax.MaskedNode):
        return bias
      target = bias + histogram_quantile(load, histogram)
      target = target - jnp.mean(target, axis=-1, keepdims=True)
      has_tokens = jnp.any(load > 0, axis=-1, keepdims=True)
      return jnp.where(has_tokens, (1.0 - ema) * (target - bias), 0.0)

    # `optax.masked` leaves out biases, but no counts.
    updates = jax.tree.map(
      increment,
      params,
      load,
      histogram,
      is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(init, update)


def quantile_bias(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """The bias after an exact step of quantile balancing, from the scores.

  It sees the batch, on one device: to route the same batch with the result
  leaks later tokens into the routes of earlier ones. For training there is
  `quantile`.

  Args:
    scores: `[T, E]` float32, no bias; -inf forbids an expert. Where the bias is
      added to logits, pass those.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    `[E]` float32 of mean 0: `target - mean(target)`, where `target[e]` is the
    `floor(T K / E) + 1`-th smallest of `cutoff - scores[:, e]`. Experts that
    fewer tokens can choose are treated as by `quantile`.

  Raises:
    ValueError: if a shape or dtype does not fit.

  References:
    Su, 2026, https://kexue.fm/archives/11619.
  """
  config = routing.check_scores(scores, expert_bias, top_k, token_mask)
  scores = scores.astype(jnp.float32)
  routes = routing.route(scores, expert_bias, config, token_mask)
  target = target_bias(scores, expert_bias, routes)
  return target - jnp.mean(target)


def target_bias(
  scores: jax.Array,
  expert_bias: jax.Array,
  routes: types.Routing,
  lowest_cutoff: float = -math.inf,
) -> jax.Array:
  """The `floor(T K / E) + 1`-th smallest needed bias of every expert.

  Args:
    scores: `[T, E]` float32.
    expert_bias: `[E]` float32.
    routes: what `jaxroute.route` chose for these scores and this bias.
    lowest_cutoff: cutoffs below it are raised to it.

  Returns:
    `[E]` float32; `expert_bias` where no token needs a finite one.
  """
  can_choose = routes.token_mask[:, None] & (scores > -jnp.inf)
  cutoff = jnp.maximum(routes.cutoff, lowest_cutoff)
  needed = jnp.where(can_choose, cutoff[:, None] - scores, jnp.inf)
  mean, _ = metrics.mean_load(routes.load)
  num_finite = jnp.sum(needed < jnp.inf, axis=0, dtype=jnp.int32)
  rank = jnp.minimum(mean, num_finite - 1)
  target = order_statistic(needed, rank)
  # A token that needs -inf chooses the expert whatever the bias.
  return jnp.where(jnp.isfinite(target) & (rank >= 0), target, expert_bias)


@jax.jit
def order_statistic(x: jax.Array, rank: jax.Array) -> jax.Array:
  """The element of a rank in every column, without sorting.

  Args:
    x: `[T, E]` float32, not NaN.
    rank: `[E]` int32 from 0; the smallest element has rank 0.

  Returns:
    `[E]` float32.
  """
  keys = float_keys.to_keys(x)

  def add_bit(i: jax.Array, low: jax.Array) -> jax.Array:
    # The search starts at the lowest int32: adding the sign bit wraps it to 0.
    candidate = low + jnp.left_shift(jnp.int32(1), 31 - i)
    num_below = jnp.sum(keys < candidate[None], axis=0, dtype=jnp.int32)
    return jnp.where(num_below <= rank, candidate, low)

  lowest = jnp.full(x.shape[1:], jnp.iinfo(jnp.int32).min)
  key_of_rank = jax.lax.fori_loop(0, 32, add_bit, lowest)
  return float_keys.from_keys(key_of_rank)


def histogram_quantile(load: jax.Array, histogram: jax.Array) -> jax.Array:
  """The distance of rank T K / E of every expert, read off a histogram.

  Args:
    load: `[..., E]` int32. Assignments per expert, summed over all devices.
    histogram: `[..., E, 16]` int32. As in `Counts`.

  Returns:
    `[..., E]` float32; 0 for experts that no token can choose.
  """
  num_up_to = jnp.cumsum(histogram, axis=-1)
  num_tokens = num_up_to[..., -1]
  mean, _ = metrics.mean_load(load)
  rank = jnp.minimum(mean, num_tokens - 1)
  is_up_to = num_up_to <= rank[..., None]
  bin_of_rank = jnp.sum(is_up_to, axis=-1, dtype=jnp.int32)
  bin_of_rank = jnp.minimum(bin_of_rank, bias_histogram.BINS - 1)

  def at_bin(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, bin_of_rank[..., None], axis=-1)[..., 0]

  num_in_bin = at_bin(histogram)
  num_before = rank - (at_bin(num_up_to) - num_in_bin)
  # The n tokens of a bin are taken to lie in the middles of n equal parts of
  # it.
  share = num_before.astype(jnp.float32) + 0.5
  share /= jnp.maximum(num_in_bin, 1).astype(jnp.float32)
  low = jnp.asarray(bias_histogram.EDGES[:-1])[bin_of_rank]
  high = jnp.asarray(bias_histogram.EDGES[1:])[bin_of_rank]
  return jnp.where(num_tokens > 0, low + share * (high - low), 0.0)
