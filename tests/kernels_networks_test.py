# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection networks against NumPy's sort, for every length that kernels use."""

import numpy as np
import pytest

from jaxroute.kernels import networks


def _falling(rng, n):
  return -np.sort(-rng.integers(0, 9, (n, 50)), axis=0)


def test_exchanges_by_hand():
  assert networks.exchanges(1) == ()
  assert networks.exchanges(2) == ((0, 1),)
  assert networks.exchanges(3) == ((0, 2), (0, 1), (1, 2))
  assert len(networks.exchanges(8)) == 19
  assert len(networks.exchanges(16)) == 63


@pytest.mark.parametrize("n", range(1, 17))
def test_zeros_and_ones_are_sorted(n):
  # A network that sorts these sorts everything (Knuth, section 5.3.4).
  values = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
  for i, j in networks.exchanges(n):
    values[i], values[j] = np.maximum(*values[[i, j]]), values[[i, j]].min(0)
  assert np.all(values[:-1] >= values[1:])


def test_sort_is_falling():
  values = np.random.default_rng(0).integers(0, 9, (7, 50))
  np.testing.assert_array_equal(
    np.array(networks.sort(list(values))), -np.sort(-values, axis=0)
  )


@pytest.mark.parametrize("count", (1, 2, 3, 6, 8, 10, 16))
def test_merge_keeps_the_largest(count):
  rng = np.random.default_rng(count)
  for n in {0, 1, count // 2, count}:
    for m in {1, count - 1, count} - {0}:
      a, b = _falling(rng, n), _falling(rng, m)
      expected = -np.sort(-np.concatenate([a, b]), axis=0)[:count]
      merged = networks.merge(list(a), list(b), count)
      np.testing.assert_array_equal(np.array(merged), expected)
      kept = np.array(networks.largest(list(a), list(b), count))
      np.testing.assert_array_equal(-np.sort(-kept, axis=0), expected)
