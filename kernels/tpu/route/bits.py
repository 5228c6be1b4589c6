# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Sets of bits in int32 words: counted, searched and emptied, without branches.

All functions work element by element on arrays of one shape. A set may be
several words, of which the first has the lowest bits.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxroute.kernels.tpu.route.plan import WORD_BITS

_TOP_BIT = np.int32(-(2**31))


def bit(index: int) -> np.int32:
  """Returns a word whose only set bit is `index` modulo 32."""
  return np.uint32(1 << (index % WORD_BITS)).astype(np.int32)


def shift_left(word: jax.Array, count: int) -> jax.Array:
  """Shifts all bits up by a constant, below 32."""
  return lax.shift_left(word, jnp.full_like(word, count))


def shift_right(word: jax.Array, count: int) -> jax.Array:
  """Shifts all bits down by a constant, below 32; zeros come in."""
  return lax.shift_right_logical(word, jnp.full_like(word, count))


def population(words: Iterable[jax.Array]) -> jax.Array:
  """Counts the set bits of all words together."""
  return functools.reduce(jnp.add, map(lax.population_count, words))


def union(words: Iterable[jax.Array]) -> jax.Array:
  """Returns the bits that are set in any word."""
  return functools.reduce(jnp.bitwise_or, words)


def lowest_ones(word: jax.Array, count: jax.Array) -> jax.Array:
  """Keeps the lowest set bits of a word.

  Args:
    word: int32. It has more than `count` set bits, or none.
    count: int32. How many to keep.

  Returns:
    int32: `word` without the others.

  Example:
    >>> bin(lowest_ones(jnp.int32(0b101101), jnp.int32(3)))
    '0b1101'
  """
  # How many low bits have no more than `count` ones: 0 to 31, a digit at a
  # time, of weight 8, 2 and 1. The candidates of a digit do not wait for one
  # another.
  length = jnp.zeros_like(count)
  for weight, largest_digit in ((8, 3), (2, 3), (1, 1)):
    longer = [length + i * weight for i in range(1, largest_digit + 1)]
    fits = [
      lax.population_count(word & _low_bits(candidate)) <= count
      for candidate in longer
    ]
    for candidate, candidate_fits in zip(longer, fits, strict=True):
      length = jnp.where(candidate_fits, candidate, length)
  return word & _low_bits(length)


def _low_bits(count: jax.Array) -> jax.Array:
  """Returns words with the `count` lowest bits set, `count` < 32."""
  return lax.shift_left(jnp.ones_like(count), count) - 1


def first_bit(
  words: Sequence[jax.Array], start: jax.Array, from_top: bool = False
) -> jax.Array:
  """Returns the index of the lowest bit that is set, or of the highest.

  Args:
    words: int32, not all zero.
    start: int32, the index of the lowest bit of the first word.
    from_top: whether to look for the highest.

  Returns:
    int32.

  Example:
    >>> words = jnp.int32(0), jnp.int32(0b1100)
    >>> int(first_bit(words, jnp.int32(100)))
    134
    >>> int(first_bit(words, jnp.int32(100), from_top=True))
    135
  """
  *earlier, last = _search_order(len(words), from_top)
  word, word_start = words[last], np.int32(last * WORD_BITS)
  for i in reversed(earlier):
    has_bits = words[i] != 0
    word = jnp.where(has_bits, words[i], word)
    word_start = jnp.where(has_bits, np.int32(i * WORD_BITS), word_start)
  if from_top:
    position = WORD_BITS - 1 - lax.clz(word)
  else:
    position = lax.population_count((word & -word) - 1)
  return start + word_start + position


def clear_first_bit(
  words: Sequence[jax.Array], from_top: bool = False
) -> list[jax.Array]:
  """Clears the bit that `first_bit` finds.

  Args:
    words: int32, not all zero.
    from_top: whether it is the highest that is set, not the lowest.

  Returns:
    int32 words.

  Example:
    >>> [int(x) for x in clear_first_bit([jnp.int32(0), jnp.int32(12)])]
    [0, 8]
  """
  cleared = list(words)
  earlier_are_zero = None
  for i in _search_order(len(words), from_top):
    word = words[i]
    if from_top:
      top = jnp.full_like(word, _TOP_BIT)
      without = word & ~lax.shift_right_logical(top, lax.clz(word))
    else:
      without = word & (word - 1)
    if earlier_are_zero is None:
      cleared[i] = without
      earlier_are_zero = word == 0
    else:
      cleared[i] = jnp.where(earlier_are_zero, without, word)
      earlier_are_zero &= word == 0
  return cleared


def _search_order(words: int, from_top: bool) -> list[int]:
  """Word numbers in the order in which they are searched."""
  return list(range(words))[:: -1 if from_top else 1]
