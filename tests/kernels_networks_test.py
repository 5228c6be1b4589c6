# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection networks against NumPy's sort, for every length that kernels use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.kernels import networks

pytestmark = pytest.mark.any_jax


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


@pytest.mark.parametrize("n", range(1, 15))
def test_best_of_zeros_and_ones(n):
  values = (np.arange(2**n)[None] >> np.arange(n)[:, None]) & 1
  falling = -np.sort(-values, axis=0)
  for count in {0, 1, 2, 3, n // 2, n - 1, n, n + 1}:
    (best,) = networks.best(list(values), count)
    assert len(best) == min(count, n)
    if best:
      np.testing.assert_array_equal(np.array(best), falling[:count])


@pytest.mark.parametrize("n", (20, 48, 64, 128))
def test_best_of_many(n):
  values = np.random.default_rng(n).integers(0, 99, (n, 50))
  for count in (7, 9, 11, 17):
    np.testing.assert_array_equal(
      np.array(networks.best(list(values), count)[0]),
      -np.sort(-values, axis=0)[:count],
    )


@pytest.mark.parametrize("levels", (0, 1, 2, 3))
def test_classes_of_several_lists_are_joined(levels):
  rng = np.random.default_rng(levels)
  for n in (1, 7, 32):
    for count in (1, 2, 9, 11):
      values = rng.integers(0, 99, (2, n, 50))
      parts = [networks.best(list(x), count, levels) for x in values]
      for part in parts:
        assert [len(x) for x in part] == networks.sizes(n, count, levels)
      merged = [
        networks.merge(a, b, count >> i.bit_count())
        for i, (a, b) in enumerate(zip(*parts, strict=True))
      ]
      np.testing.assert_array_equal(
        np.array(networks.join(merged, count)),
        -np.sort(-np.concatenate(values), axis=0)[:count],
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


@pytest.mark.parametrize("count", (1, 2, 5, 7, 9, 11, 16, 17))
def test_merge_of_a_list_above_another(count):
  rng = np.random.default_rng(count)
  for n in {1, count // 2 + 1, count}:
    for m in {0, 1, n // 2, n}:
      pairs = rng.integers(0, 9, (2, n, 50))
      a, b = -np.sort(-np.array([pairs.max(0), pairs.min(0)]), axis=1)
      b = b[:m]
      expected = -np.sort(-np.concatenate([a, b]), axis=0)[:count]
      merged = networks.merge(list(a), list(b), count, above=True)
      np.testing.assert_array_equal(np.array(merged), expected)


def test_operations_by_hand():
  def operations(function, n):
    values = [jnp.zeros(())] * n
    jaxpr = jax.make_jaxpr(lambda *x: function(list(x)))(*values)
    live, used = set(jaxpr.jaxpr.outvars), 0
    for eqn in reversed(jaxpr.eqns):
      if live & set(eqn.outvars):
        live.update(eqn.invars)
        used += 1
    return used

  assert operations(lambda x: networks.best(x, 1)[0], 8) == 7
  # One exchange more than the best there is.
  assert operations(lambda x: networks.best(x, 8)[0], 8) == 40
  # Two pairs; the order of the winners; the larger loser, or the second winner.
  assert operations(lambda x: networks.best(x, 2)[0], 4) == 8
  # 8 maxima, then 12 exchanges.
  assert operations(lambda x: networks.merge(x[:8], x[8:], 8), 16) == 32
  # Without the rule for what is known: 4 maxima, then 13 exchanges.
  above = functools.partial(networks.merge, count=9, above=True)
  assert operations(lambda x: above(x[:9], x[9:]), 13) == 22
