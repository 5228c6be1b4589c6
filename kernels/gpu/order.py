# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order on GPU, from what the routing kernel counted: no sort.

`rank` makes the rank of every assignment among those of its expert from its rank in a
tile of tokens, and `order` its row in expert order from that. Both take assignments
flat, as `[N]`.

In `rank` a block is for some tiles in succession, which are counted together as well:
a *super-tile*. It adds up the counts of the super-tiles before its own, then of its
tiles. In `order` a block adds up the loads of all experts, which are few.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute.kernels.gpu import mosaic, threads, twins
from jaxroute.kernels.gpu.threads import THREADS, WARP, Ref, Threads, full

MAX_EXPERTS = 1024
"""What `order` has threads for."""

# Loads from memory that a thread has under way at once.
_LOADS = 8
# Assignments for a thread of `order`.
_ROUNDS = 4


def rank(
  expert_idx: jax.Array,
  tile_rank: jax.Array,
  counts: jax.Array,
  super_counts: jax.Array,
  *,
  num_experts: int,
  tile_choices: int,
  super_tiles: int,
  interpret: bool,
) -> jax.Array:
  """Ranks of assignments within their expert, or among all that are not counted.

  Args:
    expert_idx: `[N]` int32.
    tile_rank: `[N]` int32. Ranks within the expert and tile; the complement of that
      among those that are not counted.
    counts: `[tiles * pitch]` int32: of every tile, assignments of E experts, and of
      those that are not counted.
    super_counts: `[super-tiles * pitch]` int32: sums of `super_tiles` of these.
    num_experts: E.
    tile_choices: assignments of a tile.
    super_tiles: tiles of a super-tile.
    interpret: whether Pallas interprets the kernel.

  Returns:
    `[N]` int32.
  """
  n = expert_idx.shape[0]
  tiles = -(-n // tile_choices)
  pitch = counts.shape[0] // tiles
  columns = num_experts + 1
  ops = _threads(interpret)

  def kernel(
    expert_ref: Ref,
    counts_ref: Ref,
    super_counts_ref: Ref,
    rank_ref: Ref,
    first_ref: Ref,
  ) -> None:
    super_tile = lax.axis_index("block")
    thread = ops.index()
    for first in range(0, columns, THREADS):
      column = first + thread
      is_column = threads.as_words(column < columns)
      column = jnp.minimum(column, columns - 1)
      total = _sum_rows(ops, super_counts_ref, column, pitch, super_tile)
      for tile in range(super_tiles):
        ops.scatter(first_ref, tile * columns + column, total, is_column)
        row = jnp.minimum(super_tile * super_tiles + tile, tiles - 1)
        total = total + ops.gather(counts_ref, row * pitch + column)
    ops.block_barrier()
    choices = super_tiles * tile_choices

    def run_round(round_: jax.Array, carry: int) -> int:
      local = round_ * THREADS + thread
      index = super_tile * choices + local
      is_here = threads.as_words((local < choices) & (index < n))
      index, local = jnp.minimum(index, n - 1), jnp.minimum(local, choices - 1)
      expert, rank = (ops.gather(x, index) for x in (expert_ref, rank_ref))
      column = jnp.where(rank < 0, num_experts, expert)
      rank = jnp.where(rank < 0, ~rank, rank)
      tile = lax.div(local, jnp.full_like(local, tile_choices))
      rank = rank + ops.gather(first_ref, tile * columns + column)
      ops.scatter(rank_ref, index, rank, is_here)
      return carry

    lax.fori_loop(0, -(-choices // THREADS), run_round, 0)

  # In place: a thread reads what it writes.
  ranks = jax.new_ref(tile_rank)
  mosaic.call(
    kernel,
    (),
    name="rank",
    blocks=-(-tiles // super_tiles),
    scratch_types={"first_ref": _words(super_tiles * columns)},
    interpret=interpret,
  )(expert_idx, counts, super_counts, ranks)
  return ranks[...]


def _sum_rows(
  ops: Threads, ref: Ref, column: jax.Array, pitch: int, rows: jax.Array
) -> jax.Array:
  """Sums the first `rows` rows of a table, for every thread in its column."""

  def add(step: jax.Array, total: jax.Array) -> jax.Array:
    for i in range(_LOADS):
      row = step * _LOADS + i
      is_row = row < rows
      value = ops.gather(ref, jnp.where(is_row, row, 0) * pitch + column)
      total = total + jnp.where(is_row, value, 0)
    return total

  return lax.fori_loop(
    0, lax.div(rows + (_LOADS - 1), _LOADS), add, full(0, jnp.int32)
  )


def order(
  expert_idx: jax.Array,
  rank: jax.Array,
  load: jax.Array,
  token_mask: jax.Array | None,
  *,
  top_k: int,
  capacity: int | None,
  interpret: bool,
) -> tuple[jax.Array, ...]:
  """The assignments in expert order; see `jaxroute.dispatch.sort_by_expert`.

  Those that no expert receives come last: first those that are not counted, then
  those over the capacity of the experts in turn.

  Args:
    expert_idx: `[N]` int32. Those outside `[0, E)` are not counted.
    rank: `[N]` int32, from `rank`.
    load: `[E]` int32. Assignments of every expert, at most 1024.
    token_mask: `[T]` bool. Which tokens are counted; None for all.
    top_k: K.
    capacity: C, or None.
    interpret: whether Pallas interprets the kernel.

  Returns:
    `group_sizes`, `[E]` int32; `permutation` and `inverse_permutation`, `[N]` int32.
  """
  n, num_experts = expert_idx.shape[0], load.shape[0]
  if n == 0:
    return jnp.zeros_like(load), *(jnp.zeros(0, jnp.int32),) * 2
  ops = _threads(interpret)
  block = _ROUNDS * THREADS
  masks = () if token_mask is None else (token_mask,)

  def kernel(
    expert_ref: Ref,
    rank_ref: Ref,
    load_ref: Ref,
    *refs: Ref,
    start_ref: Ref,
    warp_ref: Ref,
  ) -> None:
    *mask_ref, sizes_ref, permutation_ref, inverse_ref = refs
    thread, number = ops.index(), lax.axis_index("block")
    # One block is enough to write what all find.
    sizes = sizes_ref, full(0, jnp.int32) + jnp.where(number == 0, 1, 0)
    owned, counted = _starts(
      ops, load_ref, sizes, start_ref, warp_ref, capacity
    )
    for round_ in range(_ROUNDS):
      index = number * block + round_ * THREADS + thread
      is_here = threads.as_words(index < n)
      index = jnp.minimum(index, n - 1)
      expert, rank = (ops.gather(x, index) for x in (expert_ref, rank_ref))
      is_counted = (expert >= 0) & (expert < num_experts)
      if mask_ref:
        token = lax.div(index, jnp.full_like(index, top_k))
        is_counted = is_counted & (ops.gather(mask_ref[0], token) != 0)
      expert = jnp.where(is_counted, expert, 0)
      row = ops.gather(start_ref, expert) + rank
      if capacity is not None:
        dropped = ops.gather(start_ref, num_experts + expert) + rank - capacity
        row = jnp.where(rank < capacity, row, owned + (n - counted) + dropped)
      row = jnp.where(is_counted, row, owned + rank)
      # A rank that is none must not be written outside of the results.
      row = jnp.clip(row, 0, n - 1)
      ops.scatter(inverse_ref, index, row, is_here)
      ops.scatter(permutation_ref, row, index, is_here)

  lists = 1 if capacity is None else 2
  return mosaic.call(
    kernel,
    [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (num_experts, n, n)],
    name="order",
    blocks=-(-n // block),
    scratch_types={
      "start_ref": _words(lists * num_experts),
      "warp_ref": _words(2 * THREADS // WARP),
    },
    interpret=interpret,
  )(expert_idx, rank, load, *masks)


def _starts(
  ops: Threads,
  load_ref: Ref,
  sizes: tuple[Ref, jax.Array],
  start_ref: Ref,
  warp_ref: Ref,
  capacity: int | None,
) -> tuple[jax.Array, jax.Array]:
  """Writes where the rows of every expert begin; and with a capacity, its drops.

  Args:
    ops: the operations of a thread.
    load_ref: `[E]`.
    sizes: `[E]`, for the rows of every expert; and int32, whether to write them.
    start_ref: `[E]`, or twice that with a capacity. In shared memory.
    warp_ref: `[8]`. In shared memory.
    capacity: C, or None.

  Returns:
    Rows of all experts and assignments of all, `[128]` in which all are equal.
  """
  num_experts, thread = load_ref.shape[0], ops.index()
  per_thread = -(-num_experts // THREADS)
  loads = []
  for i in range(per_thread):
    expert = thread * per_thread + i
    load = ops.gather(load_ref, jnp.minimum(expert, num_experts - 1))
    loads.append(jnp.where(expert < num_experts, load, 0))
  accepted, totals = loads, []
  if capacity is not None:
    accepted = [jnp.minimum(load, capacity) for load in loads]
  dropped = [a - b for a, b in zip(loads, accepted, strict=True)]
  lists = [accepted] if capacity is None else [accepted, dropped]
  for i, values in enumerate(lists):
    before, total = _scan(ops, sum(values[1:], values[0]), warp_ref, i)
    totals.append(total)
    for j, value in enumerate(values):
      expert = thread * per_thread + j
      place = jnp.minimum(expert, num_experts - 1) + i * num_experts
      is_expert = threads.as_words(expert < num_experts)
      ops.scatter(start_ref, place, before, is_expert)
      if i == 0:
        sizes_ref, is_writer = sizes
        ops.scatter(sizes_ref, place, value, is_expert & is_writer)
      before = before + value
  ops.block_barrier()
  return totals[0], sum(totals[1:], totals[0])


def _scan(
  ops: Threads, x: jax.Array, warp_ref: Ref, number: int
) -> tuple[jax.Array, jax.Array]:
  """The sum of `x` over the threads before each, and over all."""
  thread, warps = ops.index(), THREADS // WARP
  lane, warp = thread & (WARP - 1), thread >> 5
  before, total = full(0, jnp.int32), x
  for bit in range(5):
    other = ops.shuffle_xor(total, 1 << bit)
    before = before + jnp.where(lane & (1 << bit) != 0, other, 0)
    total = total + other
  first = number * warps
  ops.scatter(warp_ref, first + warp, total, threads.as_words(lane == 0))
  ops.block_barrier()
  sums = [
    ops.gather(warp_ref, full(first + i, jnp.int32)) for i in range(warps)
  ]
  for i, value in enumerate(sums):
    before = before + jnp.where(warp > i, value, 0)
  return before, functools.reduce(jnp.add, sums)


def _threads(interpret: bool) -> Threads:
  return twins.Twins() if interpret else Threads()


def _words(size: int) -> Any:
  return mosaic.plgpu.SMEM((size,), jnp.int32)
