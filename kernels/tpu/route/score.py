# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Logits to selection scores, and the largest scores of every sublane."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute import types
from jaxroute.kernels import networks
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import layout
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import Scratch

# `reciprocal` was in `pl` before it moved to `pltpu`.
_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal

_LANES, _SUBLANES = device.LANES, device.SUBLANES
# The inverse of this is a normal float.
_LARGE = np.float32(2.0**125)
_MINUS_LOG2_E = np.float32(-np.log2(np.e))
_NEG_INF = np.float32(-np.inf)


def score_column(
  plan: Plan, column: int, logits_ref: Ref, scratch: Scratch
) -> None:
  """Computes the selection scores of 128 tokens, and every sublane's largest.

  Reads `bias`. Writes `expert_logits` and, of this column, `logits`,
  `selection_scores`, `lists`, `row_max` and `inverse_row_sum`.

  Args:
    plan: the static shape of the call.
    column: of the block, 0 to 7.
    logits_ref: `[E, block_tokens]` if `plan.experts_first`, or else transposed.
    scratch: buffers.
  """
  expert_logits = scratch.expert_logits.at[column % 2]
  _store_logits(plan, column, logits_ref, expert_logits)
  prepared = functools.partial(_load_prepared, plan, expert_logits)
  statistics = ()
  if plan.config.needs_row_softmax:
    statistics = _softmax_statistics(plan, prepared)
    row_max, inverse_row_sum = statistics
    scratch.row_max[pl.ds(column, 1), :] = row_max
    scratch.inverse_row_sum[pl.ds(column, 1), :] = inverse_row_sum

  def selection_scores(register: int) -> jax.Array:
    logits = prepared(register)
    experts = pl.ds(register * _SUBLANES, _SUBLANES)
    scratch.logits[column, experts, :] = layout.load_experts(
      plan, expert_logits, register
    )
    if plan.config.selects_on_logits:
      scores = logits
    else:
      scores = apply_score_fn(plan, logits, *statistics)
    bias = None
    if plan.has_bias:
      bias = layout.load_experts(plan, scratch.bias, register)
    selection = add_bias(plan, logits, scores, bias)
    scratch.selection_scores[column, experts, :] = selection
    return selection

  list_register = 0
  for segment in range(plan.segments_per_sublane):
    first = segment * plan.experts_per_segment
    registers = range(first, first + plan.experts_per_segment)
    values = [selection_scores(register) for register in registers]
    lists = networks.best(values, plan.list_length, plan.network_levels)
    for value in itertools.chain.from_iterable(lists):
      rows = layout.column_slice(plan, list_register, column)
      scratch.lists[rows, :] = value
      list_register += 1


def _store_logits(
  plan: Plan, column: int, logits_ref: Ref, expert_logits: Ref
) -> None:
  """Writes the logits of a column to a buffer by expert."""
  tokens = pl.ds(column * _LANES, _LANES)
  if plan.experts_first:
    tile = logits_ref[:, tokens].astype(jnp.float32)
    layout.store_experts(plan, expert_logits, 0, tile)
    return
  for first in range(0, plan.num_experts, _LANES):
    # [tokens, experts] -> [experts, tokens].
    tile = logits_ref[tokens, first : first + _LANES].astype(jnp.float32)
    layout.store_experts(plan, expert_logits, first, tile.T)


def _load_prepared(plan: Plan, expert_logits: Ref, register: int) -> jax.Array:
  """Reads the logits of 8 experts and prepares them; -inf past expert E."""
  logits = prepare(plan, layout.load_experts(plan, expert_logits, register))
  last_expert = (_SUBLANES - 1) * plan.experts_per_sublane + register
  if last_expert < plan.num_experts:
    return logits
  expert = layout.sublane_index() * plan.experts_per_sublane + register
  return jnp.where(expert < plan.num_experts, logits, _NEG_INF)


def prepare(plan: Plan, logits: jax.Array) -> jax.Array:
  """Applies multiplier and soft cap; -inf stays -inf.

  Args:
    plan: the static shape of the call.
    logits: float32 of any shape.

  Returns:
    float32 of that shape.
  """
  config = plan.config
  if config.logit_multiplier != 1.0:
    logits = logits * np.float32(config.logit_multiplier)
  if config.logit_soft_cap is not None:
    cap = np.float32(config.logit_soft_cap)
    capped = cap * jnp.tanh(logits / cap)
    logits = jnp.where(logits == _NEG_INF, _NEG_INF, capped)
  return logits


def apply_score_fn(
  plan: Plan,
  logits: jax.Array,
  row_max: jax.Array | float = 0.0,
  inverse_row_sum: jax.Array | float = 1.0,
) -> jax.Array:
  """Computes scores from logits.

  Args:
    plan: the static shape of the call.
    logits: float32 of any shape, prepared.
    row_max: largest logit of the token, for a softmax.
    inverse_row_sum: 1 over the sum of its exponentials, for a softmax.

  Returns:
    float32 of the shape of `logits`.
  """
  if plan.config.score_fn == "sigmoid":
    scores = _sigmoid(plan, logits)
  elif plan.config.score_fn == "softmax":
    scores = jnp.exp(logits - row_max) * inverse_row_sum
  else:
    # sqrt(softplus(x)).
    above = jnp.sqrt(
      jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    )
    start = types.SCORE_TAILS["sqrtsoftplus"][0]
    scores = jnp.where(logits < start, jnp.exp(logits / 2), above)
  return layout.pin(plan, scores)


def _sigmoid(plan: Plan, logits: jax.Array) -> jax.Array:
  if not plan.divides_in_software:
    return jax.nn.sigmoid(logits)
  # One Newton step, without the special cases of a division, of which only
  # infinity can come up.
  divisor = jnp.minimum(1.0 + jnp.exp2(logits * _MINUS_LOG2_E), _LARGE)
  inverse = _reciprocal(divisor, approx=True)
  return inverse + inverse * (1.0 - divisor * inverse)


def add_bias(
  plan: Plan, logits: jax.Array, scores: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Computes selection scores: never NaN, -inf where the logit is -inf or NaN.

  Args:
    plan: the static shape of the call.
    logits: float32 of any shape, prepared.
    scores: what the bias is added to: scores or, again, logits.
    bias: float32, or None.

  Returns:
    float32 of that shape.
  """
  selection = scores if bias is None else scores + bias
  if plan.config.selects_on_logits:
    valid = selection > _NEG_INF
  else:
    valid = logits > _NEG_INF
    if plan.config.score_fn != "sigmoid":
      valid = valid & (selection > _NEG_INF)
  return layout.pin(plan, jnp.where(valid, selection, _NEG_INF))


def _softmax_statistics(
  plan: Plan, prepared: Callable[[int], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Computes each token's maximum and 1 / sum over logits not NaN, [1, 128]."""
  registers = [prepared(r) for r in range(plan.experts_per_sublane)]
  registers = [jnp.where(x > _NEG_INF, x, _NEG_INF) for x in registers]
  # [8, 128] of the experts of a sublane -> [1, 128] of all.
  row_max = functools.reduce(jnp.maximum, registers)
  row_max = jnp.max(row_max, axis=0, keepdims=True)
  row_max = jnp.where(row_max == _NEG_INF, 0.0, row_max)
  row_sum = functools.reduce(jnp.add, [jnp.exp(x - row_max) for x in registers])
  row_sum = jnp.sum(row_sum, axis=0, keepdims=True)
  return row_max, 1.0 / jnp.where(row_sum == 0.0, 1.0, row_sum)
