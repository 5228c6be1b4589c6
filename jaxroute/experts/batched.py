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


class RowBatch(NamedTuple):
  """Up to R rows of each of B experts; a `blocks.Block`.

  Attributes:
    experts: `[B]` int32, E for a chunk that is not there; None for all E in
      order.
    index: `[B, R]` int32. Row numbers; an empty slot has a number of its own,
      from N on.
  """

  experts: jax.Array | None
  index: jax.Array

  def read(self, x: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return x.at[self.index].get(mode="fill", fill_value=0)

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return x.at[self.index].set(
      rows.astype(x.dtype), mode="drop", unique_indices=True
    )

  def gather_weights(self, w: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return w if self.experts is None else w.at[self.experts].get(mode="clip")

  def accumulate(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    if self.experts is None:
      return w + value
    # A scatter of all chunks would add those of one expert in an order that
    # changes from run to run. They are summed before, and one of them is
    # scattered.
    is_same = self.experts[:, None] == self.experts[None]
    total = jnp.sum(
      jnp.where(is_same[:, :, None, None], value[None], 0), axis=1
    )
    chunk = jnp.arange(is_same.shape[0], dtype=jnp.int32)
    is_first = jnp.argmax(is_same, axis=1).astype(jnp.int32) == chunk
    target = jnp.where(is_first, self.experts, w.shape[0] + chunk)
    return w.at[target].add(total, mode="drop", unique_indices=True)


class _Chunks(NamedTuple):
  """What the first batch leaves, cut into chunks; experts in order.

  Attributes:
    rows: of a chunk; static.
    first_row: `[E]` int32. The first row of an expert's first chunk.
    end: `[E]` int32. The row after the last of an expert.
    count: `[E]` int32. Chunks per expert.
    num_before: `[E]` int32. Chunks up to and with those of an expert.
  """

  rows: int
  first_row: jax.Array
  end: jax.Array
  count: jax.Array
  num_before: jax.Array


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
    body: of a `RowBatch` and the carry; returns the carry.
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
  carry = body(RowBatch(None, _row_index(begins, ends, rows, n)), carry)
  if rows == n:
    return carry
  chunks = _cut(begins + rows, ends, _round_up(rows, _CHUNK_SHARE_OF_R))
  batch_size = math.ceil(_CHUNKS_PER_EXPERT * num_experts)

  def has_more(state: tuple[jax.Array, Any]) -> jax.Array:
    next_chunk, _ = state
    return next_chunk < chunks.num_before[-1]

  def run_batch(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    next_chunk, carry = state
    numbers = next_chunk + jnp.arange(batch_size, dtype=jnp.int32)
    return next_chunk + batch_size, body(_batch(numbers, chunks, n), carry)

  start = blocks.zeros((), jnp.int32, group_sizes), carry
  return lax.while_loop(has_more, run_batch, start)[1]


def _cut(begins: jax.Array, ends: jax.Array, rows: int) -> _Chunks:
  begins = jnp.minimum(begins, ends)
  count = -((begins - ends) // rows)
  return _Chunks(rows, begins, ends, count, jnp.cumsum(count))


def _batch(numbers: jax.Array, chunks: _Chunks, n: int) -> RowBatch:
  """The chunks of some numbers, `[B]` int32."""
  experts = jnp.sum(
    chunks.num_before[None] <= numbers[:, None], axis=1, dtype=jnp.int32
  )
  # Past the last chunk e is the last expert, and `begin` is its end or beyond:
  # the chunk is empty.
  e = jnp.minimum(experts, chunks.count.shape[0] - 1)
  in_expert = numbers - chunks.num_before[e] + chunks.count[e]
  begin = chunks.first_row[e] + in_expert * chunks.rows
  return RowBatch(experts, _row_index(begin, chunks.end[e], chunks.rows, n))


def _round_up(rows: int, share: fractions.Fraction) -> int:
  """A share of rows, rounded up to a multiple of _ROW_MULTIPLE."""
  unit = share.denominator * _ROW_MULTIPLE
  return max(-(-share.numerator * rows // unit), 1) * _ROW_MULTIPLE


def _row_index(
  begins: jax.Array, ends: jax.Array, rows: int, n: int
) -> jax.Array:
  """`[B, rows]`: row numbers from `begins` on; past `ends` distinct, from n on."""
  slot = jnp.arange(begins.shape[0] * rows, dtype=jnp.int32)
  slot = slot.reshape(-1, rows)
  row = begins[:, None] + slot[:1]
  return jnp.where(row < ends[:, None], row, n + slot)
