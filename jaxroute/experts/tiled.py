# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts by tiles, one expert's rows at a time: for CPU.

A tile is a fixed number of consecutive rows of which those of one group count.
Its product is a dense one over a slice of the rows, which runs near the speed
of one dense product over all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import ladder
from jaxroute.experts import blocks

# A tile costs about as much as 50 rows before its first, hence large tiles. The
# last tile of a group is the smallest multiple of _TILE_STEP rows that holds
# what is left.
_MAX_TILE = 512
_TILE_STEP = 64


class Tile(NamedTuple):
  """R consecutive rows, of which those of `mask` belong to `expert`.

  A `blocks.Block`.

  Attributes:
    expert: int32 scalar.
    start: int32 scalar, the first row.
    mask: `[R, 1]` bool.
  """

  expert: jax.Array
  start: jax.Array
  mask: jax.Array

  def read(self, x: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    rows = lax.dynamic_slice_in_dim(x, self.start, self.mask.shape[0])
    return jnp.where(self.mask, rows, 0)

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    old = lax.dynamic_slice_in_dim(x, self.start, self.mask.shape[0])
    new = jnp.where(self.mask, rows.astype(x.dtype), old)
    return lax.dynamic_update_slice_in_dim(x, new, self.start, 0)

  def gather_weights(self, w: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    return lax.dynamic_index_in_dim(w, self.expert, keepdims=False)

  def accumulate(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """See `blocks.Block`."""
    new = (self.gather_weights(w) + value)[None]
    return lax.dynamic_update_slice_in_dim(w, new, self.expert, 0)


class _TilesOfOneSize(NamedTuple):
  """Where the tiles of one size lie; experts in order, each with its tiles in order.

  Attributes:
    count: `[E]` int32. Tiles of this size per expert.
    first_row: `[E]` int32. The first row of an expert's first tile of this
      size.
    num_up_to: `[E]` int32. Tiles of this size up to and including those of an
      expert.
  """

  count: jax.Array
  first_row: jax.Array
  num_up_to: jax.Array


def for_each_tile(
  body: blocks.Body, carry: Any, group_sizes: jax.Array, n: int
) -> Any:
  """Folds `body(tile, carry)` over tiles that cover every group exactly.

  A group of r rows is `r // _MAX_TILE` full tiles and one for the rest, rounded
  up to a multiple of _TILE_STEP. One loop per tile size: the shapes in it are
  static, its length is not.

  Args:
    body: of a `Tile` and the carry; returns the carry.
    carry: pytree of arrays.
    group_sizes: `[E]` int32. At most N in sum.
    n: N.

  Returns:
    The carry after the last tile.
  """
  if not isinstance(n, int):
    raise ladder.Refusal(f"tiles need a number of rows, got {n}")
  if n == 0:
    return carry
  largest = min(_MAX_TILE, _round_up(n))
  ends = jnp.cumsum(group_sizes)
  for size in range(largest, 0, -_TILE_STEP):
    tiles = _tiles_of(size, largest, group_sizes, ends)

    def run_tile(
      i: jax.Array,
      carry: Any,
      size: int = size,
      tiles: _TilesOfOneSize = tiles,
    ) -> Any:
      return body(_tile(i, min(size, n), tiles, ends, n), carry)

    carry = lax.fori_loop(0, tiles.num_up_to[-1], run_tile, carry)
  return carry


def _tiles_of(
  size: int, largest: int, group_sizes: jax.Array, ends: jax.Array
) -> _TilesOfOneSize:
  full = group_sizes // largest
  rest = _round_up(group_sizes % largest)
  count = (rest == size).astype(jnp.int32)
  first_row = ends - group_sizes
  if size == largest:
    count += full
  else:
    first_row += full * largest
  return _TilesOfOneSize(count, first_row, jnp.cumsum(count))


def _tile(
  i: jax.Array, rows: int, tiles: _TilesOfOneSize, ends: jax.Array, n: int
) -> Tile:
  """The i-th tile of a size."""
  e = jnp.sum(tiles.num_up_to <= i, dtype=jnp.int32)
  number = i - tiles.num_up_to[e] + tiles.count[e]
  begin = tiles.first_row[e] + number * rows
  # A tile that would stick out at the end starts earlier and masks more.
  start = jnp.minimum(begin, n - rows)
  row = start + jnp.arange(rows, dtype=jnp.int32)
  mask = (begin <= row) & (row < ends[e])
  return Tile(e, start, mask[:, None])


def _round_up(rows: Any) -> Any:
  return -(-rows // _TILE_STEP) * _TILE_STEP


PRODUCTS = blocks.products_over(for_each_tile)
