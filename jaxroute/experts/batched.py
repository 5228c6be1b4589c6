# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts by batches, many experts' rows at once: for NVIDIA GPU.

There XLA lowers `jax.lax.ragged_dot` to a dense product of every row with every
expert. Here the first batch takes up to R rows of each of the E experts, a
little more than an even share, with the parameters where they are. When loads
are balanced that is all. What is left is cut into chunks of R / 2 rows of one
expert, and E / 4 chunks are a batch, with the parameters of their experts
gathered; as many batches as the loads need. With R = 4, three experts of 5, 2
and 9 rows:

    rows      0 0 0 0 0 1 1 2 2 2 2 2 2 2 2 2
    first     0 0 0 0   1 1 . .   2 2 2 2           [3, 4] rows, one product
    chunks            0 .       2 2 | 2 2 | 2 .     [1, 2] rows a batch, a product each

So the work follows the rows: 1.25 N of them when loads are balanced and about
2.4 N at worst.
"""

import fractions
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute.experts import blocks
from jaxroute.experts import products as products_lib

# R over an even share. A smaller one pads less and leaves more to later
# batches.
_SLACK = fractions.Fraction(5, 4)
# A later batch has an eighth of the rows of the first: E / 4 chunks of R / 2
# rows. Smaller chunks pad less and gather more parameters.
_CHUNKS_PER_EXPERT = 1 / 4
_CHUNK_SHARE_OF_R = fractions.Fraction(1, 2)
# Numbers of rows are multiples of this.
_ROW_MULTIPLE = 8


class FirstBatch(NamedTuple):
  """Up to R rows of each of all E experts; a `blocks.Block`.

  Attributes:
    index: `[E, R]` int32. Row numbers; N for an empty slot.
    slot: `[N]` int32. Where in the batch a row is; E R for a row that is not.
  """

  index: jax.Array
  slot: jax.Array

  def read(self, x: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return x.at[self.index].get(mode="fill", fill_value=0)

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    # Each row fetches its own: that is faster than a scatter of all slots.
    rows = rows.reshape(-1, *rows.shape[2:]).astype(x.dtype)
    is_here = jnp.expand_dims(
      self.slot < rows.shape[0], tuple(range(1, x.ndim))
    )
    return jnp.where(is_here, rows.at[self.slot].get(mode="clip"), x)

  def gather_weights(self, w: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return w

  def accumulate(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return w + value


class ChunkBatch(NamedTuple):
  """B chunks of R consecutive rows, of one expert each; a `blocks.Block`.

  Attributes:
    experts: `[B]` int32.
    start: `[B]` int32, the first row.
    mask: `[B, R]` bool. Which of the rows belong to the chunk.
  """

  experts: jax.Array
  start: jax.Array
  mask: jax.Array

  def read(self, x: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    row = self.start[:, None] + _arange(self.mask.shape[1])
    index = jnp.where(self.mask, row, x.shape[0])
    return x.at[index].get(mode="fill", fill_value=0)

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    rows = rows.astype(x.dtype)
    mask = jnp.expand_dims(self.mask, tuple(range(2, rows.ndim)))

    # Rows of a chunk are written as one slice, which is faster than a scatter.
    def write_chunk(i: jax.Array, x: jax.Array) -> jax.Array:
      old = lax.dynamic_slice_in_dim(x, self.start[i], rows.shape[1])
      new = jnp.where(mask[i], rows[i], old)
      return lax.dynamic_update_slice_in_dim(x, new, self.start[i], 0)

    return lax.fori_loop(0, rows.shape[0], write_chunk, x)

  def gather_weights(self, w: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return w[self.experts]

  def accumulate(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """See `blocks.Block`."""

    # One after the other: a scatter would add the chunks of one expert in an
    # order that changes from run to run. A chunk that is not there adds 0.
    def add_chunk(i: jax.Array, w: jax.Array) -> jax.Array:
      return w.at[self.experts[i]].add(value[i])

    return lax.fori_loop(0, value.shape[0], add_chunk, w)


class _Chunks(NamedTuple):
  """What the first batch leaves, cut into chunks; experts in order.

  Attributes:
    rows: of a chunk; static.
    first_row: `[E]` int32. The first row of an expert's first chunk.
    end: `[E]` int32. The row after the last of an expert.
    count: `[E]` int32. Chunks per expert.
    num_up_to: `[E]` int32. Chunks up to and including those of an expert.
  """

  rows: int
  first_row: jax.Array
  end: jax.Array
  count: jax.Array
  num_up_to: jax.Array


def products(expected_rows: int | None) -> products_lib.Products:
  """The products, in batches for a number of rows.

  Args:
    expected_rows: of the groups when loads are balanced; None for N.

  Returns:
    `Products`.
  """
  return blocks.products_over(
    functools.partial(for_each_batch, expected_rows=expected_rows)
  )


def for_each_batch(
  body: blocks.Body,
  carry: Any,
  group_sizes: jax.Array,
  n: int,
  expected_rows: int | None = None,
) -> Any:
  """Folds `body(batch, carry)` over batches that cover every group exactly.

  Args:
    body: of a `FirstBatch` or a `ChunkBatch`, and the carry; returns the carry.
    carry: pytree of arrays.
    group_sizes: `[E]` int32. At most N in sum.
    n: N.
    expected_rows: of the groups when loads are balanced, which R follows; None
      for N.

  Returns:
    The carry after the last batch.
  """
  if n == 0:
    return carry
  num_experts = group_sizes.shape[0]
  if expected_rows is None:
    expected_rows = n
  rows = _round_up(expected_rows, _SLACK / num_experts)
  if isinstance(n, int):  # not the symbolic size of an export
    rows = min(n, rows)
  ends = jnp.cumsum(group_sizes)
  begins = ends - group_sizes
  carry = body(_first_batch(begins, ends, rows, n), carry)
  if rows == n:
    return carry
  # At most N of a symbolic size, too.
  chunk_rows = jax.core.min_dim(n, _round_up(rows, _CHUNK_SHARE_OF_R))
  chunks = _cut(begins + rows, ends, chunk_rows)
  batch_size = math.ceil(_CHUNKS_PER_EXPERT * num_experts)

  def has_more(state: tuple[jax.Array, Any]) -> jax.Array:
    next_chunk, _ = state
    return next_chunk < chunks.num_up_to[-1]

  def run_batch(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    next_chunk, carry = state
    numbers = next_chunk + jnp.arange(batch_size, dtype=jnp.int32)
    return next_chunk + batch_size, body(
      _chunk_batch(numbers, chunks, n), carry
    )

  start = blocks.zeros((), jnp.int32, group_sizes), carry
  return lax.while_loop(has_more, run_batch, start)[1]


def _cut(begins: jax.Array, ends: jax.Array, rows: int) -> _Chunks:
  begins = jnp.minimum(begins, ends)
  count = -((begins - ends) // rows)
  return _Chunks(rows, begins, ends, count, jnp.cumsum(count))


def _first_batch(
  begins: jax.Array, ends: jax.Array, rows: int, n: int
) -> FirstBatch:
  index = begins[:, None] + _arange(rows)
  index = jnp.where(index < ends[:, None], index, n)
  num_experts = begins.shape[0]
  row = jnp.arange(n, dtype=jnp.int32)
  expert = jnp.sum(ends[None] <= row[:, None], axis=1, dtype=jnp.int32)
  in_expert = row - begins.at[expert].get(mode="clip")
  is_here = (expert < num_experts) & (in_expert < rows)
  slot = jnp.where(is_here, expert * rows + in_expert, num_experts * rows)
  return FirstBatch(index, slot)


def _chunk_batch(numbers: jax.Array, chunks: _Chunks, n: int) -> ChunkBatch:
  """The chunks of some numbers, `[B]` int32."""
  e = jnp.sum(
    chunks.num_up_to[None] <= numbers[:, None], axis=1, dtype=jnp.int32
  )
  # Past the last chunk e is the last expert, and `begin` is its end or beyond:
  # the chunk is empty.
  e = jnp.minimum(e, chunks.count.shape[0] - 1)
  in_expert = numbers - chunks.num_up_to[e] + chunks.count[e]
  begin = chunks.first_row[e] + in_expert * chunks.rows
  # A chunk that would stick out at the end starts earlier and masks more.
  start = jnp.minimum(begin, n - chunks.rows)
  row = start[:, None] + _arange(chunks.rows)
  end = jnp.minimum(begin + chunks.rows, chunks.end[e])
  return ChunkBatch(e, start, (begin[:, None] <= row) & (row < end[:, None]))


def _round_up(rows: int, share: fractions.Fraction) -> int:
  """A share of rows, rounded up to a multiple of _ROW_MULTIPLE."""
  unit = share.denominator * _ROW_MULTIPLE
  return max(-(-share.numerator * rows // unit), 1) * _ROW_MULTIPLE


def _arange(size: int) -> jax.Array:
  """`[1, size]` int32, to be added to the first of so many numbers."""
  return jnp.arange(size, dtype=jnp.int32)[None]
