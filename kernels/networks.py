# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection networks: sorting and merging lists of arrays, element by element.

A list of n arrays of one shape is, at every element, a list of n numbers. The
comparisons to make depend on n alone, so all elements are sorted at once by
`maximum` and `minimum`, without branches. All lists are in falling order. No
element may be NaN.

  function | takes | returns
  `exchanges` | a length | the comparisons that sort so many numbers
  `best` | unsorted values | the largest: one falling list, or one per class
  `sizes` | what `best` takes | the lengths of what `best` returns
  `join` | one falling list per class | one falling list
  `merge` | two falling lists | the largest of both, falling
  `largest` | two falling lists | the largest of both, in no order

`best` compares values in pairs, then the winners with each other and the losers
with each other, and so on for some levels. A *class* is the values that won
and lost the same comparisons, n of them lost. At most `count >> n` of them can
be among the largest `count`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


@functools.cache
def exchanges(n: int) -> tuple[tuple[int, int], ...]:
  """Lists the pairs to compare and exchange, in turn, to sort n numbers.

  Batcher's merge exchange: 19 pairs for 8 numbers, 63 for 16.

  Args:
    n: how many numbers, at least 1.

  Returns:
    Pairs of positions `i < j`; the larger number goes to i.

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
  """Finds the largest of a list, or of each of its classes.

  A value is among the first `count` only if all that it lost to are. So of
  every pair that is compared, the loser counts only if the winner does, and at
  most `count // 2` losers count. These are found among the losers, and the
  others among the winners.

  Args:
    values: arrays of one shape.
    count: how many to keep.
    levels: how many levels of comparisons leave winners and losers apart, for
      `join` to bring together.

  Returns:
    `2**levels` falling lists. The bits of a list's index, from the highest on,
    say for every level whether its values lost: 0 where they won. Those that
    lost n comparisons are `count >> n`, or fewer if there are no more.
  """
  if not levels and (len(values) < 2 or not count):
    return [list(values[:count])]
  pairs = list(zip(values[::2], values[1::2], strict=False))
  winners = [jnp.maximum(a, b) for a, b in pairs]
  losers = [jnp.minimum(a, b) for a, b in pairs]
  # The last of an odd number of values is not compared, and wins.
  winners += values[2 * len(pairs) :]
  deeper = max(levels - 1, 0)
  lists = best(winners, count, deeper) + best(losers, count // 2, deeper)
  return lists if levels else [join(lists, count)]


def sizes(n: int, count: int, levels: int) -> list[int]:
  """Computes the lengths of the lists that `best` returns.

  Args:
    n: how many values `best` is given.
    count: how many it keeps.
    levels: how many levels leave winners and losers apart.

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
  """Finds the largest of all classes.

  Args:
    lists: what `best` returns; or, list by list, what several of its results
      have been merged to.
    count: how many to keep.

  Returns:
    One falling list.
  """
  if len(lists) == 1:
    return lists[0]
  half = len(lists) // 2
  winners, losers = join(lists[:half], count), join(lists[half:], count // 2)
  # The i largest losers lost to i different winners: the i-th winner is no
  # smaller than the i-th loser.
  return merge(winners, losers, count, above=True)


def largest(
  a: Sequence[T],
  b: Sequence[T],
  count: int,
  maximum: Callable[..., Any] = jnp.maximum,
) -> list[T]:
  """Finds the `count` largest of two falling lists, by one maximum for each.

  Args:
    a: a falling list.
    b: a falling list.
    count: how many to keep.
    maximum: the larger of two elements.

  Returns:
    `min(count, len(a) + len(b))` elements, unsorted: they fall and then rise.
  """
  n = min(count, len(a) + len(b))
  kept = []
  for i in range(n):
    # Before `a[i]` and `b[j]` are i + j = n - 1 elements, so that one of the
    # two is among the n largest: the larger one.
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
  """Finds the `count` largest of two falling lists, in order.

  A bitonic sorter orders what `largest` returns. If `above`, some of its
  comparisons can come out one way only and are not made: of 9 winners and 4
  losers the 9 largest take 22 maxima and minima instead of 30.

  Args:
    a: a falling list.
    b: a falling list.
    count: how many to keep.
    above: whether `a[i] >= b[i]` for every i.

  Returns:
    `min(count, len(a) + len(b))` arrays in falling order.
  """
  # A network that sorts all inputs of zeros and ones sorts everything (Knuth,
  # The Art of Computer Programming 3, section 5.3.4). A falling list of these
  # is known by its number of ones: i in `a`, j in `b`.
  states = [
    (i, j)
    for i in range(len(a) + 1)
    for j in range(len(b) + 1)
    if i >= j or not above
  ]
  wires_a = [
    _Wire(value, frozenset(state for state in states if state[0] > position))
    for position, value in enumerate(a)
  ]
  wires_b = [
    _Wire(value, frozenset(state for state in states if state[1] > position))
    for position, value in enumerate(b)
  ]
  wires = largest(wires_a, wires_b, count, _Wire.maximum)
  # The sorter is one for the next power of two, as if the missing wires were in
  # front and larger than all: a comparison with one of them changes nothing.
  size = 1 << max(0, (len(wires) - 1).bit_length())
  missing = size - len(wires)
  distance = size // 2
  while distance:
    for i in range(missing, size - distance):
      if not i & distance:
        x, y = i - missing, i - missing + distance
        wires[x], wires[y] = (
          wires[x].maximum(wires[y]),
          wires[x].minimum(wires[y]),
        )
    distance //= 2
  return [wire.value for wire in wires]


@dataclasses.dataclass(frozen=True)
class _Wire:
  """A number on its way through a network.

  The rule of `maximum` and `minimum`: *if one set of `ones` contains the other,
  the comparison's result is known, so none is made.*

  Attributes:
    value: the number, at every element of an array.
    ones: the input states (i ones in `a`, j in `b`) in which this wire carries
      a one.
  """

  value: jax.Array
  ones: frozenset[tuple[int, int]]

  def maximum(self, other: "_Wire") -> "_Wire":
    """Returns the larger of two; it is one wherever either is."""
    if self.ones <= other.ones:
      return other
    if self.ones >= other.ones:
      return self
    value = jnp.maximum(self.value, other.value)
    return _Wire(value, self.ones | other.ones)

  def minimum(self, other: "_Wire") -> "_Wire":
    """Returns the smaller of two; it is one where both are."""
    if self.ones >= other.ones:
      return other
    if self.ones <= other.ones:
      return self
    value = jnp.minimum(self.value, other.value)
    return _Wire(value, self.ones & other.ones)
