# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tiles reach every row of a group once, one expert's rows at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute.experts import tiled

pytestmark = pytest.mark.optimized


@functools.partial(jax.jit, static_argnames="n")
def _walk(group_sizes, n):
  """(visits `[N]`, expert `[N]`, rows per expert `[E]`, rows multiplied)."""
  num_experts = group_sizes.shape[0]
  numbers = jnp.arange(num_experts, dtype=jnp.int32)[:, None]

  def body(tile, carry):
    visits, owner, totals, work = carry
    rows = tile.read(jnp.ones((n, 1), jnp.int32))
    visits = tile.write(visits, tile.read(visits) + 1)
    expert = tile.gather_weights(numbers)
    owner = tile.write(owner, jnp.broadcast_to(expert[None], rows.shape))
    totals = tile.accumulate(totals, jnp.sum(rows, axis=0))
    return visits, owner, totals, work + rows.size

  visits, owner = jnp.zeros((n, 1), jnp.int32), jnp.full((n, 1), -1, jnp.int32)
  carry = visits, owner, jnp.zeros_like(numbers), jnp.int32(0)
  carry = tiled.for_each_tile(body, carry, group_sizes, n)
  return (*(x[:, 0] for x in carry[:3]), carry[3])


def _check(group_sizes, n):
  """Holds a walk to its meaning; returns the rows multiplied."""
  sizes = np.asarray(group_sizes, np.int32)
  visits, owner, totals, work = _walk(sizes, n)
  owned = sizes.sum()
  np.testing.assert_array_equal(visits, np.arange(n) < owned)
  np.testing.assert_array_equal(
    owner[:owned], np.repeat(np.arange(len(sizes)), sizes)
  )
  np.testing.assert_array_equal(owner[owned:], -1)
  np.testing.assert_array_equal(totals, sizes)
  return int(work)


@pytest.mark.parametrize(
  "group_sizes, n",
  [
    ((0,), 0),
    ((1,), 1),
    ((0, 0, 0), 7),
    ((7,), 9),
    ((63, 64, 65), 192),
    ((0, 1300, 0), 1300),
    ((511, 512, 513), 1700),
    ((700, 0, 0, 0, 0), 701),
    (tuple(range(40)), 1000),
  ],
)
def test_every_row_of_a_group_once(group_sizes, n):
  _check(group_sizes, n)


@settings(max_examples=30)
@given(
  st.lists(st.sampled_from((0, 1, 63, 64, 65, 300)), min_size=5, max_size=5)
)
def test_any_sizes(group_sizes):
  _check(group_sizes, 1500)


def test_a_group_is_multiplied_with_less_than_a_step_of_padding():
  for rows in (1, 64, 65, 512, 513, 1100):
    assert rows <= _check((rows, 0, 3), 1200) - 64 < rows + 64
