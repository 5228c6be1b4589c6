# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped matrix products for the CPU: a loop over tiles of rows.

A tile is a fixed number of consecutive rows of which those of one group count.
Its product is a dense one over a slice of the rows, which runs near the speed of
one dense product over all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import dispatch

# A tile's fixed cost is that of some 50 rows, hence large ones; a group's last
# tile is the smallest that holds what is left, in steps of the second number.
_MAX_TILE = 512
_TILE_STEP = 64


def dot(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
  """A dense product with float32 sums and a float32 result."""
  return jnp.dot(lhs, rhs, preferred_element_type=jnp.float32)


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


def fold(
  body: Callable[..., Any], init: Any, group_sizes: jax.Array, n: int
) -> Any:
  """Folds `body(tile, carry)` over tiles that cover every group exactly.

  A group of r rows is `r // _MAX_TILE` full tiles and one for the rest, rounded
  up to steps. One loop per tile size: shapes in it are static, its length isn't.
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


def zeros(shape, dtype, like):
  """Zeros that vary over the mesh like another array, as loop carries must."""
  return dispatch.vary_alike((jnp.zeros(shape, dtype), like))[0]


def matmul(dtype, lhs, rhs, group_sizes):
  """`[N, D]` times `[E, D, F]` by groups; see `experts.grouped_matmul`."""
  n = lhs.shape[0]

  def body(tile, out):
    return tile.write(out, dot(tile.read(lhs), tile.of(rhs)))

  out = zeros((n, rhs.shape[2]), dtype, lhs)
  return fold(body, out, group_sizes, n)


def outer(lhs, d_out, group_sizes):
  """`[E, D, F]`: per group, the transpose of its `lhs` rows times `d_out`."""

  def body(tile, total):
    return tile.add(total, dot(tile.read(lhs).T, tile.read(d_out)))

  shape = (group_sizes.shape[0], lhs.shape[1], d_out.shape[1])
  total = zeros(shape, jnp.float32, lhs)
  return fold(body, total, group_sizes, lhs.shape[0]).astype(lhs.dtype)
