# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where the rows of every group, and of every tile of a grouped product, are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

PACK = 8
"""Rows of a tile in shared memory come in packs of so many."""


class Groups(NamedTuple):
  """Where the rows of every group are, `[E]` int32 each.

  Attributes:
    start: the first row, rounded down to a multiple of PACK.
    begin: the first row.
    end: the row after the last.
  """

  start: jax.Array
  begin: jax.Array
  end: jax.Array


def groups_of(group_sizes: jax.Array) -> Groups:
  """The rows of every group.

  Args:
    group_sizes: `[E]` int32, of groups one after the other.

  Returns:
    `Groups`.
  """
  ends = jnp.cumsum(group_sizes)
  begins = ends - group_sizes
  return Groups(begins // PACK * PACK, begins, ends)


class RowTiles(NamedTuple):
  """The rows of every tile of `matmul`, in order; those past the groups last.

  Attributes:
    group: `[tiles]` int32; E for rows past the groups.
    start: `[tiles]` int32. The first row that is read, a multiple of PACK.
    begin: `[tiles]` int32. The first row of the tile that is the group's.
    end: `[tiles]` int32. The row of the tile after the group's last.
    count: `[1]` int32. How many tiles there are.
  """

  group: jax.Array
  start: jax.Array
  begin: jax.Array
  end: jax.Array
  count: jax.Array


def row_tiles_of(group_sizes: jax.Array, num_rows: int, m: int) -> RowTiles:
  """The tiles of `grouped.matmul`, none of which has rows of two groups.

  Args:
    group_sizes: `[E]` int32. At most `num_rows` in sum.
    num_rows: N.
    m: rows of a tile.

  Returns:
    `RowTiles`.
  """
  rest = num_rows - jnp.sum(group_sizes, dtype=jnp.int32)
  sizes = jnp.concatenate([group_sizes, rest[None]])
  groups = groups_of(sizes)
  counts = jnp.where(sizes > 0, pl.cdiv(groups.end - groups.start, m), 0)
  num_up_to = jnp.cumsum(counts)
  # A group has up to PACK - 1 rows before it, and fills its last tile in part.
  bound = (num_rows + len(sizes) * (m + PACK - 2)) // m
  tile = jnp.arange(bound, dtype=jnp.int32)
  group = jnp.sum(num_up_to[None] <= tile[:, None], axis=1, dtype=jnp.int32)
  group = jnp.minimum(group, len(group_sizes))
  start = groups.start[group] + m * (tile - num_up_to[group] + counts[group])
  begin = jnp.clip(groups.begin[group] - start, 0, m)
  end = jnp.clip(groups.end[group] - start, 0, m)
  return RowTiles(group, start, begin, end, num_up_to[-1:])
