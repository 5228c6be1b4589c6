# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection networks: sorting and merging lists of arrays, element by element.

A list of n arrays of one shape is, at every element, a list of n numbers. The
comparisons to make depend on n alone, so all elements are sorted at once by
`maximum` and `minimum`, without branches. All lists are in falling order. No
element may be NaN.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.cache
def exchanges(n: int) -> tuple[tuple[int, int], ...]:
  """The pairs `i < j` that sort n numbers when compared and exchanged in turn.

  Batcher's merge exchange: 19 pairs for 8 numbers, 63 for 16.

  Args:
    n: how many numbers, at least 1.

  Returns:
    Pairs of positions.

  References:
    Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M.
  """
  pairs = []
  top = 1 << max(0, (n - 1).bit_length() - 1)
  p = top
  while p > 0:
    q, r, d = top, 0, p
    while d > 0:
      pairs += [(i, i + d) for i in range(n - d) if i & p == r]
      d, q, r = q - p, q >> 1, p
    p >>= 1
  return tuple(pairs)


def best(
  values: Sequence[jax.Array], count: int, levels: int = 0
) -> list[list[jax.Array]]:
  """The largest of a list, or of each of its classes.

  Of two that are compared, the loser is among the first `count` only if the winner
  is, so that no more than half of them are losers: these are found among the
  losers, the others among the winners.

  Args:
    values: arrays of one shape.
    count: how many to keep.
    levels: of comparisons that leave winners and losers apart, for `join`.

  Returns:
    `2**levels` falling lists, the one of those that never lost first: as many of
    `count >> n` as there are that lost n times.
  """
  if not levels and (len(values) < 2 or not count):
    return [list(values[:count])]
  pairs = list(zip(values[::2], values[1::2], strict=False))
  winners = [jnp.maximum(a, b) for a, b in pairs]
  losers = [jnp.minimum(a, b) for a, b in pairs]
  winners += values[2 * len(pairs) :]
  deeper = max(levels - 1, 0)
  lists = best(winners, count, deeper) + best(losers, count // 2, deeper)
  return lists if levels else [join(lists, count)]


def sizes(n: int, count: int, levels: int) -> list[int]:
  """The lengths of the lists that `best` makes.

  Args:
    n: how many values it is given.
    count: how many are kept.
    levels: of comparisons that leave winners and losers apart.

  Returns:
    One length for each list.
  """
  if not levels:
    return [min(n, count)]
  losers = n // 2
  return sizes(n - losers, count, levels - 1) + sizes(
    losers, count // 2, levels - 1
  )


def join(lists: Sequence[list[jax.Array]], count: int) -> list[jax.Array]:
  """The largest of all classes.

  Args:
    lists: what `best` returns, or, class by class, what several of its results have
      been merged to.
    count: how many to keep.

  Returns:
    One falling list.
  """
  if len(lists) == 1:
    return lists[0]
  half = len(lists) // 2
  winners, losers = join(lists[:half], count), join(lists[half:], count // 2)
  return merge(winners, losers, count, above=True)


def largest(
  a: Sequence[jax.Array], b: Sequence[jax.Array], count: int
) -> list[jax.Array]:
  """The `count` largest of two falling lists, unsorted: one maximum for each.

  Args:
    a: a falling list.
    b: a falling list.
    count: how many to keep.

  Returns:
    `min(count, len(a) + len(b))` arrays that fall and then rise.
  """
  return _largest(a, b, count, jnp.maximum)


def _largest(a, b, count, maximum):
  n = min(count, len(a) + len(b))
  kept = []
  for i in range(n):
    j = n - 1 - i
    if i < len(a) and j < len(b):
      kept.append(maximum(a[i], b[j]))
    else:
      kept.append(a[i] if i < len(a) else b[j])
  return kept


def merge(
  a: Sequence[jax.Array],
  b: Sequence[jax.Array],
  count: int,
  above: bool = False,
) -> list[jax.Array]:
  """The `count` largest of two falling lists.

  Args:
    a: a falling list.
    b: a falling list.
    count: how many to keep.
    above: whether `a[i] >= b[i]` for every i: fewer comparisons are needed.

  Returns:
    `min(count, len(a) + len(b))` arrays in falling order.
  """
  # Networks that sort zeros and ones sort everything (Knuth, section 5.3.4), and
  # two falling lists of these have few states: the numbers of ones.
  states = [
    (i, j)
    for i in range(len(a) + 1)
    for j in range(len(b) + 1)
    if i >= j or not above
  ]
  merged = _largest(
    [
      _Wire(x, frozenset(s for s in states if s[0] > n))
      for n, x in enumerate(a)
    ],
    [
      _Wire(x, frozenset(s for s in states if s[1] > n))
      for n, x in enumerate(b)
    ],
    count,
    _Wire.maximum,
  )
  # A bitonic sort of the next power of two, as if the missing ones, in front,
  # were larger than all: comparisons with those are left out.
  size = 1 << max(0, (len(merged) - 1).bit_length())
  missing = size - len(merged)
  d = size // 2
  while d:
    for i in range(missing, size - d):
      if not i & d:
        x, y = i - missing, i - missing + d
        larger, smaller = (
          merged[x].maximum(merged[y]),
          merged[x].minimum(merged[y]),
        )
        merged[x], merged[y] = larger, smaller
    d //= 2
  return [wire.value for wire in merged]


@dataclasses.dataclass(frozen=True)
class _Wire:
  """A number of a network, and the states in which it is one and not zero."""

  value: jax.Array
  ones: frozenset

  def maximum(self, other: "_Wire") -> "_Wire":
    ones = self.ones | other.ones
    known = {self.ones: self, other.ones: other}
    return known.get(ones) or _Wire(jnp.maximum(self.value, other.value), ones)

  def minimum(self, other: "_Wire") -> "_Wire":
    ones = self.ones & other.ones
    known = {self.ones: self, other.ones: other}
    return known.get(ones) or _Wire(jnp.minimum(self.value, other.value), ones)
