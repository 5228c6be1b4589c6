# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a block works on, and where its threads are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.refs import Buffers, Operands, Results
from jaxroute.kernels.gpu.threads import THREADS, WARP, Threads


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a thread is, `[128]` int32.

  Attributes:
    row: 0 to 127.
    lane: of its warp.
    warp: of the block.
    part: which part of its token's experts it has.
    token: of the tile.
  """

  row: jax.Array
  lane: jax.Array
  warp: jax.Array
  part: jax.Array
  token: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """The tokens of a block, while it is traced.

  Attributes:
    plan: the static sizes of the call.
    number: of the block; an int32 scalar, as are the next two.
    first_token: of the tile.
    first_own: the first token that no other block has.
    place: of the threads.
    operands: in global memory.
    results: in global memory.
    buffers: in shared memory.
  """

  plan: Plan
  number: jax.Array
  first_token: jax.Array
  first_own: jax.Array
  place: Place
  operands: Operands
  results: Results
  buffers: Buffers

  @property
  def threads(self) -> Threads:
    """The operations of a thread."""
    return self.plan.threads

  def is_own(self, token: jax.Array) -> jax.Array:
    """Whether tokens `[128]`, of all, are results of this block; bool."""
    return (token >= self.first_own) & (token < self.plan.tokens)


def tile_of(
  plan: Plan, operands: Operands, results: Results, buffers: Buffers
) -> Tile:
  """The tile of a block."""
  number, row = lax.axis_index("block"), plan.threads.index()
  first_own = number * plan.tile_tokens
  # The last tile ends with the last token, and leaves out those of the one before.
  last = plan.padded_tokens - plan.tile_tokens
  return Tile(
    plan=plan,
    number=number,
    first_token=jnp.minimum(first_own, last),
    first_own=first_own,
    place=Place(
      row=row,
      lane=row & (WARP - 1),
      warp=row >> 5,
      part=row & (plan.lanes - 1),
      token=row >> (plan.lanes.bit_length() - 1),
    ),
    operands=operands,
    results=results,
    buffers=buffers,
  )


def loop(steps: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
  """`lax.fori_loop` from 0, but for a single step, which is not looped."""
  return body(0, carry) if steps == 1 else lax.fori_loop(0, steps, body, carry)


def over_lanes(
  plan: Plan,
  x: jax.Array,
  combine: Callable[[jax.Array, jax.Array], jax.Array],
  lanes: int,
) -> jax.Array:
  """Combines what so many threads side by side hold; all get the same."""
  distance = 1
  while distance < lanes:
    x = combine(x, plan.threads.shuffle_xor(x, distance))
    distance *= 2
  return x


def place_of(plan: Plan, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The part of an expert, and the place of its rows in `bits`, of the first warp."""
  part = divide(expert, plan.part)
  column = expert - part * plan.part
  chunk = divide(column, plan.width)
  return part, chunk * THREADS + (column & (plan.width - 1))


def rows_of_first_part(plan: Plan) -> np.int32:
  """The rows of a warp that have the first part of a token's experts, as bits."""
  return np.uint32(sum(1 << i for i in range(0, WARP, plan.lanes))).astype(
    np.int32
  )


def divide(x: jax.Array, by: int) -> jax.Array:
  """`x // by` of int32 that are not negative."""
  if by & (by - 1):
    return lax.div(x, jnp.full_like(x, by))
  return x >> (by.bit_length() - 1)
