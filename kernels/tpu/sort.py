# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counting sort of expert indices on TPU: the row of every assignment.

The row of an assignment in expert order is its expert's first row plus its rank
among that expert's assignments. A rank is a running count, and the MXU counts:
it multiplies the 0/1 matrix [experts, tokens], which says which token chose
which expert, by a triangle of ones. XLA would sort, or gather and scatter one
number at a time.

A grid block is up to 2048 tokens. It is cut into products, as many tokens as
the MXU multiplies at once, and these into columns of 128 tokens, one on each
lane. Choices, or experts, are on sublanes.

  step | function | layout | reads | writes
  1 locate the choices | `_locate_choices` | [K, tokens of a block] |
    `expert_idx` | `word_and_sublane`, `bit_mask`, `expert`,
    `earlier_unassigned` as flags
  2 build the matrix | `_write_membership` | [experts / 2, 128] words |
    `word_and_sublane`, `bit_mask` | `membership`
  3 count choices of no expert | `_count_unassigned` | [1, 128] |
    `earlier_unassigned` | `earlier_unassigned` as counts, `num_unassigned`,
    `membership`
  4 count assignments | `_multiply` | [experts, tokens of a product] |
    `membership` | counts, which it returns
  5 number assignments | `_write_rows` | [8 choices, 128] | counts, `next_row`,
    `expert`, `earlier_unassigned`, `num_unassigned` | the rows

Step 1 is done once a grid block, 4 once a product, the others once a column.
`count_assignments` does steps 1 to 4, with ones in place of the triangle, and
`assignment_rows` does all.

The matrix is made from words that have a bit for each of 32 experts, as
`bit_address` says. It holds 2.0 for 1, whose bfloat16 has a single bit, and
what it is multiplied by holds 0.5. The index E stands for no expert. A token
may have several choices of it, so that they have a line of the matrix to
themselves, with twice their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, registers

# Counts are float32: exact below this many assignments, T * K.
_MAX_ASSIGNMENTS = 2**24
# A token's assignments to no expert, doubled, are exact in bfloat16 up to 256.
_MAX_TOP_K = 128
_LANES, _SUBLANES = device.LANES, device.SUBLANES
# A grid block has at most this many tokens.
_MAX_BLOCK_TOKENS = 2048
# A register of bfloat16 has two numbers on each sublane.
_BF16_SUBLANES = 2 * _SUBLANES
# A register of words has a bit for this many experts of each token.
_REGISTER_EXPERTS = 32 * _SUBLANES
# This bit of a half of a word, alone, is bfloat16 2.0.
_TWO_BIT = 14
_TWO_IN_BOTH_HALVES = np.int32((1 << _TWO_BIT) | (1 << (_TWO_BIT + 16)))

# In a kernel, a reference or None; in a call of it, what the reference is made
# from: an array, a block specification or the shape of a buffer.
_Ref = Any

_Expert = TypeVar("_Expert", int, jax.Array)


def unsupported(num_tokens: int, top_k: int) -> str | None:
  """Says why the kernels cannot count so many assignments exactly.

  Args:
    num_tokens: T.
    top_k: K.

  Returns:
    The reason, for an error message; None if they can.
  """
  if num_tokens * top_k >= _MAX_ASSIGNMENTS:
    return (
      f"the TPU kernel counts fewer than {_MAX_ASSIGNMENTS} assignments, got"
      f" {num_tokens} x {top_k}"
    )
  if top_k > _MAX_TOP_K:
    return f"K is at most {_MAX_TOP_K} in the TPU kernel, got {top_k}"
  return None


@functools.partial(jax.jit, static_argnames=("num_experts", "interpret"))
def count_assignments(
  expert_idx: jax.Array, *, num_experts: int, interpret: Any = False
) -> jax.Array:
  """Counts the assignments of every expert.

  Args:
    expert_idx: `[T, K]` int32 from `[0, E]`, distinct within a token below E.
      T and K are not `unsupported`.
    num_experts: E; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[E + 1]` int32; the last for index E.
  """
  if expert_idx.size == 0:
    return jnp.zeros(num_experts + 1, jnp.int32)
  plan = _make_plan(expert_idx, num_experts, interpret)
  counts = _call(
    _count_kernel,
    "jaxroute_count",
    plan,
    _Inputs(expert_idx=expert_idx.T),
    jax.ShapeDtypeStruct(plan.experts_shape, jnp.float32),
    plan.experts_spec,
    interpret,
  )[:, 0].astype(jnp.int32)
  return jnp.append(counts[:num_experts], counts[plan.unassigned])


@functools.partial(jax.jit, static_argnames=("interpret",))
def assignment_rows(
  expert_idx: jax.Array, start: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """Numbers the assignments of every expert, in order, from `start` on.

  Args:
    expert_idx: as in `count_assignments`.
    start: `[E + 1]` int32. First row of every expert, and of index E.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[T, K]` int32, `start[expert_idx]` plus the rank within the expert.
  """
  if expert_idx.size == 0:
    return jnp.zeros(expert_idx.shape, jnp.int32)
  num_experts = start.shape[0] - 1
  plan = _make_plan(expert_idx, num_experts, interpret)
  gap = jnp.zeros(plan.unassigned - num_experts, jnp.int32)
  unassigned = jnp.broadcast_to(start[num_experts:], (_BF16_SUBLANES,))
  first_row = jnp.concatenate([start[:num_experts], gap, unassigned])
  first_row = first_row.astype(jnp.float32)[:, None]
  return _call(
    _rows_kernel,
    "jaxroute_rows",
    plan,
    _Inputs(
      expert_idx=expert_idx.T,
      first_row=jnp.broadcast_to(first_row, plan.experts_shape),
    ),
    jax.ShapeDtypeStruct((plan.top_k, plan.num_tokens), jnp.int32),
    plan.choices_spec,
    interpret,
  ).T


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
class _Plan:
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
    tokens = _round_up(self.num_tokens, self.product_tokens)
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
    return _round_up(self.num_experts, _BF16_SUBLANES)

  @property
  def experts_shape(self) -> tuple[int, int]:
    """`[experts, 128]`: all lines of the matrix, by the tokens of a column."""
    return self.unassigned + _BF16_SUBLANES, _LANES

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
class _Inputs:
  """What a kernel reads.

  Attributes:
    expert_idx: `[K, T]` int32, a grid block at a time. The chosen experts; past
      the last token, any bits.
    first_row: `[experts, 128]` float32, the same on all lanes. The first row of
      every expert. None where assignments are only counted.
  """

  expert_idx: _Ref
  first_row: _Ref = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scratch:
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

  word_and_sublane: _Ref
  bit_mask: _Ref
  expert: _Ref
  earlier_unassigned: _Ref
  membership: _Ref
  num_unassigned: _Ref
  next_row: _Ref


def _allocate_scratch(plan: _Plan) -> Any:
  """Returns the shapes of the buffers, a `_Scratch`."""
  choices = _round_up(plan.top_k, _SUBLANES), plan.block_tokens
  words = plan.experts_shape[0] // 2, _LANES
  return _Scratch(
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


def _make_plan(
  expert_idx: jax.Array, num_experts: int, interpret: Any
) -> _Plan:
  """Returns the static sizes of a call for `expert_idx`, `[T, K]`."""
  num_tokens, top_k = expert_idx.shape
  return _Plan(
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


def _round_up(n: int, multiple: int) -> int:
  """Returns the smallest multiple that is not below n."""
  return pl.cdiv(n, multiple) * multiple


def _call(
  kernel: Callable[[_Plan, _Inputs, _Ref, _Scratch], None],
  name: str,
  plan: _Plan,
  inputs: _Inputs,
  out: jax.ShapeDtypeStruct,
  out_spec: pl.BlockSpec,
  interpret: Any,
) -> jax.Array:
  """Calls a kernel on all grid blocks of tokens, one after the other."""
  counts_only = inputs.first_row is None
  # Inside `jax.shard_map` the operands vary alike, and so does the result.
  varying = jax.typeof(inputs.expert_idx).manual_axis_type
  return pl.pallas_call(
    functools.partial(kernel, plan),
    grid=(plan.grid,),
    in_specs=[
      _Inputs(
        expert_idx=plan.choices_spec,
        first_row=None if counts_only else plan.experts_spec,
      )
    ],
    out_specs=out_spec,
    out_shape=jax.ShapeDtypeStruct(
      out.shape, out.dtype, manual_axis_type=varying
    ),
    scratch_shapes=[_allocate_scratch(plan)],
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    name=name,
  )(inputs)


def _count_kernel(
  plan: _Plan, inputs: _Inputs, counts_ref: _Ref, scratch: _Scratch
) -> None:
  """Adds the assignments of a grid block to `counts_ref`, on all lanes."""

  @pl.when(pl.program_id(0) == 0)
  def _start() -> None:
    counts_ref[...] = jnp.zeros_like(counts_ref)

  _build_matrix(plan, inputs, scratch)
  halves = jnp.full((plan.product_tokens, _LANES), 0.5, jnp.bfloat16)

  def count_product(product: Any) -> None:
    counts_ref[...] += _multiply(plan, product, halves, scratch)

  registers.unroll(plan.products, count_product, plan.interpret)


def _rows_kernel(
  plan: _Plan, inputs: _Inputs, rows_ref: _Ref, scratch: _Scratch
) -> None:
  """Writes the rows of a grid block and moves `next_row` past them."""

  @pl.when(pl.program_id(0) == 0)
  def _start() -> None:
    scratch.next_row[...] = inputs.first_row[...]

  _build_matrix(plan, inputs, scratch)
  square = plan.product_tokens, plan.product_tokens
  token = lax.broadcasted_iota(jnp.int32, square, 0)
  up_to_token = lax.broadcasted_iota(jnp.int32, square, 1)
  triangle = jnp.where(token <= up_to_token, 0.5, 0.0).astype(jnp.bfloat16)

  def number_product(product: Any) -> None:
    counts = _multiply(plan, product, triangle, scratch)
    for column in range(plan.columns):
      _write_rows(plan, product, column, counts, rows_ref, scratch)
    # The counts up to the last token are those of the whole product.
    totals = counts[:, plan.product_tokens - 1 :]
    scratch.next_row[...] += jnp.broadcast_to(totals, plan.experts_shape)

  registers.unroll(plan.products, number_product, plan.interpret)


def _build_matrix(plan: _Plan, inputs: _Inputs, scratch: _Scratch) -> None:
  """Does steps 1 to 3 for a grid block."""
  _locate_choices(plan, inputs.expert_idx, scratch)

  def build_product(product: Any) -> None:
    for column in range(plan.columns):
      _write_membership(plan, product, column, scratch)
      _count_unassigned(plan, product, column, scratch)

  registers.unroll(plan.products, build_product, plan.interpret)


def _locate_choices(
  plan: _Plan, expert_idx_ref: _Ref, scratch: _Scratch
) -> None:
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
  plan: _Plan, product: Any, column: int, scratch: _Scratch
) -> None:
  """Writes the lines of all experts in `membership`, for a column."""
  tokens = plan.column_tokens(product, column)
  shape = _SUBLANES, _LANES
  sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
  for first_expert in range(0, plan.unassigned, _REGISTER_EXPERTS):
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
    end_expert = min(first_expert + _REGISTER_EXPERTS, plan.unassigned)
    for expert in range(first_expert, end_expert, _BF16_SUBLANES):
      _, _, bit = bit_address(expert)
      if bit <= _TWO_BIT:
        shift = jnp.full_like(words, _TWO_BIT - bit)
        shifted = lax.shift_left(words, shift)
      else:
        shift = jnp.full_like(words, bit - _TWO_BIT)
        shifted = lax.shift_right_logical(words, shift)
      pairs = pl.ds(expert // 2, _SUBLANES)
      scratch.membership[column, product, pairs, :] = (
        shifted & _TWO_IN_BOTH_HALVES
      )


def _count_unassigned(
  plan: _Plan, product: Any, column: int, scratch: _Scratch
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
  twice = jnp.broadcast_to(twice, (_BF16_SUBLANES, _LANES))
  pairs = pl.ds(plan.unassigned // 2, _SUBLANES)
  scratch.membership[column, product, pairs, :] = pltpu.bitcast(
    twice.astype(jnp.bfloat16), jnp.int32
  )


def _multiply(
  plan: _Plan, product: Any, counted: jax.Array, scratch: _Scratch
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


def _write_rows(
  plan: _Plan,
  product: Any,
  column: int,
  counts: jax.Array,
  rows_ref: _Ref,
  scratch: _Scratch,
) -> None:
  """Writes the rows of a column, gathered from those of all experts.

  Args:
    plan: static sizes.
    product: number of the product.
    column: number of the column in it.
    counts: `[experts, tokens of the product]` float32. The product's
      assignments up to and with each token.
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
