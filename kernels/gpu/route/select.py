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
from jaxroute.kernels.gpu.route.tile import Place, Tile, loop, over_lanes
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


def choose(
  tile: Tile, kth: jax.Array, kept: list[jax.Array]
) -> list[jax.Array]:
  """Finds the K experts: those above the K-th score, and the first of its equals.

  Reads `selection_scores`, and writes `bits` and `chosen`. No barrier follows.

  Args:
    tile: of the block.
    kth: `[128]`. The K-th largest selection score.
    kept: from `threshold`.

  Returns:
    For every chunk of a row, `[128]` int32 with a bit for every chosen expert.
  """
  plan = tile.plan
  k = plan.config.top_k
  reachable = [reachable_bits(plan, c, kept) for c in range(plan.chunks)]
  below = _compare(tile, lambda value: plan.threads.is_less(value, kth))
  not_below = [r & ~b for r, b in zip(reachable, below, strict=True)]
  if kept:
    # If the K-th is -inf, all that cannot be reached are its equals.
    others = [
      jnp.where(kth == NEG_INF, _all_bits(plan) & ~r, 0) for r in reachable
    ]
    not_below = [a | b for a, b in zip(not_below, others, strict=True)]
  own = _count(plan, not_below)
  total = over_lanes(plan, own, jnp.add, plan.lanes)

  def choose_all() -> list[jax.Array]:
    _write_chosen(tile, not_below, own)
    return not_below

  def choose_first() -> list[jax.Array]:
    above = _compare(tile, lambda value: plan.threads.is_less(kth, value))
    above = [r & a for r, a in zip(reachable, above, strict=True)]
    equal = [a & ~b for a, b in zip(not_below, above, strict=True)]
    num_above = _count(plan, above)
    quota = k - over_lanes(plan, num_above, jnp.add, plan.lanes)
    if plan.lanes > 1:
      # Parts in front come first.
      quota = quota - _sum_before(plan, tile.place, _count(plan, equal))
    equal = _first_bits(equal, quota, k)
    chosen = [a | b for a, b in zip(above, equal, strict=True)]
    # What cannot be reached is chosen if all that can be is: then the K-th is -inf.
    forced = [jnp.where(kth == NEG_INF, b, 0) for b in equal]
    _write_chosen(
      tile, chosen, _count(plan, chosen), forced if plan.groups else None
    )
    return chosen

  # Scores of float32 logits hardly ever tie at the K-th. Those of 16-bit logits do,
  # in half of the warps or so.
  has_ties = plan.threads.any(threads.as_words(total != k))
  return lax.cond(has_ties != 0, choose_first, choose_all)


def _compare(
  tile: Tile, compare: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
  """Finds for which selection scores of a row something holds.

  Reads `selection_scores` and writes `bits`.

  Args:
    tile: of the block.
    compare: of a score, `[128]`; returns int32, 1 if it holds.

  Returns:
    For every chunk, `[128]` int32 with a bit for every expert.
  """
  plan, buffers = tile.plan, tile.buffers

  def compare_chunk(chunk: jax.Array | int, carry: int) -> int:
    x = plgpu.load(buffers.selection_scores.at[chunk], layout=by_row(4))
    bits = full(0, jnp.int32)
    for value in reversed(threads.columns(x)):
      bits = (bits << 1) | compare(value)
    buffers.bits[_bits_slice(chunk)] = bits
    return carry

  loop(plan.chunks, compare_chunk, 0)
  return [
    plgpu.load(buffers.bits.at[_bits_slice(chunk)], layout=ROW)
    for chunk in range(plan.chunks)
  ]


def _all_bits(plan: Plan) -> int:
  return (1 << plan.width) - 1 if plan.width < 32 else -1


def reachable_bits(plan: Plan, chunk: int, kept: list[jax.Array]) -> jax.Array:
  """A bit for every expert of a chunk whose group is kept, or for all.

  Args:
    plan: the static sizes of the call.
    chunk: which.
    kept: from `threshold`.

  Returns:
    `[128]` int32.
  """
  if not kept:
    return full(_all_bits(plan), jnp.int32)
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


def _write_chosen(
  tile: Tile,
  words: list[jax.Array],
  own: jax.Array,
  forced: list[jax.Array] | None = None,
) -> None:
  """Writes the experts of a row to `chosen`, behind those of the parts before.

  Args:
    tile: of the block.
    words: for every chunk, `[128]` int32 with a bit for every chosen expert.
    own: `[128]` int32. How many these are.
    forced: bits of those that are chosen for want of others, if there may be any.
  """
  plan, place = tile.plan, tile.place
  last = place.token * plan.slots + own - 1
  if plan.lanes > 1:
    last = last + _sum_before(plan, place, own)
  first_expert = place.part * plan.part
  words = list(words)
  for i in range(plan.config.top_k):
    # From the highest bit down.
    word, chunk = words[0], full(0, jnp.int32)
    for c in range(1, plan.chunks):
      word = jnp.where(words[c] == 0, word, words[c])
      chunk = jnp.where(words[c] == 0, chunk, c)
    # Of no bits the lowest, for a part that has no more experts.
    place_in_word = 31 - lax.clz(word | 1)
    bit = full(1, jnp.int32) << place_in_word
    taken = [
      jnp.where(chunk == c, bit, 0) if plan.chunks > 1 else bit
      for c in range(plan.chunks)
    ]
    expert = first_expert + chunk * plan.width + place_in_word
    if forced is not None:
      is_forced = functools.reduce(
        jnp.bitwise_or, [f & t for f, t in zip(forced, taken, strict=True)]
      )
      expert = jnp.where(is_forced != 0, expert + UNREACHABLE, expert)
    keep = threads.as_words(i < own) if plan.lanes > 1 else None
    plan.threads.scatter(tile.buffers.chosen, last - i, expert, keep)
    words = [w & ~t for w, t in zip(words, taken, strict=True)]


def _first_bits(
  words: list[jax.Array], quota: jax.Array, most: int
) -> list[jax.Array]:
  """The lowest bits of some words, the first word first.

  Args:
    words: `[128]` int32.
    quota: `[128]` int32. How many bits to take; less than 0 is none.
    most: no quota is more.

  Returns:
    Words with these bits.
  """

  def take(
    i: jax.Array, carry: tuple[list[jax.Array], list[jax.Array]]
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    first, rest = list(carry[0]), list(carry[1])
    is_open = i < quota
    for c, word in enumerate(rest):
      bit = jnp.where(is_open, word & -word, 0)
      first[c], rest[c] = first[c] | bit, word & ~bit
      is_open = is_open & (bit == 0)
    return first, rest

  none = [full(0, jnp.int32)] * len(words)
  return lax.fori_loop(0, most, take, (none, words))[0]


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
