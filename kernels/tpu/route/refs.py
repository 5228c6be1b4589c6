# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What the routing kernel reads, writes and keeps: one named field for each.

Each class is a pytree with a leaf for each field that is there; what a call has
not is None. Outside the kernel the leaves are arrays, or describe them
(`BlockSpec`, `ShapeDtypeStruct`); `pallas_call` hands the kernel the same class
with a reference in their place.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route.plan import COLUMN_PITCH, Plan

BIN_WORDS = types.HISTOGRAM_BINS // 4
"""Words of four bytes, one byte for each bin of the histogram."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputRefs:
  """The operands, with the shape of the block of a grid step.

  Attributes:
    logits: `[step_tokens, E]` or, if `plan.experts_first`, `[E, step_tokens]`
      floating point; None where tokens are projected here.
    tokens: `[block_tokens, D]` bfloat16, to be projected.
    router_weight: `BF16_TERMS` times `[projected_experts, D]` bfloat16, which
      add up to the router weight.
    expert_bias: `[E]` float32.
    token_mask: `[blocks_per_step * columns, 128]` int32. 0 marks padding.
  """

  logits: Ref = None
  tokens: Ref = None
  router_weight: tuple[Ref, ...] | None = None
  expert_bias: Ref = None
  token_mask: Ref = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRefs:
  """The results, with the shape of the block of a grid step and of all.

  Attributes:
    expert_idx: `[K, step_tokens]` int32 of `[K, T]`.
    weights: `[K, step_tokens]` float32 of `[K, T]`.
    load: `[E]` int32, the same block in every step.
    cutoff: `[1, step_tokens]` float32 of `[1, T]`.
    histogram: `[8 R, 16]` int32, the same block in every step; if counted.
    chosen: `[K, step_tokens]` float32 of `[K, T]`; if asked for.
  """

  expert_idx: Ref
  weights: Ref
  load: Ref
  cutoff: Ref
  histogram: Ref = None
  chosen: Ref = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
  """What a block of tokens needs while it is routed, in VMEM.

  The last axis is the 128 tokens of a column. "By columns" and "dense" name the
  layout that a buffer is stored in; it is loaded in the other.

  Attributes:
    expert_logits: `[2, 8 * sublane_pitch, 128]` float32. Logits of a column by
      expert, as they came; the columns take turns in the two.
    logits: `[columns, 8 R, 128]` float32. The same by columns, of the whole
      block.
    selection_scores: `[columns, 8 R, 128]` float32, by columns; never NaN. What
      experts are chosen by.
    bias: `[8 * sublane_pitch, 128]` float32. Bias by expert, the same on all
      lanes.
    bias_row: `[1, E']` float32. Bias with experts on lanes, E' a multiple of
      128.
    lists: float32, `segments_per_sublane * sum(list_sizes)` registers by
      columns. The largest selection scores of each segment, in falling lists.
    bound_not_below: float32, `8 * segments_per_sublane` dense registers. A
      score not below the bound of its segment is not below the K-th largest.
    bound_above: the same for scores above the K-th largest. From stage 9 on,
      the cutoffs that the histogram takes distances from.
    bits_not_below: int32, `words_per_sublane` registers by columns. A bit for
      each score that is not below the bound; from stage 4 on, for each expert
      that is chosen.
    bits_above: the same for scores above the bound.
    expert_idx: int32, `padded_top_k` dense registers. The chosen experts, in
      index order and, from stage 6 on, the best first.
    weights: float32, `padded_top_k` dense registers. Their weights.
    chosen: float32, `padded_top_k` dense registers. What these are made from.
    chosen_logits: float32, `padded_top_k / 8` registers by columns. Logits of
      the chosen experts, in index order.
    row_max: `[columns, 128]` float32. The largest logit of a token, for a
      softmax.
    inverse_row_sum: `[columns, 128]` float32. 1 over its sum of exponentials.
    cutoff: `[columns, 128]` float32. The largest selection score not chosen;
      not -0.
    valid: `[columns, 128]` int32. -1 (all bits) for tokens that count, else 0.
    counters: `[words_per_sublane, counter_bits, 8, 128]` int32, bit-sliced. Bit
      b of `counters[w, i]` is bit i of the count of the sublane's expert
      `32 w + b`, by lane.
    projected_logits: `[projected_experts, block_tokens]` float32. Logits of the
      next block, where tokens are projected.
    bin_counts: `[R, BIN_WORDS, 8, 128]` int32. Four counts in a word, for the
      histogram.
  """

  expert_logits: Ref
  logits: Ref
  selection_scores: Ref
  bias: Ref
  bias_row: Ref
  lists: Ref
  bound_not_below: Ref
  bound_above: Ref
  bits_not_below: Ref
  bits_above: Ref
  expert_idx: Ref
  weights: Ref
  chosen: Ref
  chosen_logits: Ref
  row_max: Ref
  inverse_row_sum: Ref
  cutoff: Ref
  valid: Ref
  counters: Ref
  projected_logits: Ref = None
  bin_counts: Ref = None


def scratch_shapes(plan: Plan) -> Scratch:
  """Shapes and dtypes of the scratch buffers.

  Args:
    plan: the static shape of the call.

  Returns:
    `Scratch` of `jax.ShapeDtypeStruct`.
  """

  def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, device.LANES), jnp.float32)

  def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, device.LANES), jnp.int32)

  experts = device.SUBLANES * plan.experts_per_sublane
  by_expert = device.SUBLANES * plan.sublane_pitch
  # Rows of one register of every column.
  by_columns = plan.columns * COLUMN_PITCH
  list_registers = plan.segments_per_sublane * sum(plan.list_sizes)
  bounds = plan.segments_per_sublane * device.SUBLANES * plan.dense_pitch
  bits = plan.words_per_sublane * by_columns
  chosen = plan.padded_top_k * plan.dense_pitch
  chosen_registers = plan.padded_top_k // device.SUBLANES
  expert_rows = pl.cdiv(experts, device.LANES)
  projected_logits = bin_counts = None
  if plan.width:
    projected_logits = jax.ShapeDtypeStruct(
      (plan.projected_experts, plan.block_tokens), jnp.float32
    )
  if plan.config.histogram:
    bin_counts = int32(plan.experts_per_sublane, BIN_WORDS, device.SUBLANES)
  return Scratch(
    expert_logits=float32(2, by_expert),
    logits=float32(plan.columns, experts),
    selection_scores=float32(plan.columns, experts),
    bias=float32(by_expert),
    bias_row=jax.ShapeDtypeStruct((1, expert_rows * device.LANES), jnp.float32),
    lists=float32(list_registers * by_columns),
    bound_not_below=float32(bounds),
    bound_above=float32(bounds),
    bits_not_below=int32(bits),
    bits_above=int32(bits),
    expert_idx=int32(chosen),
    weights=float32(chosen),
    chosen=float32(chosen),
    chosen_logits=float32(chosen_registers * by_columns),
    row_max=float32(plan.columns),
    inverse_row_sum=float32(plan.columns),
    cutoff=float32(plan.columns),
    valid=int32(plan.columns),
    counters=int32(plan.words_per_sublane, plan.counter_bits, device.SUBLANES),
    projected_logits=projected_logits,
    bin_counts=bin_counts,
  )
