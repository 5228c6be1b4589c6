# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Walking rows by many experts at once, in batched products: for NVIDIA GPUs.

There XLA makes of `jax.lax.ragged_dot` a dense product of every row with every
expert. Here the first round takes up to R rows of each of the E experts, a little
more than their share, with the parameters where they are. Balanced, that is all.
What is left is cut into chunks and taken some chunks a round, with the parameters
of their experts gathered, in as many rounds as the loads need. So the work follows
the rows: 1.25 N of them when balanced and some 2.4 N at worst.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import blocks

# Of the first round over an equal share. Less padding costs more later rounds.
_SLACK = 1.25
# Chunks of a later round per expert, and rows of a chunk per row of the first
# round: an eighth of its rows. Smaller chunks pad less and gather more.
_CHUNKS = 1 / 4
_CHUNK = 1 / 2
# What rows are rounded up to.
_STEP = 8


class Round(NamedTuple):
  """Up to R rows of each of G experts.

  Attributes:
    experts: `[G]` int32, E for a chunk that is not there; None for all E in order.
    index: `[G, R]` int32. The rows, distinct numbers from N on for none.
  """

  experts: jax.Array | None
  index: jax.Array

  def read(self, x):
    return x.at[self.index].get(mode="fill", fill_value=0)

  def write(self, x, rows):
    return x.at[self.index].set(
      rows.astype(x.dtype), mode="drop", unique_indices=True
    )

  def of(self, w):
    return w if self.experts is None else w.at[self.experts].get(mode="clip")

  def add(self, w, value):
    if self.experts is None:
      return w + value
    # Chunks of one expert are summed before one of them is added: a scatter of
    # all would sum in an order that changes from run to run.
    same = self.experts[:, None] == self.experts[None]
    total = jnp.sum(jnp.where(same[:, :, None, None], value[None], 0), axis=1)
    chunk = jnp.arange(same.shape[0], dtype=jnp.int32)
    first = jnp.argmax(same, axis=1) == chunk
    at = jnp.where(first, self.experts, w.shape[0] + chunk)
    return w.at[at].add(total, mode="drop", unique_indices=True)


def fold(
  body: blocks.Body,
  init: Any,
  group_sizes: jax.Array,
  n: int,
  expected_rows: int | None = None,
) -> Any:
  """Folds `body(round, carry)` over rounds that cover every group exactly.

  Args:
    body: of a `Round` and the carry; returns the carry.
    init: pytree of arrays.
    group_sizes: `[E]` int32. At most N in sum.
    n: N.
    expected_rows: of the groups when balanced, what the rounds are cut for; None
      for N.

  Returns:
    The carry after the last round.
  """
  if n == 0:
    return init
  num_experts = group_sizes.shape[0]
  expected = n if expected_rows is None else expected_rows
  rows = min(n, _round_up(_SLACK * expected / num_experts))
  ends = jnp.cumsum(group_sizes)
  begins = ends - group_sizes
  carry = body(Round(None, _index(begins, ends, rows, n)), init)
  if rows == n:
    return carry
  size, count = _round_up(_CHUNK * rows), math.ceil(_CHUNKS * num_experts)
  begins = jnp.minimum(begins + rows, ends)
  chunks = -((begins - ends) // size)
  stops = jnp.cumsum(chunks)

  def more(state):
    return state[0] < stops[-1]

  def step(state):
    chunk = state[0] + jnp.arange(count, dtype=jnp.int32)
    experts = jnp.sum(stops[None] <= chunk[:, None], axis=1, dtype=jnp.int32)
    e = jnp.minimum(experts, num_experts - 1)
    begin = begins[e] + (chunk - stops[e] + chunks[e]) * size
    # Of the last expert if there is no such chunk: it begins where that ends.
    carry = body(Round(experts, _index(begin, ends[e], size, n)), state[1])
    return state[0] + count, carry

  start = blocks.zeros((), jnp.int32, group_sizes)
  return lax.while_loop(more, step, (start, carry))[1]


def _round_up(rows):
  return max(1, math.ceil(rows / _STEP)) * _STEP


def _index(begins, ends, rows, n):
  """`[G, rows]`: row numbers from `begins` on; past `ends` distinct, from n on."""
  slot = jnp.arange(begins.shape[0] * rows, dtype=jnp.int32)
  slot = slot.reshape(-1, rows)
  row = begins[:, None] + slot[:1]
  return jnp.where(row < ends[:, None], row, n + slot)
