# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The 0/1 matrix of tokens and experts: how it is made, multiplied and read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, registers
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.sort.plan import (
  BF16_SUBLANES,
  REGISTER_EXPERTS,
  TWO_BIT,
  TWO_IN_BOTH_HALVES,
  Inputs,
  Plan,
  Scratch,
  bit_address,
)

_LANES, _SUBLANES = device.LANES, device.SUBLANES


def build_matrix(plan: Plan, inputs: Inputs, scratch: Scratch) -> None:
  """Does stages 1 to 3 for a grid block."""
  _locate_choices(plan, inputs.expert_idx, scratch)

  def build_product(product: Any) -> None:
    for column in range(plan.columns):
      _write_membership(plan, product, column, scratch)
      _count_unassigned(plan, product, column, scratch)

  registers.unroll(plan.products, build_product, plan.interpret)


def _locate_choices(plan: Plan, expert_idx_ref: Ref, scratch: Scratch) -> None:
  """Writes the bit that stands for every choice, and which are of no expert."""
  tokens_left = plan.num_tokens - pl.program_id(0) * plan.block_tokens
  expert_idx = expert_idx_ref[...]
  token = lax.broadcasted_iota(jnp.int32, expert_idx.shape, 1)
  is_token = token < tokens_left
  is_unassigned = is_token & (expert_idx == plan.num_experts)
  # Past the last token, the block holds any bits: they could be out of range.
  is_assigned = is_token & (expert_idx < plan.num_experts)
  expert = jnp.where(is_assigned, expert_idx, 0)
  # Each part of the address is computed where it is used: in other orders the
  # compiler estimates up to 1 % more cycles for some sizes.
  _, _, bit = bit_address(expert)
  bit_mask = lax.shift_left(jnp.ones_like(bit), bit)
  choices = pl.ds(0, plan.top_k)
  scratch.bit_mask[choices, :] = jnp.where(
    is_token & ~is_unassigned, bit_mask, 0
  )
  word, _, _ = bit_address(expert)
  word_part = word << 3
  _, sublane, _ = bit_address(expert)
  scratch.word_and_sublane[choices, :] = word_part + sublane
  scratch.expert[choices, :] = jnp.where(is_unassigned, -1, expert)
  scratch.earlier_unassigned[choices, :] = is_unassigned.astype(jnp.int32)


def _write_membership(
  plan: Plan, product: Any, column: int, scratch: Scratch
) -> None:
  """Writes the lines of all experts in `membership`, for a column."""
  tokens = plan.column_tokens(product, column)
  shape = _SUBLANES, _LANES
  sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
  for first_expert in range(0, plan.unassigned, REGISTER_EXPERTS):
    word, _, _ = bit_address(first_expert)
    # [1, 128] of a choice to [8, 128]: its bit, on the sublane of its address.
    words = jnp.zeros(shape, jnp.int32)
    for choice in range(plan.top_k):
      address = scratch.word_and_sublane[pl.ds(choice, 1), tokens]
      is_address = (
        jnp.broadcast_to(address, shape) == sublane + word * _SUBLANES
      )
      bit_mask = scratch.bit_mask[pl.ds(choice, 1), tokens]
      words |= jnp.where(is_address, bit_mask, 0)
    # [8, 128] words to [256, 128] bfloat16, a register of 16 experts at a time.
    end_expert = min(first_expert + REGISTER_EXPERTS, plan.unassigned)
    for expert in range(first_expert, end_expert, BF16_SUBLANES):
      _, _, bit = bit_address(expert)
      if bit <= TWO_BIT:
        shift = jnp.full_like(words, TWO_BIT - bit)
        shifted = lax.shift_left(words, shift)
      else:
        shift = jnp.full_like(words, bit - TWO_BIT)
        shifted = lax.shift_right_logical(words, shift)
      pairs = pl.ds(expert // 2, _SUBLANES)
      scratch.membership[column, product, pairs, :] = (
        shifted & TWO_IN_BOTH_HALVES
      )


def _count_unassigned(
  plan: Plan, product: Any, column: int, scratch: Scratch
) -> None:
  """Counts the choices of no expert in a column, into `membership` too."""
  tokens = plan.column_tokens(product, column)
  count = jnp.zeros((1, _LANES), jnp.int32)
  for choice in range(plan.top_k):
    is_unassigned = scratch.earlier_unassigned[pl.ds(choice, 1), tokens]
    scratch.earlier_unassigned[pl.ds(choice, 1), tokens] = count
    count += is_unassigned
  scratch.num_unassigned[column, product] = count.astype(jnp.float32)
  twice = (2 * count).astype(jnp.float32)
  # [1, 128] to the 16 bfloat16 lines of one register.
  twice = jnp.broadcast_to(twice, (BF16_SUBLANES, _LANES))
  pairs = pl.ds(plan.unassigned // 2, _SUBLANES)
  scratch.membership[column, product, pairs, :] = pltpu.bitcast(
    twice.astype(jnp.bfloat16), jnp.int32
  )


def multiply(
  plan: Plan, product: Any, counted: jax.Array, scratch: Scratch
) -> jax.Array:
  """Returns a product's matrix times `counted`, `[experts, ...]` float32.

  Args:
    plan: static sizes.
    product: number of the product.
    counted: `[tokens, ...]` bfloat16. 0.5 where a token counts, else 0.
    scratch: reads `membership`.
  """
  columns = [
    scratch.membership[column, product] for column in range(plan.columns)
  ]
  # [experts / 2, tokens] words to [experts, tokens] bfloat16.
  matrix = pltpu.bitcast(jnp.concatenate(columns, axis=1), jnp.bfloat16)
  return jnp.dot(matrix, counted, preferred_element_type=jnp.float32)


def write_rows(
  plan: Plan,
  product: Any,
  column: int,
  counts: jax.Array,
  rows_ref: Ref,
  scratch: Scratch,
) -> None:
  """Writes the rows of a column, gathered from those of all experts.

  Args:
    plan: static sizes.
    product: number of the product.
    column: number of the column in it.
    counts: `[experts, tokens of the product]` float32. The product's
      assignments up to and including each token.
    rows_ref: `[K, tokens of a block]` int32, written.
    scratch: reads `next_row`, `expert`, `earlier_unassigned`, `num_unassigned`.
  """
  tokens = plan.column_tokens(product, column)
  column_counts = counts[:, column * _LANES :][:, :_LANES]

  def end_rows(first_expert: int, num_experts: int = _SUBLANES) -> jax.Array:
    """Returns each expert's next row after each token, `[experts, 128]`."""
    next_row = scratch.next_row[pl.ds(first_expert, num_experts), :]
    return next_row + column_counts[first_expert : first_expert + num_experts]

  num_unassigned = scratch.num_unassigned[column, product]
  # [1, 128] to [8, 128]: the row of the token's first choice of no expert.
  unassigned_row = jnp.broadcast_to(
    end_rows(plan.unassigned, 1) - num_unassigned, (_SUBLANES, _LANES)
  )
  for first_choice in range(0, plan.top_k, _SUBLANES):
    choices = pl.ds(first_choice, _SUBLANES)
    # Expert e is in register e / 8 of the end rows, on sublane e % 8. What is
    # selected for -1 is not used.
    expert = scratch.expert[choices, tokens]
    end_row = registers.select_register(
      lambda i: end_rows(i * _SUBLANES),
      expert >> 3,
      expert & (_SUBLANES - 1),
      plan.unassigned // _SUBLANES,
    )
    row = end_row.astype(jnp.int32) - 1
    row_of_none = (
      unassigned_row.astype(jnp.int32)
      + scratch.earlier_unassigned[choices, tokens]
    )
    row = jnp.where(expert < 0, row_of_none, row)
    num_choices = min(_SUBLANES, plan.top_k - first_choice)
    rows_ref[pl.ds(first_choice, num_choices), tokens] = row[:num_choices]
