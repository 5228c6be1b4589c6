# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The in-batch solver: what it proves, when it stops, and bad data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxroute import assignment, dual
from jaxroute.dual import solvers

pytestmark = pytest.mark.any_jax

T, E, K = 512, 16, 4


def _scores(t=T, e=E, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(t, e)) + np.linspace(0, 1.5, e)
  return (scale / (1 + np.exp(-x))).astype(np.float32)


@pytest.fixture(scope="module")
def optimum():
  return assignment.solve(_scores(), K)


def test_padding_is_invisible():
  scores, mask = _scores(), np.arange(T) % 3 > 0
  masked = scores.copy()
  masked[~mask] = np.nan
  # The dual value of a bias whose mean is not 0 shows how many tokens count.
  start = jnp.linspace(0.0, 0.5, E)
  solve = functools.partial(
    dual.solve, expert_bias=start, tolerance=0.0, max_iterations=8
  )
  kept = solve(scores[mask], K)
  padded = solve(masked, K, token_mask=jnp.asarray(mask))
  np.testing.assert_allclose(
    padded.dual_values[0],
    oracle.dual_value(scores[mask], np.asarray(start), K),
    rtol=1e-6,
  )
  np.testing.assert_allclose(padded.expert_bias, kept.expert_bias, atol=5e-6)
  np.testing.assert_allclose(padded.dual_values, kept.dual_values, rtol=1e-6)
  np.testing.assert_allclose(padded.primal_value, kept.primal_value, rtol=1e-6)
  x, _ = jax.jit(assignment.round_to_balanced, static_argnums=2)(
    masked, kept.expert_bias, K, jnp.asarray(mask)
  )
  np.testing.assert_array_equal(x[~mask], 0)


def test_it_stops_when_a_balanced_assignment_proves_it(optimum):
  solution = dual.solve(_scores(), K, tolerance=2e-3)
  assert solution.converged
  assert solution.iterations in (2, 4, 8, 16, 32)
  gap = solution.gap[: int(solution.iterations)]
  assert gap.min() <= 2e-3 < gap[0]
  assert solution.primal_value <= optimum.value <= solution.dual_value
  assert np.isposinf(solution.gap[int(solution.iterations) :]).all()
  again = dual.solve(
    _scores(), K, expert_bias=solution.expert_bias, tolerance=2e-3
  )
  assert again.converged and again.iterations == 1


def test_the_last_iteration_is_checked_whatever_its_number():
  solution = dual.solve(
    _scores(),
    K,
    solvers.alternating_quantiles(),
    tolerance=0.0,
    max_iterations=3,
  )
  first, second, third = np.asarray(solution.dual_values)
  assert first > second > third
  gap_of = jax.jit(assignment.duality_gap, static_argnums=2)
  gap = gap_of(_scores(), solution.expert_bias, K)
  np.testing.assert_allclose(
    solution.dual_value - solution.primal_value, gap, rtol=0.02
  )


def test_a_mean_load_that_is_no_integer_has_a_fractional_optimum():
  scores = _scores(100, 7)
  solution = dual.solve(scores, 3, solvers.bundle(), max_iterations=200)
  assert solution.converged
  best = assignment.solve(scores, 3).value
  assert solution.primal_value - 1e-3 <= best <= solution.dual_value + 1e-3


def test_what_has_no_balanced_assignment_does_not_converge():
  scores = _scores(64, 8)
  scores[:, 3] = -np.inf
  solution = dual.solve(scores, 2, max_iterations=20)
  assert not solution.converged
  assert solution.primal_value == -np.inf
  assert np.isfinite(solution.expert_bias).all()


def test_a_nan_score_is_not_hidden():
  scores = _scores(64, 8)
  scores[5, 2] = np.nan
  solution = dual.solve(scores, 2, max_iterations=4)
  assert not solution.converged
  assert np.isnan(solution.expert_bias).all() and np.isnan(solution.dual_value)


def test_equal_scores_of_many_experts_converge():
  solution = dual.solve(jnp.zeros((64, 96)), 2, max_iterations=2)
  assert solution.converged and solution.iterations == 1
  assert solution.dual_value == solution.primal_value == 0


def test_nothing_to_balance():
  scores = jnp.asarray(_scores(16, 8))
  everyone = dual.solve(scores, 8)
  assert everyone.converged and everyone.iterations == 1
  none = dual.solve(scores, 2, token_mask=jnp.zeros(16, jnp.bool_))
  assert none.converged
  np.testing.assert_array_equal(none.expert_bias, 0)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: dual.solve(jnp.zeros(4), 1), "`scores` must be"),
    (lambda: dual.solve(jnp.zeros((4, 2)), 3), "`top_k` must be in"),
    (lambda: dual.solve(jnp.zeros((4, 2)), 1, tolerance=-1.0), "`tolerance`"),
    (
      lambda: dual.solve(jnp.zeros((4, 2)), 1, max_iterations=0),
      "`max_iterations`.*0",
    ),
    (
      lambda: dual.solve(jnp.zeros((4, 2)), 1, expert_bias=jnp.zeros(3)),
      r"`expert_bias` must be \[E=2\]",
    ),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
