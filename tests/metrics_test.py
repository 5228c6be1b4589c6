# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Metrics on loads small enough to check by hand, and exact on large ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute import metrics


def _load(*counts):
  return jnp.array(counts, jnp.int32)


def test_violation_by_hand():
  np.testing.assert_array_equal(
    metrics.violation(_load(8, 4, 4, 0)), [1.0, 0.0, 0.0, -1.0]
  )


def test_nothing_counted_is_no_violation():
  assert metrics.max_vio(_load(0, 0, 0)) == 0
  assert not metrics.violation(_load(0, 0, 0)).any()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9).filter(any))
def test_the_sign_is_exact_up_to_the_largest_int32(counts):
  mean_gap = [len(counts) * c - sum(counts) for c in counts]
  v = metrics.violation(_load(*counts))
  np.testing.assert_array_equal(np.sign(v), np.sign(mean_gap))
  np.testing.assert_allclose(v, oracle.violation(counts), rtol=2e-6, atol=1e-6)


def test_max_vio_is_zero_iff_balanced_and_bounded():
  e, k, t = 8, 2, 10
  assert metrics.max_vio(jnp.full((e,), 5, jnp.int32)) == 0
  worst = jnp.zeros((e,), jnp.int32).at[:k].set(t)
  assert metrics.max_vio(worst) == e / k - 1


def test_max_vio_is_of_the_busiest_expert_not_of_the_idlest():
  assert metrics.max_vio(_load(0, 3, 3)) == 0.5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_global_is_at_most_the_mean_of_batches(seed):
  loads = np.random.default_rng(seed).multinomial(64, [0.4, 0.3, 0.2, 0.1], 5)
  loads = jnp.asarray(loads, jnp.int32)
  whole = metrics.max_vio(loads.sum(0))
  assert whole <= jnp.mean(metrics.max_vio(loads)) + 1e-6


def test_other_metrics_by_hand():
  load = _load(4, 4, 0, 0)
  assert metrics.coefficient_of_variation(load) == 1.0
  np.testing.assert_allclose(metrics.load_entropy(load), 0.5, rtol=1e-6)
  assert metrics.dead_experts(load) == 2
  assert metrics.load_entropy(_load(0, 0)) == 0
  assert metrics.load_entropy(_load(7)) == 1
  assert metrics.load_entropy(_load(9, 0, 0)) == 0
  assert metrics.bias_spread(jnp.array([1.0, -0.5, 0.25])) == 1.5
  assert metrics.drop_fraction(_load(6, 2), _load(4, 2)) == 0.25
  assert metrics.drop_fraction(_load(0, 0), _load(0, 0)) == 0


def test_summary_averages_layers_and_adds_dead_experts():
  load = jnp.array([[4, 4, 0, 0], [2, 2, 2, 2]], jnp.int32)
  out = metrics.summary(load, jnp.array([[1.0, 0, 0, 0], [0.0, 0, 0, 0]]))
  assert out["max_vio"] == 0.5
  assert out["load_cv"] == 0.5
  np.testing.assert_allclose(out["load_entropy"], 0.75, rtol=1e-6)
  assert out["dead_experts"] == 2
  assert out["bias_spread"] == 0.5


@pytest.mark.parametrize("load", [jnp.array(3), jnp.array([1.0, 2.0])])
def test_a_load_that_is_no_count_is_refused(load):
  with pytest.raises(ValueError, match="`load` must be .*Sum counts as int32"):
    metrics.violation(load)


def test_drops_of_more_assignments_than_an_int32_holds():
  load = jnp.full(4, 2**30, jnp.int32)
  dropped = metrics.drop_fraction(load, jnp.full(4, 2**29, jnp.int32))
  np.testing.assert_allclose(dropped, 0.5)


_LOADS = (
  [0, 2, 2],
  [0, 2, 2, 3, 5],
  [0, 0, 0],
  [7],
  [1, 1, 1, 1, 1, 1, 1],
  [2**31 - 1] * 8,
  [0, *[2**31 - 1] * 6],
)


@pytest.mark.parametrize("is_optimized", (False, True))
def test_loads_of_every_kind_under_jit(is_optimized):
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, not is_optimized)
  try:
    for counts in _LOADS:
      found = jax.jit(metrics.summary)(_load(*counts), jnp.zeros(len(counts)))
      load = np.array(counts, np.float64)
      share = load / max(load.sum(), 1)
      entropy = -sum(s * np.log(s) for s in share if s)
      entropy = entropy / np.log(len(load)) if len(load) > 1 else 1.0
      vio = oracle.violation(counts)
      expected = {
        "max_vio": vio.max(),
        "load_cv": np.sqrt((vio**2).mean()),
        "load_entropy": entropy,
        "dead_experts": (load == 0).sum(),
        "bias_spread": 0,
      }
      for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)
  finally:
    jax.config.update(name, before)


def test_counts_of_a_long_evaluation_are_numpy_s():
  # Sums of many batches on the host, which int32 would wrap.
  load = np.array([3_000_000_000, 1_000_000_000, 0, 0])
  assert metrics.max_vio(load) == 2.0
  np.testing.assert_array_equal(metrics.violation(load), [2.0, 0.0, -1.0, -1.0])
  np.testing.assert_array_equal(metrics.mean_load(load), [[10**9], [0]])
  assert metrics.drop_fraction(load, load // 2) == 0.5
  assert metrics.dead_experts(load) == 2
  bias = np.zeros(4, np.float32)
  expected = metrics.summary(np.int32(load // 1000), bias)
  chex.assert_trees_all_close(metrics.summary(load, bias), expected)
