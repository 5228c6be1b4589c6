# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The static sizes of the sort kernels, their operands and buffers."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref

_LANES, _SUBLANES = device.LANES, device.SUBLANES
# A grid block has at most this many tokens.
_MAX_BLOCK_TOKENS = 2048
# A register of bfloat16 has two numbers on each sublane.
BF16_SUBLANES = 2 * _SUBLANES
# A register of words has a bit for this many experts of each token.
REGISTER_EXPERTS = 32 * _SUBLANES
# This bit of a half of a word, alone, is bfloat16 2.0.
TWO_BIT = 14
TWO_IN_BOTH_HALVES = np.int32((1 << TWO_BIT) | (1 << (TWO_BIT + 16)))

_Expert = TypeVar("_Expert", int, jax.Array)


def bit_address(expert: _Expert) -> tuple[_Expert, _Expert, _Expert]:
  """Returns which bit stands for an expert in the words of a token.

  A register of words has a bit for 256 experts of a token. Those of 16 experts,
  two on each sublane, become a register of bfloat16 by one shift and one mask.

    bits of the index | what they number
    8 and up | the word: the register of words
    7 to 4 | the 16 experts: the bit, in its half of the word
    3 to 1 | the sublane
    0 | the half: 16 is added to the bit in the upper one

  Args:
    expert: index of the expert, at least 0.

  Returns:
    Word; sublane, 0 to 7; bit, 0 to 31.
  """
  word = expert >> 8
  sublane = (expert >> 1) & 7
  bit = ((expert >> 4) & 15) + ((expert & 1) << 4)
  return word, sublane, bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The static sizes of a call.

  Attributes:
    num_experts: E.
    num_tokens: T, at least 1.
    top_k: K, at least 1.
    columns: columns in a product.
    interpret: whether the kernel is interpreted.
  """

  num_experts: int
  num_tokens: int
  top_k: int
  columns: int
  interpret: bool

  @property
  def product_tokens(self) -> int:
    """Tokens in a product."""
    return self.columns * _LANES

  @property
  def products(self) -> int:
    """Products in a grid block."""
    tokens = round_up(self.num_tokens, self.product_tokens)
    return min(_MAX_BLOCK_TOKENS, tokens) // self.product_tokens

  @property
  def block_tokens(self) -> int:
    """Tokens in a grid block."""
    return self.products * self.product_tokens

  @property
  def grid(self) -> int:
    """Grid blocks; the last may be partly empty."""
    return pl.cdiv(self.num_tokens, self.block_tokens)

  @property
  def unassigned(self) -> int:
    """The first of the matrix's 16 lines for no expert: E rounded up to 16."""
    return round_up(self.num_experts, BF16_SUBLANES)

  @property
  def experts_shape(self) -> tuple[int, int]:
    """`[experts, 128]`: all lines of the matrix, by the tokens of a column."""
    return self.unassigned + BF16_SUBLANES, _LANES

  @property
  def experts_spec(self) -> pl.BlockSpec:
    """What has `experts_shape` is in VMEM whole, for all of the grid."""
    return pl.BlockSpec(self.experts_shape, lambda i: (0, 0))

  @property
  def choices_spec(self) -> pl.BlockSpec:
    """What is `[K, T]` is in VMEM a grid block at a time."""
    return pl.BlockSpec((self.top_k, self.block_tokens), lambda i: (0, i))

  def column_tokens(self, product: Any, column: int) -> Any:
    """Where the tokens of a column are in a grid block."""
    return pl.ds((product * self.columns + column) * _LANES, _LANES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """What a kernel reads.

  Attributes:
    expert_idx: `[K, T]` int32, a grid block at a time. The chosen experts; past
      the last token, any bits.
    first_row: `[experts, 128]` float32, the same on all lanes. The first row of
      every expert. None where assignments are only counted.
  """

  expert_idx: Ref
  first_row: Ref = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
  """The buffers of a kernel. K' is K rounded up to whole registers.

  Attributes:
    word_and_sublane: `[K', tokens of a block]` int32. 8 times the word, plus
      the sublane, of the chosen expert's `bit_address`.
    bit_mask: `[K', tokens of a block]` int32. The bit of that address alone; 0
      for no expert.
    expert: `[K', tokens of a block]` int32. The chosen expert; -1 for none.
    earlier_unassigned: `[K', tokens of a block]` int32. First, 1 for a choice
      of no expert and 0 for others; then, how many of the token's earlier
      choices are of no expert.
    membership: `[columns, products, experts / 2, 128]` int32, pairs of
      bfloat16. The matrix: 2.0 where the token chose the expert; for no expert,
      twice the number of choices.
    num_unassigned: `[columns, products, 1, 128]` float32. How many choices of
      the token are of no expert.
    next_row: `[experts, 128]` float32, the same on all lanes. The row of every
      expert's next assignment; not used where assignments are only counted.
  """

  word_and_sublane: Ref
  bit_mask: Ref
  expert: Ref
  earlier_unassigned: Ref
  membership: Ref
  num_unassigned: Ref
  next_row: Ref


def allocate_scratch(plan: Plan) -> Any:
  """Returns the shapes of the buffers, a `Scratch`."""
  choices = round_up(plan.top_k, _SUBLANES), plan.block_tokens
  words = plan.experts_shape[0] // 2, _LANES
  return Scratch(
    word_and_sublane=pltpu.VMEM(choices, jnp.int32),
    bit_mask=pltpu.VMEM(choices, jnp.int32),
    expert=pltpu.VMEM(choices, jnp.int32),
    earlier_unassigned=pltpu.VMEM(choices, jnp.int32),
    membership=pltpu.VMEM((plan.columns, plan.products, *words), jnp.int32),
    num_unassigned=pltpu.VMEM(
      (plan.columns, plan.products, 1, _LANES), jnp.float32
    ),
    next_row=pltpu.VMEM(plan.experts_shape, jnp.float32),
  )


def make_plan(expert_idx: jax.Array, num_experts: int, interpret: Any) -> Plan:
  """Returns the static sizes of a call for `expert_idx`, `[T, K]`."""
  num_tokens, top_k = expert_idx.shape
  return Plan(
    num_experts=num_experts,
    num_tokens=num_tokens,
    top_k=top_k,
    columns=_columns(interpret),
    interpret=bool(interpret),
  )


def _columns(interpret: Any) -> int:
  """Returns how many columns a product has.

  They are 2, but 1 before v6e: its MXU, 128 wide, would also multiply the empty
  quarter of a larger triangle.
  """
  generation = device.generation()
  return 2 if interpret or generation is None or generation >= 6 else 1


def round_up(n: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below n."""
  return pl.cdiv(n, multiple) * multiple
