# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection networks: sorting and merging lists of arrays, element by element.

A list of n arrays of one shape is, at every element, a list of n numbers. The
comparisons to make depend on n alone, so all elements are sorted at once by
`maximum` and `minimum`, without branches. All lists are in falling order. No
element may be NaN.
"""

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


def sort(values: Sequence[jax.Array]) -> list[jax.Array]:
  """Sorts a list.

  Args:
    values: arrays of one shape.

  Returns:
    The list in falling order.
  """
  values = list(values)
  for i, j in exchanges(len(values)):
    _exchange(values, i, j)
  return values


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
  n = min(count, len(a) + len(b))
  kept = []
  for i in range(n):
    j = n - 1 - i
    if i < len(a) and j < len(b):
      kept.append(jnp.maximum(a[i], b[j]))
    else:
      kept.append(a[i] if i < len(a) else b[j])
  return kept


def merge(
  a: Sequence[jax.Array], b: Sequence[jax.Array], count: int
) -> list[jax.Array]:
  """The `count` largest of two falling lists.

  Args:
    a: a falling list.
    b: a falling list.
    count: how many to keep.

  Returns:
    `min(count, len(a) + len(b))` arrays in falling order.
  """
  values = largest(a, b, count)
  # A bitonic sort of the next power of two, as if the missing ones, in front,
  # were larger than all: comparisons with those are left out.
  size = 1 << max(0, (len(values) - 1).bit_length())
  missing = size - len(values)
  d = size // 2
  while d:
    for i in range(missing, size - d):
      if not i & d:
        _exchange(values, i - missing, i - missing + d)
    d //= 2
  return values


def _exchange(values, i, j):
  a, b = values[i], values[j]
  values[i], values[j] = jnp.maximum(a, b), jnp.minimum(a, b)
