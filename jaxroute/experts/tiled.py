# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Walking rows by tiles, one expert's at a time: for the CPU.

A tile is a fixed number of consecutive rows of which those of one group count.
Its product is a dense one over a slice of the rows, which runs near the speed of
one dense product over all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import blocks

# A tile's fixed cost is that of some 50 rows, hence large ones; a group's last
# tile is the smallest that holds what is left, in steps of the second number.
_MAX_TILE = 512
_TILE_STEP = 64


class Tile(NamedTuple):
  """R consecutive rows, of which those of `mask` belong to `expert`.

  Attributes:
    expert: int32 scalar.
    start: int32 scalar, the first row.
    mask: `[R, 1]` bool.
  """

  expert: jax.Array
  start: jax.Array
  mask: jax.Array

  def read(self, x):
    rows = lax.dynamic_slice_in_dim(x, self.start, self.mask.shape[0])
    return jnp.where(self.mask, rows, 0)

  def write(self, x, rows):
    old = lax.dynamic_slice_in_dim(x, self.start, self.mask.shape[0])
    new = jnp.where(self.mask, rows.astype(x.dtype), old)
    return lax.dynamic_update_slice_in_dim(x, new, self.start, 0)

  def of(self, w):
    return lax.dynamic_index_in_dim(w, self.expert, keepdims=False)

  def add(self, w, value):
    new = (self.of(w) + value)[None]
    return lax.dynamic_update_slice_in_dim(w, new, self.expert, 0)


def fold(body: blocks.Body, init: Any, group_sizes: jax.Array, n: int) -> Any:
  """Folds `body(tile, carry)` over tiles that cover every group exactly.

  A group of r rows is `r // _MAX_TILE` full tiles and one for the rest, rounded
  up to steps. One loop per tile size: shapes in it are static, its length isn't.

  Args:
    body: of a `Tile` and the carry; returns the carry.
    init: pytree of arrays.
    group_sizes: `[E]` int32. At most N in sum.
    n: N.

  Returns:
    The carry after the last tile.
  """
  if n == 0:
    return init
  step = _TILE_STEP
  largest = min(_MAX_TILE, -(-n // step) * step)
  ends = jnp.cumsum(group_sizes)
  full = group_sizes // largest
  rest = -(-(group_sizes % largest) // step) * step
  for size in range(largest, 0, -step):
    rows = min(size, n)
    count = (rest == size).astype(jnp.int32)
    first = ends - group_sizes
    if size == largest:
      count += full
    else:
      first += full * largest
    stops = jnp.cumsum(count)

    def at(i, carry, rows=rows, count=count, first=first, stops=stops):
      e = jnp.sum(stops <= i, dtype=jnp.int32)
      begin = first[e] + (i - stops[e] + count[e]) * rows
      # A tile that would stick out at the end starts earlier and masks more.
      start = jnp.minimum(begin, n - rows)
      row = start + jnp.arange(rows, dtype=jnp.int32)
      mask = (begin <= row) & (row < ends[e])
      return body(Tile(e, start, mask[:, None]), carry)

    init = lax.fori_loop(0, stops[-1], at, init)
  return init
