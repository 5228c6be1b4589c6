# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The chosen experts: their logits, order and weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels import networks
from jaxroute.kernels.tpu import device, registers
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import bits, layout, score
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import OutputRefs, Scratch

_LANES, _SUBLANES = device.LANES, device.SUBLANES
_NEG_INF = np.float32(-np.inf)
_NAN = np.float32(np.nan)


def gather_column(plan: Plan, column: int, scratch: Scratch) -> None:
  """Gathers the logits of the experts that 128 tokens have chosen.

  Reads `expert_idx` and `logits`. Writes `chosen_logits`.

  Args:
    plan: the static shape of the call.
    column: of the block, 0 to 7.
    scratch: buffers.
  """

  def load_logits(register: int) -> jax.Array:
    experts = pl.ds(register * _SUBLANES, _SUBLANES)
    return scratch.logits[column, experts, :]

  for first in range(0, plan.padded_top_k, _SUBLANES):
    expert = layout.load_column(plan, scratch.expert_idx, first, column)
    sublane = layout.divide(expert, plan.experts_per_sublane)
    register = expert - sublane * np.int32(plan.experts_per_sublane)
    chosen_logits = registers.select_register(
      load_logits, register, sublane, plan.experts_per_sublane
    )
    rows = layout.column_slice(plan, first // _SUBLANES, column)
    scratch.chosen_logits[rows, :] = chosen_logits


@dataclasses.dataclass
class _Chosen:
  """The chosen experts of a block: lists of K arrays `[columns, 128]`.

  Attributes:
    selection: float32 selection scores.
    expert_idx: int32.
    logits: float32, prepared.
    scores: float32; logits, where scores are a softmax of the chosen ones.
    weighed: float32, what the weights are made from for a gradient: logits as
      they came, or log scores if weights depend on the logits of all experts.
  """

  selection: list[jax.Array]
  expert_idx: list[jax.Array]
  logits: list[jax.Array]
  scores: list[jax.Array]
  weighed: list[jax.Array]


def weigh(
  plan: Plan,
  block: int | jax.Array,
  expert_idx: list[jax.Array],
  kept: list[jax.Array] | None,
  mask_ref: Ref,
  scratch: Scratch,
) -> None:
  """Weighs the chosen experts, sorts them by score, finds tokens that count.

  Reads `chosen_logits`, `bias_row`, `row_max`, `inverse_row_sum`. Writes
  `expert_idx`, `weights`, `chosen` and `valid`.

  Args:
    plan: the static shape of the call.
    block: number of the block of tokens.
    expert_idx: from `select.extract_chosen`.
    kept: from `select.threshold`.
    mask_ref: `[columns, 128]` int32, 0 for padding; None if there is none.
    scratch: buffers.
  """
  chosen = _score_chosen(plan, expert_idx, kept, scratch)
  weights = _weigh_chosen(plan, chosen, scratch)
  _sort_chosen(plan, chosen, weights)
  weights = _mask_tokens(plan, block, weights, mask_ref, scratch)
  for k in range(plan.config.top_k):
    rows = layout.dense_slice(plan, k)
    scratch.expert_idx[rows, :] = chosen.expert_idx[k]
    scratch.weights[rows, :] = weights[k]
    if plan.with_chosen:
      scratch.chosen[rows, :] = chosen.weighed[k]


def _score_chosen(
  plan: Plan,
  expert_idx: list[jax.Array],
  kept: list[jax.Array] | None,
  scratch: Scratch,
) -> _Chosen:
  """Computes the scores of the chosen experts again, from their logits."""
  config = plan.config
  chosen = _Chosen([], list(expert_idx), [], [], [])
  for k, expert in enumerate(expert_idx):
    raw = layout.load_dense(plan, scratch.chosen_logits, *divmod(k, _SUBLANES))
    logits = score.prepare(plan, raw)
    weighed = raw
    if config.needs_row_softmax:
      row_max, inverse = scratch.row_max[...], scratch.inverse_row_sum[...]
      scores = score.apply_score_fn(plan, logits, row_max, inverse)
      if config.weighs_all_logits and plan.with_chosen:
        weighed = (logits - row_max) + jnp.log(inverse)
    elif config.score_fn == "softmax":
      scores = logits  # `_weigh_chosen` takes the softmax of the chosen ones.
    else:
      scores = score.apply_score_fn(plan, logits)
    bias = _look_up_bias(plan, expert, scratch) if plan.has_bias else None
    biased = logits if config.selects_on_logits else scores
    selection = score.add_bias(plan, logits, biased, bias)
    if kept is not None:
      is_kept = _in_kept_group(plan, expert, kept)
      selection = jnp.where(is_kept, selection, _NEG_INF)
    chosen.selection.append(selection)
    chosen.logits.append(logits)
    chosen.scores.append(scores)
    chosen.weighed.append(weighed)
  return chosen


def _look_up_bias(
  plan: Plan, expert_idx: jax.Array, scratch: Scratch
) -> jax.Array:
  """Gathers the bias of experts, [columns, 128], from 128 lanes at a time."""
  # A gather from one row is not the kind that Mosaic takes, so there are two.
  wide_idx = jnp.broadcast_to(expert_idx, (max(2, plan.columns), _LANES))
  bias = jnp.zeros(wide_idx.shape, jnp.float32)
  for first in range(0, plan.num_experts, _LANES):
    row = scratch.bias_row[:, first : first + _LANES]
    candidate = jnp.take_along_axis(
      jnp.broadcast_to(row, wide_idx.shape),
      wide_idx & (_LANES - 1),
      axis=1,
      mode="promise_in_bounds",
    )
    if first:
      candidate = jnp.where(wide_idx >= first, candidate, bias)
    bias = candidate
  return bias[: plan.columns]


def _in_kept_group(
  plan: Plan, expert_idx: jax.Array, kept: list[jax.Array]
) -> jax.Array:
  """Tells whether experts are in a group that their token may use."""
  group = layout.divide(expert_idx, plan.config.group_size)
  # One bit for each group, of which there are 32 at most.
  kept_bits = bits.union(
    [jnp.where(keep, bits.bit(g), np.int32(0)) for g, keep in enumerate(kept)]
  )
  return lax.shift_right_logical(kept_bits, group) & 1 != 0


def _sort_chosen(plan: Plan, chosen: _Chosen, weights: list[jax.Array]) -> None:
  """Sorts what is known of the chosen: best first, the lowest index on ties."""
  lists = [chosen.selection, chosen.expert_idx, weights]
  if plan.with_chosen:
    lists.append(chosen.weighed)
  selection, expert_idx = chosen.selection, chosen.expert_idx
  for i, j in networks.exchanges(plan.config.top_k):
    is_tie_unsorted = (selection[i] == selection[j]) & (
      expert_idx[i] > expert_idx[j]
    )
    swap = (selection[i] < selection[j]) | is_tie_unsorted
    for x in lists:
      x[i], x[j] = jnp.where(swap, x[j], x[i]), jnp.where(swap, x[i], x[j])


def _weigh_chosen(
  plan: Plan, chosen: _Chosen, scratch: Scratch
) -> list[jax.Array]:
  """Computes weights of scores of any size, as `jaxroute.scores.weights` does."""
  config = plan.config
  if config.score_fn == "softmax" and not config.weighs_all_logits:
    return _softmax_weights(plan, chosen.logits)
  exponents, factors = _terms(plan, chosen, scratch)
  eps_factor, eps_exponent = map(np.float32, config.split_norm_eps)
  shift = 0.0
  if config.normalize_weights:
    shift = functools.reduce(jnp.maximum, exponents, eps_exponent)
  shares = [
    factor * jnp.exp(exponent - shift)
    for exponent, factor in zip(exponents, factors, strict=True)
  ]
  scaling = np.float32(config.scaling_factor)
  if config.normalize_weights:
    total = functools.reduce(jnp.add, shares)
    if config.norm_eps:
      total += eps_factor * jnp.exp(eps_exponent - shift)
    else:
      total = jnp.where(total == 0.0, 1.0, total)
    scaling = scaling / total
  return [x * scaling for x in shares]


def _terms(
  plan: Plan, chosen: _Chosen, scratch: Scratch
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Computes exponents and factors: a score is `factor * exp(exponent)`."""
  if plan.config.weighs_all_logits:
    row_max, inverse = scratch.row_max[...], scratch.inverse_row_sum[...]
    return (
      [x - row_max for x in chosen.logits],
      [(1.0 + _rounded_off(x, row_max)) * inverse for x in chosen.logits],
    )
  start, slope = map(np.float32, types.SCORE_TAILS[plan.config.score_fn])
  return (
    [jnp.where(x < start, x * slope, 0.0) for x in chosen.logits],
    [
      jnp.where(x < start, 1.0, near)
      for x, near in zip(chosen.logits, chosen.scores, strict=True)
    ],
  )


def _softmax_weights(plan: Plan, logits: list[jax.Array]) -> list[jax.Array]:
  """Computes weights that are a softmax of the chosen logits."""
  config = plan.config
  peak = functools.reduce(jnp.maximum, logits)
  peak = jnp.where(peak == _NEG_INF, 0.0, peak)
  shares = [jnp.exp(x - peak) for x in logits]
  total = functools.reduce(jnp.add, shares)
  total = jnp.where(total == 0.0, 1.0, total)
  scaling = config.scaling_factor
  if config.normalize_weights:
    scaling = scaling / (1.0 + config.norm_eps)
  factor = np.float32(scaling) / total
  return [x * factor for x in shares]


def _rounded_off(x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes what the rounding of `x - y` took off; 0 if that is -inf."""
  difference = x - y
  y_taken = difference - x
  lost = (x - (difference - y_taken)) - (y + y_taken)
  return jnp.where(difference > _NEG_INF, lost, 0.0)


def _mask_tokens(
  plan: Plan,
  block: int | jax.Array,
  weights: list[jax.Array],
  mask_ref: Ref,
  scratch: Scratch,
) -> list[jax.Array]:
  """Writes `valid`; returns weights, NaN if one is NaN, 0 for padding."""
  has_nan = jnp.isnan(functools.reduce(jnp.add, weights))
  valid = jnp.where(has_nan, 0, -1).astype(jnp.int32)
  weights = [jnp.where(has_nan, _NAN, weight) for weight in weights]
  if plan.has_mask:
    is_token = mask_ref[...] != 0
    valid = jnp.where(is_token, valid, 0)
    weights = [jnp.where(is_token, weight, 0.0) for weight in weights]
  if plan.tokens % plan.step_tokens:
    # The last block may end past the last token.
    shape = (plan.columns, _LANES)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) * _LANES
    token += lax.broadcasted_iota(jnp.int32, shape, 1) + (
      block * plan.block_tokens
    )
    valid = jnp.where(token < plan.tokens, valid, 0)
  scratch.valid[...] = valid
  return weights


def write_column(
  plan: Plan, column: int, scratch: Scratch, outputs: OutputRefs
) -> None:
  """Writes the results of the tokens of a column, experts by tokens.

  Reads `expert_idx`, `weights`, `chosen` and `cutoff`. Writes the outputs of
  these names.

  Args:
    plan: the static shape of the call.
    column: of the block, 0 to 7.
    scratch: buffers.
    outputs: results of the block.
  """
  tokens = pl.ds(column * _LANES, _LANES)
  top_k, pitch = plan.config.top_k, plan.dense_pitch
  for first in range(0, top_k, _SUBLANES):
    n = min(_SUBLANES, top_k - first)
    experts = pl.ds(first, n)
    # [columns, 128] for each expert -> [experts, 128] of the column.
    rows = pl.ds(first * pitch + column, n, stride=pitch)
    outputs.expert_idx[experts, tokens] = scratch.expert_idx[rows, :]
    outputs.weights[experts, tokens] = scratch.weights[rows, :]
    if plan.with_chosen:
      outputs.chosen[experts, tokens] = scratch.chosen[rows, :]
  outputs.cutoff[:, tokens] = scratch.cutoff[pl.ds(column, 1), :]
