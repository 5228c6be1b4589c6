# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Batches reach every row of a group once, and multiply few rows beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute.experts import batched

pytestmark = pytest.mark.optimized


@functools.partial(jax.jit, static_argnames=("n", "expected_rows"))
def _walk(group_sizes, n, expected_rows=None):
  """(visits `[N]`, expert `[N]`, rows per expert `[E]`, rows multiplied)."""
  num_experts = group_sizes.shape[0]
  numbers = jnp.arange(num_experts, dtype=jnp.int32)

  def body(block, carry):
    visits, owner, totals, work = carry
    experts = block.gather_weights(numbers)
    rows = block.read(jnp.ones(n, jnp.int32))
    visits = block.write(visits, block.read(visits) + 1)
    owner = block.write(owner, jnp.broadcast_to(experts[:, None], rows.shape))
    value = jnp.sum(rows, axis=1)[:, None, None]
    return visits, owner, block.accumulate(totals, value), work + rows.size

  visits, owner = jnp.zeros(n, jnp.int32), jnp.full(n, -1, jnp.int32)
  totals, work = jnp.zeros((num_experts, 1, 1), jnp.int32), jnp.int32(0)
  carry = batched.for_each_batch(
    body, (visits, owner, totals, work), group_sizes, n, expected_rows
  )
  return carry[0], carry[1], carry[2][:, 0, 0], carry[3]


def _check(group_sizes, n, expected_rows=None):
  """Holds a walk to its meaning; returns the rows multiplied."""
  sizes = np.asarray(group_sizes, np.int32)
  visits, owner, totals, work = _walk(sizes, n, expected_rows)
  owned = sizes.sum()
  np.testing.assert_array_equal(visits, np.arange(n) < owned)
  expected = np.repeat(np.arange(len(sizes)), sizes)
  np.testing.assert_array_equal(owner[:owned], expected)
  np.testing.assert_array_equal(owner[owned:], -1)
  np.testing.assert_array_equal(totals, sizes)
  return int(work)


@pytest.mark.parametrize("expected_rows", (None, 0, 90, 10**6))
@pytest.mark.parametrize(
  "group_sizes, n",
  [
    ((0,), 0),
    ((1,), 1),
    ((0, 0, 0), 7),
    ((7,), 9),
    ((700,), 700),
    ((0, 700, 0, 0, 0), 700),
    ((0, 0, 0, 0, 700), 700),
    ((700, 0, 0, 0, 0), 701),
    ((300, 1, 299, 0, 100), 700),
    ((175, 176, 174, 175), 700),
    ((219, 220, 221, 40), 700),
    ((2,) * 200, 1000),
    (tuple(range(40)), 1000),
  ],
)
def test_every_row_of_a_group_once(group_sizes, n, expected_rows):
  _check(group_sizes, n, expected_rows)


@settings(max_examples=60)
@given(
  st.lists(
    st.sampled_from((0, 1, 7, 8, 9, 64, 65, 300)), min_size=9, max_size=9
  )
)
def test_any_sizes(group_sizes):
  _check(group_sizes, 2700)


@pytest.mark.parametrize(
  "n, num_experts", [(4096, 8), (49152, 64), (8192, 256)]
)
def test_the_work_follows_the_rows(n, num_experts):
  mean = n // num_experts

  def work(*heavy):
    """Rows multiplied per row, if the first experts have these loads."""
    rest = num_experts - len(heavy)
    sizes = [*heavy, *[(n - sum(heavy)) // rest] * rest]
    return _check(sizes, n) / n

  assert work() <= 1.25 + 8 * num_experts / n
  assert work(mean * 5 // 4) == work()
  for heavy in (
    [n],
    [n // 2] * 2,
    [n // 6] * 6,
    [2 * mean] * (num_experts // 2),
  ):
    assert work() < work(*heavy) < 2.6
