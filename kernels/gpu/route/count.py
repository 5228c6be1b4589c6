# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Loads, and the rank of every assignment within its expert and tile."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels.gpu import order, threads
from jaxroute.kernels.gpu.route import weigh
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.select import UNREACHABLE
from jaxroute.kernels.gpu.route.tile import (
  Tile,
  divide,
  loop,
  place_of,
  rows_of_first_part,
)
from jaxroute.kernels.gpu.threads import THREADS, WARP, full


def transpose_chosen(tile: Tile, picked: list[jax.Array]) -> None:
  """Turns bits by expert into bits by row, and writes them to `bits`.

  Reads `is_counted`. A barrier of the block has to follow.

  Args:
    tile: of the block.
    picked: from `select.choose`.
  """
  plan, place, buffers = tile.plan, tile.place, tile.buffers
  counted = plan.threads.gather(buffers.is_counted, place.token)
  for chunk, word in enumerate(picked):
    word = plan.threads.transpose_bits(jnp.where(counted == 1, word, 0))
    buffers.bits[pl.ds(chunk * THREADS, THREADS)] = word
  if plan.with_rank:
    uncounted = threads.as_words((counted == 0) & (place.part == 0))
    ballot = plan.threads.ballot(uncounted)
    buffers.bits[pl.ds(plan.chunks * THREADS, THREADS)] = ballot


def count(tile: Tile) -> None:
  """Counts the assignments of every expert.

  Reads `bits` and writes `ranks`. Adds to `load` and `span_counts` of the operands; of
  the results, writes `counts`, and `load` if there is one block.

  Args:
    tile: of the block.
  """
  plan, operands, results = tile.plan, tile.operands, tile.results
  num_experts = plan.num_experts
  last = num_experts + 1 if plan.with_rank else num_experts
  for first in range(0, last, THREADS):
    expert = first + tile.place.row
    is_expert = threads.as_words(expert < num_experts)
    is_counter = threads.as_words(expert < last)
    known = jnp.minimum(expert, last - 1)
    total = full(0, jnp.int32)
    for warp in range(THREADS // WARP):
      rows = _rows_of(tile, known, full(warp, jnp.int32))
      if plan.with_rank:
        index = warp * last + known
        plan.threads.scatter(tile.buffers.ranks, index, total, is_counter)
      total = total + _weight_of(plan, known, plan.threads.count_bits(rows))
    if plan.tiles == 1:
      plan.threads.scatter(results.load, expert, total, is_expert)
      continue
    plan.threads.add_to(operands.load, expert, total, is_expert)
    if plan.with_rank:
      index = tile.number * plan.count_pitch + expert
      plan.threads.scatter(results.counts, index, total, is_counter)
      _add_to_spans(tile, expert, total, is_counter)


def _add_to_spans(
  tile: Tile, expert: jax.Array, total: jax.Array, keep: jax.Array
) -> None:
  """Adds counts to the spans of tiles that this one is in."""
  plan, first_row = tile.plan, 0
  for span, rows in zip(order.SPANS, order.span_rows(plan.tiles), strict=True):
    row = first_row + lax.div(tile.number, span)
    index = row * plan.count_pitch + expert
    plan.threads.add_to(tile.operands.span_counts, index, total, keep)
    first_row += rows


def _rows_of(tile: Tile, expert: jax.Array, warp: jax.Array) -> jax.Array:
  """The rows of a warp that chose an expert, or at E are not counted; as bits."""
  plan = tile.plan
  part, index = place_of(plan, expert)
  if plan.with_rank:
    uncounted = plan.chunks * THREADS
    index = jnp.where(expert == plan.num_experts, uncounted, index)
  rows = plan.threads.gather(tile.buffers.bits, index + warp * WARP)
  if plan.lanes == 1:
    return rows
  own = rows_of_first_part(plan) << part
  if plan.with_rank:
    own = jnp.where(expert == plan.num_experts, -1, own)
  return rows & own


def _weight_of(plan: Plan, expert: jax.Array, rows: jax.Array) -> jax.Array:
  """Assignments of so many rows: a row that is not counted has K."""
  if not plan.with_rank:
    return rows
  all_of_token = rows * plan.config.top_k
  return jnp.where(expert == plan.num_experts, all_of_token, rows)


def write_ranks(tile: Tile) -> None:
  """Writes the rank of every assignment. Reads `bits`, `ranks` and `chosen`.

  A barrier of the block has to come before.

  Args:
    tile: of the block.
  """
  plan, buffers, warp = tile.plan, tile.buffers, tile.place.warp
  num_experts, top_k = plan.num_experts, plan.config.top_k

  def run_round(round_: jax.Array | int, carry: int) -> int:
    slot = weigh.slot_of(tile, round_)
    token = tile.first_token + slot.token
    packed = plan.threads.gather(buffers.chosen, slot.index)
    packed = jnp.where(slot.is_used, packed, 0)
    number, expert = packed >> 16, packed & (UNREACHABLE - 1)
    counted = plan.threads.gather(buffers.is_counted, slot.token) == 1
    expert = jnp.where(counted, expert, num_experts)
    first_row = (slot.token * plan.lanes) & (WARP - 1)
    part = divide(jnp.minimum(expert, num_experts - 1), plan.part)
    row = jnp.where(counted, first_row + part, first_row)
    before = _rows_of(tile, expert, warp) & ((1 << row) - 1)
    rank = _weight_of(plan, expert, plan.threads.count_bits(before))
    rank = rank + plan.threads.gather(
      buffers.ranks, warp * (num_experts + 1) + expert
    )
    rank = jnp.where(counted, rank, rank + number)
    if plan.tiles > 1:
      rank = jnp.where(counted, rank, ~rank)
    keep = slot.is_used
    if plan.shares_tokens:
      keep = keep & tile.is_own(token)
    plan.threads.scatter(
      tile.results.rank, token * top_k + number, rank, threads.as_words(keep)
    )
    return carry

  loop(plan.rounds, run_round, 0)
