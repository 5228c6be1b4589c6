# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Sets of bits in words, against Python's own integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.kernels.tpu.route import bits


def _sets(words, n=200):
  """Random sets of bits, of all densities; of one bit or more."""
  rng = np.random.default_rng(words)
  density = rng.random((n, 1))
  is_set = rng.random((n, 32 * words)) < density
  is_set[np.arange(n), rng.integers(0, 32 * words, n)] = True
  # The set of all bits, of the lowest and of the highest alone.
  is_set[0], is_set[1:3] = True, False
  is_set[1, 0] = is_set[2, -1] = True
  return is_set


def _words(is_set):
  """Rows of bits -> a list of arrays of int32 words, the lowest bits first."""
  packed = np.packbits(is_set, axis=1, bitorder="little").view(np.int32)
  return [jnp.asarray(word) for word in packed.T]


def test_a_bit_by_hand():
  assert bits.bit(0) == 1
  assert bits.bit(31) == -(2**31)
  assert bits.bit(33) == 2


def test_shifts_fill_with_zeros():
  word = jnp.asarray([-1, 1], jnp.int32)
  np.testing.assert_array_equal(bits.shift_right(word, 28), [15, 0])
  np.testing.assert_array_equal(bits.shift_left(word, 31), [-(2**31)] * 2)


@pytest.mark.parametrize("words", (1, 2, 4))
def test_population_and_union(words):
  is_set = _sets(words)
  np.testing.assert_array_equal(
    bits.population(_words(is_set)), is_set.sum(axis=1)
  )
  (union,) = _words(is_set.reshape(len(is_set), words, 32).any(axis=1))
  np.testing.assert_array_equal(bits.union(_words(is_set)), union)


def test_lowest_ones_keeps_that_many():
  is_set = _sets(1)
  population = is_set.sum(axis=1)
  (word,) = _words(is_set)
  rng = np.random.default_rng(0)
  for _ in range(5):
    # Fewer than there are, down to none.
    count = rng.integers(0, population)
    (expected,) = _words(is_set & (is_set.cumsum(axis=1) <= count[:, None]))
    actual = bits.lowest_ones(word, jnp.asarray(count, jnp.int32))
    np.testing.assert_array_equal(actual, expected)


def test_lowest_ones_of_no_bits_are_none():
  zeros = jnp.zeros(32, jnp.int32)
  count = jnp.arange(32, dtype=jnp.int32)
  np.testing.assert_array_equal(bits.lowest_ones(zeros, count), 0)


@pytest.mark.parametrize("words", (1, 2, 4))
@pytest.mark.parametrize("from_top", (False, True))
def test_the_first_bit_is_found_and_cleared(words, from_top):
  is_set = _sets(words)
  size = is_set.shape[1]
  if from_top:
    first = size - 1 - is_set[:, ::-1].argmax(axis=1)
  else:
    first = is_set.argmax(axis=1)
  start = jnp.arange(len(is_set), dtype=jnp.int32)
  actual = bits.first_bit(_words(is_set), start, from_top)
  np.testing.assert_array_equal(actual, start + first)

  is_set[np.arange(len(is_set)), first] = False
  cleared = bits.clear_first_bit(_words(_sets(words)), from_top)
  for word, expected in zip(cleared, _words(is_set), strict=True):
    np.testing.assert_array_equal(word, expected)
