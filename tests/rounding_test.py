# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rounding to balanced routes: sums, and what the moves cost."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxroute import assignment

# Another version of JAX runs its docstrings, and system/modes_test.py.
pytestmark = pytest.mark.any_jax

_round = jax.jit(assignment.round_to_balanced, static_argnums=2)


@given(
  seed=st.integers(0, 10_000),
  shape=st.sampled_from([(2, 3), (24, 1), (61, 3), (61, 7)]),
)
def test_rounded_routes_are_balanced_and_their_loss_is_the_gap(seed, shape):
  t, k = shape
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(t, 8)).astype(np.float32)
  bias = (rng.normal(size=8) * 0.5).astype(np.float32)
  x, loss = _round(scores, bias, k)
  assert x.min() >= 0 and x.max() <= 1
  np.testing.assert_allclose(x.sum(1), k, atol=1e-5)
  np.testing.assert_allclose(x.sum(0), t * k / 8, atol=1e-3)
  value = float((x * scores).sum())
  gap = oracle.dual_value(scores, bias, k) - value
  np.testing.assert_allclose(loss, gap, atol=1e-3)
  if t * k % 8 == 0:
    np.testing.assert_array_equal(x, np.round(x))
  assert value <= assignment.solve(scores, k).value + 1e-3


def test_equal_scores_of_many_experts_take_a_round_for_each():
  x, loss = _round(jnp.zeros((32, 256)), jnp.zeros(256), 8)
  np.testing.assert_array_equal(x.sum(0), 1)
  assert loss == 0


def test_padding_takes_no_expert():
  mask = np.arange(16) % 4 > 0
  scores = np.random.default_rng(0).random((16, 4)).astype(np.float32)
  x, loss = _round(scores, jnp.zeros(4), 2, mask)
  kept, kept_loss = _round(scores[mask], jnp.zeros(4), 2)
  np.testing.assert_array_equal(x[mask], kept)
  np.testing.assert_array_equal(x[~mask], 0)
  np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)


@pytest.mark.parametrize(
  "forbidden",
  (
    # No token can choose the last expert; one has a single expert to choose.
    np.s_[:, 3],
    np.s_[5, 1:],
  ),
)
def test_what_cannot_be_balanced_has_an_infinite_loss(forbidden):
  scores = np.random.default_rng(0).random((8, 4)).astype(np.float32)
  scores[forbidden] = -np.inf
  _, loss = _round(scores, jnp.zeros(4), 2)
  assert loss == np.inf
