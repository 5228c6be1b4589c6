# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Logits to selection scores, and the largest of every token.

The arithmetic is that of XLA's programs for GPUs, operation by operation, so that
scores have the same bits: see `jaxroute.scores` for what it means.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels.gpu import threads
from jaxroute.kernels.gpu.mosaic import plgpu
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.tile import Tile, divide, loop, over_lanes
from jaxroute.kernels.gpu.threads import THREADS, by_row, full

NEG_INF = np.float32(-np.inf)


def start_copies(tile: Tile) -> None:
  """Begins to copy the logits of the block to shared memory, chunk by chunk."""
  plan, buffers = tile.plan, tile.buffers
  rows = pl.ds(tile.first_token * plan.lanes, THREADS)
  for chunk in range(plan.chunks):
    experts = pl.ds(chunk * plan.width, plan.width)
    plgpu.copy_gmem_to_smem(
      tile.operands.rows.at[rows, experts],
      buffers.logits.at[chunk],
      buffers.arrived.at[chunk],
    )


def load_bias(tile: Tile) -> None:
  """Writes the bias to shared memory. Ends in a barrier of the block."""
  plan = tile.plan
  if not plan.has_bias:
    return
  for first in range(0, plan.padded_experts, THREADS):
    expert = first + tile.place.row
    bias = plan.threads.gather(
      tile.operands.expert_bias, jnp.minimum(expert, plan.num_experts - 1)
    )
    # A score with a NaN is -inf, and so is one with this.
    bias = jnp.where(bias == bias, bias, NEG_INF)
    is_inside = threads.as_words(expert < plan.padded_experts)
    plan.threads.scatter(
      tile.buffers.expert_bias, bias_index(plan, expert), bias, is_inside
    )
  plan.threads.block_barrier()


def bias_index(plan: Plan, expert: jax.Array) -> jax.Array:
  """Where the bias of an expert is in shared memory."""
  return expert + divide(expert, plan.part) * (plan.bias_pitch - plan.part)


def prepare(plan: Plan, logits: jax.Array) -> jax.Array:
  """Applies the multiplier."""
  multiplier = plan.config.logit_multiplier
  return logits if multiplier == 1.0 else plan.threads.scale(logits, multiplier)


def apply_score_fn(
  plan: Plan,
  logits: jax.Array,
  peak: jax.Array | None = None,
  total: jax.Array | None = None,
) -> jax.Array:
  """Computes scores from logits.

  Args:
    plan: the static sizes of the call.
    logits: float32 of any shape, prepared.
    peak: of the shape of `logits`: what `softmax_sums` finds, as is `total`. None
      for other scores.
    total: of the shape of `logits`, or None.

  Returns:
    float32 of that shape.
  """
  if plan.config.score_fn == "softmax":
    assert peak is not None and total is not None
    return plan.threads.divide(jnp.exp(logits - peak), total)
  if plan.config.score_fn == "sigmoid":
    # An inverse of a quarter is one instruction where that of 1 + exp(-x), which
    # may be so large that its inverse is subnormal, is seven. Both have the same
    # bits, as scaling by a power of two rounds nothing.
    inverse = plan.threads.reciprocal(0.25 + 0.25 * jnp.exp(-logits))
    return 0.25 * inverse
  start, _ = map(np.float32, types.SCORE_TAILS["sqrtsoftplus"])
  is_far = logits < start
  near = jnp.where(is_far, 0.0, logits)
  softplus = jnp.maximum(near, 0.0) + plan.threads.log1p(
    jnp.exp(-jnp.abs(near))
  )
  far = jnp.exp(jnp.where(is_far, logits, start) * 0.5)
  return jnp.where(is_far, far, plan.threads.sqrt(softplus))


def add_bias(
  plan: Plan, logits: jax.Array, scores: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Computes selection scores: -inf where the logit is -inf or NaN, and never NaN.

  Nor are they -0.0, which `Threads.is_less` takes for less than 0.0.

  Args:
    plan: the static sizes of the call.
    logits: float32 of any shape, prepared.
    scores: what the bias is added to: scores or, again, logits.
    bias: float32 without NaN, or None.

  Returns:
    float32 of that shape.
  """
  selection = scores if bias is None else scores + bias
  if not plan.config.selects_on_logits:
    selection = jnp.where(logits > NEG_INF, selection, NEG_INF)
    if plan.config.score_fn == "sigmoid":
      return selection
  selection = jnp.where(selection > NEG_INF, selection, NEG_INF)
  if plan.config.selects_on_logits:
    # No score is -0.0, but a logit may be. Compilers drop a sum with 0.
    selection = jnp.where(selection == 0.0, 0.0, selection)
  return selection


def softmax_sums(tile: Tile) -> jax.Array:
  """Finds each token's largest logit and adds up the exponentials, `[128]`.

  Writes them to `softmax_sums`, and to `selection_scores` the exponentials, if
  these are scores: -1 for logits of -inf and NaN.

  Args:
    tile: of the block.

  Returns:
    The sum over logits that are not NaN, relative to the largest; 1 for 0.
  """
  plan, buffers = tile.plan, tile.buffers

  def find_peak(chunk: jax.Array | int, peak: jax.Array) -> jax.Array:
    plgpu.barrier_wait(buffers.arrived.at[chunk])
    logits = _load_logits(tile, chunk)
    logits = jnp.where(logits > NEG_INF, logits, NEG_INF)
    return functools.reduce(jnp.maximum, threads.columns(logits), peak)

  peak = loop(plan.chunks, find_peak, full(NEG_INF))
  peak = over_lanes(plan, peak, jnp.maximum, plan.lanes)
  peak = jnp.where(peak == NEG_INF, 0.0, peak)
  wide_peak = threads.widen(peak, plan.width)

  def add_up(chunk: jax.Array | int, total: jax.Array) -> jax.Array:
    logits = _load_logits(tile, chunk)
    logits = jnp.where(logits > NEG_INF, logits, NEG_INF)
    exponentials = jnp.exp(logits - wide_peak)
    if not plan.config.selects_on_logits:
      kept = jnp.where(logits > NEG_INF, exponentials, -1.0)
      buffers.selection_scores[chunk] = kept
    return functools.reduce(jnp.add, threads.columns(exponentials), total)

  total = loop(plan.chunks, add_up, full(0.0))
  total = over_lanes(plan, total, jnp.add, plan.lanes)
  total = jnp.where(total == 0.0, 1.0, total)
  buffers.softmax_sums[pl.ds(0, THREADS)] = peak
  buffers.softmax_sums[pl.ds(THREADS, THREADS)] = total
  return total


def _load_logits(tile: Tile, chunk: jax.Array | int) -> jax.Array:
  """`[128, width]` float32: the logits of a chunk, prepared."""
  plan = tile.plan
  vector_size = 16 // jnp.dtype(plan.dtype).itemsize
  logits = plgpu.load(tile.buffers.logits.at[chunk], layout=by_row(vector_size))
  logits = plgpu.layout_cast(logits.astype(jnp.float32), by_row(4))
  return prepare(plan, logits)


def score_chunk(
  tile: Tile, total: jax.Array | None, chunk: jax.Array | int
) -> list[jax.Array]:
  """Computes the selection scores of a chunk, and writes `selection_scores`.

  Args:
    tile: of the block.
    total: what `softmax_sums` returned; None if it was not called.
    chunk: which.

  Returns:
    A `[128]` for every expert of the chunk.
  """
  plan, buffers = tile.plan, tile.buffers
  if total is None:
    plgpu.barrier_wait(buffers.arrived.at[chunk])
  config = plan.config
  if config.needs_row_softmax and not config.selects_on_logits:
    assert total is not None
    exponentials = plgpu.load(
      buffers.selection_scores.at[chunk], layout=by_row(4)
    )
    scores = plan.threads.divide(exponentials, threads.widen(total, plan.width))
    logits = jnp.where(exponentials >= 0.0, exponentials, NEG_INF)
  else:
    logits = _load_logits(tile, chunk)
    scores = logits
    if not config.selects_on_logits:
      scores = apply_score_fn(plan, logits)
  bias = None
  if plan.has_bias:
    start = tile.place.part * plan.bias_pitch + chunk * plan.width
    bias = plan.threads.gather_rows(buffers.expert_bias, start, plan.width)
  selection = add_bias(plan, logits, scores, bias)
  buffers.selection_scores[chunk] = selection
  return threads.columns(selection)
