# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order on GPU, from what the routing kernel counted: no sort.

`rank` makes the rank of every assignment among those of its expert from its rank in a
tile of tokens, and `order` its row in expert order from that. Both take assignments
flat, as `[N]`.

In `rank` a block is for some tiles in succession. It begins by adding up the counts of
all tiles in front. The routing kernel has summed these in spans of two lengths, so that
there are few rows to add. In `order` a block adds up the loads of all experts. Both
load much before they use any of it, for memory is far.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute.kernels.gpu import mosaic, threads, twins
from jaxroute.kernels.gpu.threads import THREADS, WARP, Ref, Threads, full

# What `order` has threads for.
_MAX_EXPERTS = 1024

SPANS = 8, 128
"""Tiles whose counts are summed together: those of a block of `rank`, and of 16."""

# Numbers that a thread loads from memory at once.
_LOADS = 48
# Assignments that a thread of `rank` has at once, and of `order` in all.
_ROUNDS = 4


def unsupported(num_experts: int) -> str | None:
  """Why there is no order of so many experts, or None."""
  if num_experts > _MAX_EXPERTS:
    return f"`num_experts` may be at most {_MAX_EXPERTS}, got {num_experts}"
  return None


def span_rows(tiles: int) -> tuple[int, ...]:
  """Spans of each length that so many tiles have."""
  return tuple(-(-tiles // span) for span in SPANS)


def rank(
  expert_idx: jax.Array,
  tile_rank: jax.Array,
  counts: jax.Array,
  span_counts: jax.Array,
  *,
  num_experts: int,
  tile_choices: int,
  interpret: bool,
) -> jax.Array:
  """Ranks of assignments within their expert, or among all that are not counted.

  Args:
    expert_idx: `[N]` int32.
    tile_rank: `[N]` int32. Ranks within the expert and tile; the complement of that
      among those that are not counted.
    counts: `[tiles * pitch]` int32: of every tile, assignments of E experts, and of
      those that are not counted.
    span_counts: `[spans * pitch]` int32: their sums over spans of the first length,
      and then of the second.
    num_experts: E.
    tile_choices: assignments of a tile.
    interpret: whether Pallas interprets the kernel.

  Returns:
    `[N]` int32.
  """
  n = expert_idx.shape[0]
  tiles = -(-n // tile_choices)
  pitch = counts.shape[0] // tiles
  block_tiles, long_span = SPANS
  blocks, _ = span_rows(tiles)
  ops = twins.operations(interpret)

  def kernel(
    expert_ref: Ref,
    tile_rank_ref: Ref,
    counts_ref: Ref,
    span_counts_ref: Ref,
    rank_ref: Ref,
    *,
    first_ref: Ref,
  ) -> None:
    block, thread = lax.axis_index("block"), ops.index()
    columns = [first + thread for first in range(0, num_experts + 1, THREADS)]
    # The long spans in front, and the short ones behind these.
    long_spans = lax.div(block, long_span // block_tiles)
    short_spans = long_spans * (long_span // block_tiles), block
    totals = [full(0, jnp.int32) for _ in columns]
    for begin, end in ((blocks, blocks + long_spans), short_spans):
      totals = _add_rows(
        ops, span_counts_ref, columns, pitch, begin, end, totals
      )
    for tile in range(block_tiles):
      row = jnp.minimum(block * block_tiles + tile, tiles - 1) * pitch
      for i, column in enumerate(columns):
        is_column = threads.as_words(column <= num_experts)
        ops.scatter(first_ref, tile * pitch + column, totals[i], is_column)
        index = row + jnp.minimum(column, num_experts)
        totals[i] = totals[i] + ops.gather(counts_ref, index)
    ops.block_barrier()
    choices = block_tiles * tile_choices

    def run_rounds(step: jax.Array, carry: int) -> int:
      loaded = []
      for i in range(_ROUNDS):
        local = (step * _ROUNDS + i) * THREADS + thread
        index = block * choices + local
        is_here = threads.as_words((local < choices) & (index < n))
        index = jnp.minimum(index, n - 1)
        expert = ops.gather(expert_ref, index)
        rank = ops.gather(tile_rank_ref, index)
        loaded.append((local, index, is_here, expert, rank))
      for local, index, is_here, expert, rank in loaded:
        column = jnp.where(rank < 0, num_experts, expert)
        rank = jnp.where(rank < 0, ~rank, rank)
        tile = lax.div(local, jnp.full_like(local, tile_choices))
        tile = jnp.minimum(tile, block_tiles - 1)
        rank = rank + ops.gather(first_ref, tile * pitch + column)
        ops.scatter(rank_ref, index, rank, is_here)
      return carry

    lax.fori_loop(0, -(-choices // (_ROUNDS * THREADS)), run_rounds, 0)

  (ranks,) = mosaic.call(
    kernel,
    [jax.ShapeDtypeStruct((n,), jnp.int32)],
    name="rank",
    blocks=blocks,
    scratch_types={"first_ref": _words(block_tiles * pitch)},
    interpret=interpret,
  )(expert_idx, tile_rank, counts, span_counts)
  return ranks


def _add_rows(
  ops: Threads,
  ref: Ref,
  columns: list[jax.Array],
  pitch: int,
  begin: jax.Array | int,
  end: jax.Array | int,
  totals: list[jax.Array],
) -> list[jax.Array]:
  """Adds the rows from `begin` to `end` of a table, every thread in its columns."""
  at_once = max(_LOADS // len(columns), 1)

  def add(
    step: jax.Array, totals: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, ...]:
    for i in range(at_once):
      row = begin + step * at_once + i
      first = jnp.where(row < end, row, 0) * pitch
      values = [
        ops.gather(ref, first + jnp.minimum(x, pitch - 1)) for x in columns
      ]
      totals = tuple(
        total + jnp.where(row < end, value, 0)
        for total, value in zip(totals, values, strict=True)
      )
    return totals

  steps = lax.div(end - begin + (at_once - 1), at_once)
  return list(lax.fori_loop(0, steps, add, tuple(totals)))


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
  ops = twins.operations(interpret)
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
    loaded = []
    for round_ in range(_ROUNDS):
      index = number * block + round_ * THREADS + thread
      is_here = threads.as_words(index < n)
      index = jnp.minimum(index, n - 1)
      expert, rank = (ops.gather(x, index) for x in (expert_ref, rank_ref))
      is_counted = (expert >= 0) & (expert < num_experts)
      if mask_ref:
        token = lax.div(index, jnp.full_like(index, top_k))
        is_counted = is_counted & (ops.gather(mask_ref[0], token) != 0)
      loaded.append((index, is_here, expert, rank, is_counted))
    owned, counted = _starts(
      ops, load_ref, sizes, start_ref, warp_ref, capacity
    )
    for index, is_here, expert, rank, is_counted in loaded:
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


def _words(size: int) -> Any:
  return mosaic.plgpu.SMEM((size,), jnp.int32)
