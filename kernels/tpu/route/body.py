# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The body of the routing kernel: which stage runs when."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxroute.kernels.tpu import registers
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import (
  count,
  histogram,
  layout,
  projection,
  score,
  select,
  weigh,
)
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import InputRefs, OutputRefs, Scratch


def kernel(
  plan: Plan, inputs: InputRefs, outputs: OutputRefs, scratch: Scratch
) -> None:
  """Routes the blocks of tokens of a grid step, and projects the next one.

  Args:
    plan: the static shape of the call.
    inputs: operands.
    outputs: results.
    scratch: buffers, which keep what they hold from step to step.
  """
  # Step -1 only projects: it routes zeros, which step 0 forgets.
  step = pl.program_id(0) - plan.projection_lead
  if plan.width:

    @pl.when(step < 0)
    def _zero_logits() -> None:
      scratch.projected_logits[...] = jnp.zeros_like(scratch.projected_logits)

  @pl.when(step <= 0)
  def _start() -> None:
    scratch.counters[...] = jnp.zeros_like(scratch.counters)
    if plan.has_bias:
      layout.broadcast_bias(plan, inputs.expert_bias, scratch)
    if plan.config.histogram:
      scratch.bin_counts[...] = jnp.zeros_like(scratch.bin_counts)
      outputs.histogram[...] = jnp.zeros_like(outputs.histogram)

  if plan.width:
    inputs = dataclasses.replace(inputs, logits=scratch.projected_logits)
  for block in range(plan.blocks_per_step):
    _route_block(plan, step, block, inputs, outputs, scratch)
  if plan.width:
    projection.project(plan, inputs, scratch)
  if plan.config.histogram:
    steps_per_flush = histogram.BLOCKS_PER_FLUSH // plan.blocks_per_step
    is_full = step % steps_per_flush == steps_per_flush - 1

    @pl.when(is_full | (step == plan.grid_steps - 1))
    def _flush_bins() -> None:
      _unroll_registers(
        plan,
        lambda register: histogram.reduce_bins(
          plan, register, scratch, outputs.histogram
        ),
      )
      scratch.bin_counts[...] = jnp.zeros_like(scratch.bin_counts)

  @pl.when(step == plan.grid_steps - 1)
  def _finish() -> None:
    count.write_load(plan, scratch, outputs.load)


def _route_block(
  plan: Plan,
  step: jax.Array,
  block: int,
  inputs: InputRefs,
  outputs: OutputRefs,
  scratch: Scratch,
) -> None:
  """Routes a block of `plan.block_tokens` tokens of a grid step."""
  if plan.blocks_per_step > 1:
    inputs = _inputs_of_block(plan, block, inputs)
    outputs = _outputs_of_block(plan, block, outputs)

  def each_column(stage: Callable[[Any], None]) -> None:
    registers.unroll(plan.columns, stage, plan.interpret)

  each_column(
    lambda column: score.score_column(plan, column, inputs.logits, scratch)
  )
  kept = select.threshold(plan, scratch)
  each_column(lambda column: select.compare_column(plan, column, scratch))
  cells = select.break_ties(plan, scratch)
  expert_idx = select.extract_chosen(plan, cells, scratch)
  each_column(lambda column: weigh.gather_column(plan, column, scratch))
  block_number = step * plan.blocks_per_step + block
  weigh.weigh(plan, block_number, expert_idx, kept, inputs.token_mask, scratch)
  each_column(lambda column: weigh.write_column(plan, column, scratch, outputs))
  count.count_chosen(plan, scratch)
  if plan.config.histogram:
    histogram.store_cutoffs(plan, kept, scratch)
    _unroll_registers(
      plan, lambda register: histogram.count_distances(plan, register, scratch)
    )


def _unroll_registers(plan: Plan, stage: Callable[[Any], None]) -> None:
  """Calls a stage for each of the R registers that hold all experts."""
  registers.unroll(plan.experts_per_sublane, stage, plan.interpret)


def _inputs_of_block(plan: Plan, block: int, inputs: InputRefs) -> InputRefs:
  """Narrows the operands of a grid step to one block of its tokens."""
  tokens = pl.ds(block * plan.block_tokens, plan.block_tokens)
  mask = inputs.token_mask
  if mask is not None:
    mask = mask.at[pl.ds(block * plan.columns, plan.columns)]
  if plan.experts_first:
    logits = inputs.logits.at[:, tokens]
  else:
    logits = inputs.logits.at[tokens, :]
  return dataclasses.replace(inputs, logits=logits, token_mask=mask)


def _outputs_of_block(
  plan: Plan, block: int, outputs: OutputRefs
) -> OutputRefs:
  """Narrows the results by token of a grid step to one block of its tokens."""
  tokens = pl.ds(block * plan.block_tokens, plan.block_tokens)

  def narrow(ref: Ref) -> Ref:
    return None if ref is None else ref.at[:, tokens]

  return dataclasses.replace(
    outputs,
    expert_idx=narrow(outputs.expert_idx),
    weights=narrow(outputs.weights),
    cutoff=narrow(outputs.cutoff),
    chosen=narrow(outputs.chosen),
  )
