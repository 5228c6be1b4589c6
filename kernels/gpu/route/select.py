# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The K largest selection scores of a token: threshold, ties, experts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels import networks
from jaxroute.kernels.gpu import threads
from jaxroute.kernels.gpu.mosaic import plgpu
from jaxroute.kernels.gpu.route import score
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.score import NEG_INF
from jaxroute.kernels.gpu.route.tile import Place, Tile, loop
from jaxroute.kernels.gpu.threads import ROW, THREADS, by_row, full

UNREACHABLE = 1 << 16
"""Added to the index of an expert that is chosen for want of others."""


def best(
  plan: Plan, values: Sequence[jax.Array], count: int
) -> list[jax.Array]:
  """The largest of some values, in falling order; `min(count, len(values))`."""
  if plan.interpret:
    # A network is thousands of operations, which XLA compiles for minutes.
    return list(-jnp.sort(-jnp.stack(values), axis=0)[:count])
  return networks.best(values, count)[0]


def merge(
  plan: Plan, a: Sequence[jax.Array], b: Sequence[jax.Array], count: int
) -> list[jax.Array]:
  """The largest of two falling lists, in falling order."""
  if plan.interpret:
    return best(plan, [*a, *b], count)
  return networks.merge(a, b, count)


def threshold(
  tile: Tile, total: jax.Array | None
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Finds the K largest selection scores of every token, and the next.

  Writes `selection_scores`.

  Args:
    tile: of the block.
    total: as in `score.score_chunk`.

  Returns:
    A falling list of `[128]`, the same in all threads of a token; and for each
    group of a thread whether its token may use it, if groups are limited.
  """
  plan = tile.plan
  score_chunk = functools.partial(score.score_chunk, tile, total)
  length, kept = plan.list_length, []
  if plan.groups:
    _list_groups(tile, score_chunk)
    kept = _kept_groups(tile)
    top = _merge_groups(tile, kept)
  else:

    def add_chunk(
      chunk: jax.Array | int, top: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
      values = best(plan, score_chunk(chunk), length)
      return tuple(merge(plan, top, values, length))

    if plan.chunks == 1:
      top = _fill(best(plan, score_chunk(0), length), length)
    else:
      start = tuple(_fill([], length))
      top = list(lax.fori_loop(0, plan.chunks, add_chunk, start))
  distance = 1
  while distance < plan.lanes:
    others = [plan.threads.shuffle_xor(x, distance) for x in top]
    top = merge(plan, top, others, length)
    distance *= 2
  return top, kept


def _fill(values: list[jax.Array], length: int) -> list[jax.Array]:
  return values + [full(NEG_INF)] * (length - len(values))


def _list_groups(
  tile: Tile, score_chunk: Callable[[jax.Array | int], list[jax.Array]]
) -> None:
  """Writes the largest selection scores of every group of a row to `lists`."""
  plan, buffers = tile.plan, tile.buffers
  size, width = plan.config.group_size, plan.width
  length = plan.group_list_length

  def store(group: jax.Array | int, values: list[jax.Array]) -> None:
    for i, value in enumerate(values):
      place = pl.ds((group * length + i) * THREADS, THREADS)
      buffers.lists[place] = value

  if size % width == 0:
    chunks_per_group = size // width

    def list_group(group: jax.Array | int, carry: int) -> int:
      values = []
      for chunk in range(chunks_per_group):
        more = best(plan, score_chunk(group * chunks_per_group + chunk), length)
        values = merge(plan, values, more, length) if values else more
      store(group, values)
      return carry

    loop(plan.groups, list_group, 0)
    return
  if width % size == 0 and plan.padded_experts == plan.num_experts:
    groups_per_chunk = width // size

    def list_chunk(chunk: jax.Array | int, carry: int) -> int:
      x = score_chunk(chunk)
      for group in range(groups_per_chunk):
        values = best(plan, x[group * size : (group + 1) * size], length)
        store(chunk * groups_per_chunk + group, values)
      return carry

    loop(plan.chunks, list_chunk, 0)
    return
  # Groups and chunks do not fit each other, which a loop cannot express.
  waiting, group = [], 0
  for chunk in range(plan.chunks):
    waiting += score_chunk(chunk)
    while len(waiting) >= size and group < plan.groups:
      store(group, best(plan, waiting[:size], length))
      waiting, group = waiting[size:], group + 1


def _load_list(tile: Tile, group: int, count: int) -> list[jax.Array]:
  first = group * tile.plan.group_list_length
  return [
    plgpu.load(
      tile.buffers.lists.at[pl.ds((first + i) * THREADS, THREADS)], layout=ROW
    )
    for i in range(count)
  ]


def _kept_groups(tile: Tile) -> list[jax.Array]:
  """For each group of a row, whether it is one of its token's best; bool."""
  plan, place = tile.plan, tile.place
  count = plan.config.group_score_count
  scores = []
  for group in range(plan.groups):
    values = _load_list(tile, group, count)
    total = functools.reduce(jnp.add, values)
    # inf + -inf is NaN: a group with an infinite member is the best there is.
    if count > 1:
      total = jnp.where(values[0] == jnp.inf, jnp.inf, total)
    scores.append(total)
  better = [full(0, jnp.int32) for _ in scores]
  for distance in range(plan.lanes):
    is_before = (place.part ^ distance) < place.part
    for other_group, other in enumerate(scores):
      if distance:
        other = plan.threads.shuffle_xor(other, distance)
      for group, mine in enumerate(scores):
        if distance:
          wins = jnp.where(is_before, other >= mine, other > mine)
        elif other_group == group:
          continue
        else:
          wins = other >= mine if other_group < group else other > mine
        better[group] += threads.as_words(wins)
  return [rank < plan.config.group_top_k for rank in better]


def _merge_groups(tile: Tile, kept: list[jax.Array]) -> list[jax.Array]:
  """The largest of a row in the groups that are kept."""
  plan = tile.plan
  top: list[jax.Array] = []
  for group, is_kept in enumerate(kept):
    values = [
      jnp.where(is_kept, value, NEG_INF)
      for value in _load_list(tile, group, plan.group_list_length)
    ]
    top = merge(plan, top, values, plan.list_length) if top else values
  return _fill(top, plan.list_length)


def compare(tile: Tile, kth: jax.Array, kept: list[jax.Array]) -> None:
  """Sets two bits for every expert of a row: reads `selection_scores`, writes `bits`.

  Args:
    tile: of the block.
    kth: `[128]`. The K-th largest selection score.
    kept: from `threshold`.
  """
  plan, buffers = tile.plan, tile.buffers
  all_bits = (1 << plan.width) - 1 if plan.width < 32 else -1

  def compare_chunk(
    chunk: jax.Array | int, reachable: jax.Array | None = None
  ) -> None:
    x = plgpu.load(buffers.selection_scores.at[chunk], layout=by_row(4))
    below = above = full(0, jnp.int32)
    for value in reversed(threads.columns(x)):
      below = (below << 1) | plan.threads.is_less(value, kth)
      above = (above << 1) | plan.threads.is_less(kth, value)
    not_below = ~below & all_bits
    if reachable is not None:
      # If the K-th is -inf, all that cannot be reached are its equals.
      others = jnp.where(kth == NEG_INF, all_bits & ~reachable, 0)
      not_below = (not_below & reachable) | others
      above = above & reachable
    buffers.bits[_bits_slice(chunk)] = not_below
    buffers.bits[_bits_slice(plan.chunks + chunk)] = above

  if not kept:

    def step(chunk: jax.Array | int, carry: int) -> int:
      compare_chunk(chunk)
      return carry

    loop(plan.chunks, step, 0)
    return
  for chunk in range(plan.chunks):
    compare_chunk(chunk, _reachable_bits(plan, chunk, kept))


def _reachable_bits(plan: Plan, chunk: int, kept: list[jax.Array]) -> jax.Array:
  """A bit for every expert of a chunk whose group is kept."""
  size, first = plan.config.group_size, chunk * plan.width
  reachable = full(0, jnp.int32)
  for group, is_kept in enumerate(kept):
    begin = max(group * size - first, 0)
    end = min((group + 1) * size - first, plan.width)
    if begin < end:
      mask = np.uint32((1 << end) - (1 << begin)).astype(np.int32)
      reachable = reachable | jnp.where(is_kept, mask, 0)
  return reachable


def _bits_slice(chunk: jax.Array | int) -> Any:
  return pl.ds(chunk * THREADS, THREADS)


def extract(tile: Tile, top: list[jax.Array]) -> list[jax.Array]:
  """Finds the K experts: those above the K-th score, and the first of its equals.

  Reads `bits` and writes `chosen`. No barrier follows.

  Args:
    tile: of the block.
    top: from `threshold`.

  Returns:
    For every chunk of a row, `[128]` int32 with a bit for every chosen expert.
  """
  plan, place, buffers = tile.plan, tile.place, tile.buffers
  k, kth = plan.config.top_k, top[plan.config.top_k - 1]

  def load(chunk: int) -> jax.Array:
    return plgpu.load(buffers.bits.at[_bits_slice(chunk)], layout=ROW)

  above = [load(plan.chunks + chunk) for chunk in range(plan.chunks)]
  equal = [load(chunk) & ~bits for chunk, bits in enumerate(above)]
  quota = full(k, jnp.int32)
  for value in top[:k]:
    quota = quota - plan.threads.is_less(kth, value)
  first_slot, own = place.token * plan.slots, full(k, jnp.int32)
  if plan.lanes > 1:
    num_equal, num_above = (_count(plan, bits) for bits in (equal, above))
    # Parts in front come first.
    quota = jnp.maximum(quota - _sum_before(plan, place, num_equal), 0)
    own = num_above + jnp.minimum(quota, num_equal)
    first_slot = first_slot + _sum_before(plan, place, own)
  first_expert = place.part * plan.part
  picked = [full(0, jnp.int32)] * plan.chunks
  for i in range(k):
    # The lowest bit of all that may be chosen.
    words = [
      jnp.where(quota > 0, a | e, a) for a, e in zip(above, equal, strict=True)
    ]
    word, chunk = words[-1], full(plan.chunks - 1, jnp.int32)
    for c in reversed(range(plan.chunks - 1)):
      word = jnp.where(words[c] == 0, word, words[c])
      chunk = jnp.where(words[c] == 0, chunk, c)
    bit = word & -word
    expert = first_expert + chunk * plan.width + (31 - lax.clz(bit))
    taken = [
      jnp.where(chunk == c, bit, 0) if plan.chunks > 1 else bit
      for c in range(plan.chunks)
    ]
    was_equal = functools.reduce(
      jnp.bitwise_or, [e & t for e, t in zip(equal, taken, strict=True)]
    )
    if plan.groups:
      is_forced = (was_equal != 0) & (kth == NEG_INF)
      expert = jnp.where(is_forced, expert + UNREACHABLE, expert)
    keep = threads.as_words(i < own) if plan.lanes > 1 else None
    plan.threads.scatter(buffers.chosen, first_slot + i, expert, keep)
    quota = jnp.where(was_equal != 0, quota - 1, quota)
    above = [a & ~t for a, t in zip(above, taken, strict=True)]
    equal = [e & ~t for e, t in zip(equal, taken, strict=True)]
    picked = [p | t for p, t in zip(picked, taken, strict=True)]
  return picked


def _count(plan: Plan, words: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, map(plan.threads.count_bits, words))


def _sum_before(plan: Plan, place: Place, x: jax.Array) -> jax.Array:
  """The sum of `x` over the parts of the token before this one."""
  total = full(0, jnp.int32)
  for distance in range(1, plan.lanes):
    other = plan.threads.shuffle_xor(x, distance)
    is_before = (place.part ^ distance) < place.part
    total = total + jnp.where(is_before, other, 0)
  return total
