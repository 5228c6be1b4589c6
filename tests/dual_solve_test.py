# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""In-batch solvers: against the exact optimum, their papers' steps, and bad data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxroute
from jaxroute import assignment, dual
from jaxroute.dual import solvers

T, E, K = 512, 16, 4

SOLVERS = {
  "alternating_quantiles": solvers.alternating_quantiles(),
  "truncated_alternation": solvers.truncated_alternation(),
  "sign": solvers.subgradient(dual.sign(dual.inverse_sqrt(0.3))),
  "proportional": solvers.subgradient(dual.proportional(0.2)),
  "heavy_ball": solvers.subgradient(optax.sgd(0.2, momentum=0.5)),
  "nesterov": solvers.subgradient(optax.sgd(0.1, momentum=0.5, nesterov=True)),
  "triple_momentum": solvers.subgradient(dual.triple_momentum(0.1, 4.0)),
  "sparse_transport": solvers.sparse_transport(
    optax.sgd(0.2, momentum=0.5), 10.0
  ),
  "bundle": solvers.bundle(),
}


def _scores(t=T, e=E, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(t, e)) + np.linspace(0, 1.5, e)
  return (scale / (1 + np.exp(-x))).astype(np.float32)


@pytest.fixture(scope="module")
def optimum():
  return assignment.solve(_scores(), K)


@pytest.mark.implicit_promotion  # optax.sgd promotes its momentum
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_nears_the_optimum(name, optimum):
  solution = dual.solve(
    _scores(), K, SOLVERS[name], tolerance=0.0, max_iterations=200
  )
  gap = (float(solution.dual_value) - optimum.value) / optimum.value
  assert -1e-6 <= gap <= (3e-4 if name != "truncated_alternation" else 2e-3)
  assert solution.primal_value <= optimum.value * (1 + 1e-6)
  assert solution.converged == (solution.iterations < 200)
  assert solution.dual_values[0] == pytest.approx(
    oracle.dual_value(_scores(), np.zeros(E), K), rel=1e-6
  )
  assert solution.dual_value == jnp.nanmin(solution.dual_values)
  np.testing.assert_allclose(
    solution.dual_value,
    oracle.dual_value(_scores(), np.asarray(solution.expert_bias), K),
    rtol=1e-6,
  )
  np.testing.assert_allclose(solution.expert_bias.mean(), 0.0, atol=1e-6)


def test_a_bundle_of_cuts_finds_it_to_rounding(optimum):
  solution = dual.solve(
    _scores(), K, solvers.bundle(), tolerance=0.0, max_iterations=100
  )
  np.testing.assert_allclose(solution.dual_value, optimum.value, rtol=1e-6)


def test_sinkhorn_with_one_expert_per_token_nears_it_as_it_cools():
  scores, gaps = _scores(), []
  best = assignment.solve(scores, 1)
  for temperature in (1.0, 0.1, 0.03):
    solution = dual.solve(
      scores,
      1,
      solvers.sinkhorn(temperature),
      tolerance=0.0,
      max_iterations=300,
    )
    gaps.append((float(solution.dual_values[-1]) - best.value) / best.value)
  assert gaps[0] > gaps[1] > gaps[2]
  assert gaps[2] < 1e-4


def test_sinkhorn_has_the_sums_of_its_plan():
  scores, temperature = _scores(64, 8), 0.5
  solver = solvers.sinkhorn(temperature)
  config = jaxroute.RouterConfig(num_experts=8, top_k=1, score_after_top_k=True)
  problem = solvers.Problem(jnp.asarray(scores), jnp.float32(1))
  bias, state = jnp.zeros(8), ()
  for _ in range(200):
    routes = jaxroute.route(scores, bias, config)
    bias, state = solver.step(problem, state, bias, routes, None)
  plan = jax.nn.softmax((scores + bias[None]) / temperature, axis=1)
  np.testing.assert_allclose(plan.sum(0), 64 / 8, rtol=1e-4)


def test_alternation_is_the_exact_quantile_step():
  first = dual.solve(
    _scores(),
    K,
    solvers.alternating_quantiles(),
    tolerance=0.0,
    max_iterations=2,
  )
  after = dual.exact_quantile(_scores(), jnp.zeros(E), K)
  np.testing.assert_allclose(
    first.dual_values[1],
    oracle.dual_value(_scores(), np.asarray(after), K),
    rtol=1e-6,
  )


def test_equal_solvers_are_one_to_jit():
  assert solvers.bundle(8) is solvers.bundle(8)
  rule = dual.sign(0.1)
  assert solvers.subgradient(rule) is solvers.subgradient(rule)


def test_truncation_by_hand():
  # q is the (T K / E + 1)-th largest of s - p, and p of s - q, both at least 0.
  scores = jnp.asarray(_scores(64, 8) - 0.6)
  config = jaxroute.RouterConfig(num_experts=8, top_k=2, score_after_top_k=True)
  problem = solvers.Problem(scores, jnp.float32(1))
  step = solvers.truncated_alternation().step
  s, q, bias = np.asarray(scores), np.zeros(8, np.float32), jnp.zeros(8)
  for _ in range(3):
    routes = jaxroute.route(scores, bias, config)
    bias, _ = step(problem, (), bias, routes, None)
    p = np.maximum(np.sort(s - q, axis=1)[:, -3], 0)
    q = np.maximum(np.sort(s - p[:, None], axis=0)[-(64 * 2 // 8) - 1], 0)
    np.testing.assert_allclose(bias, -q, atol=1e-6)
  assert (q == 0).any() and (q > 0).any()


def test_triple_momentum_by_hand():
  # Its published form: xi' = (1 + b) xi - b xi_before - a grad(y),
  # y = (1 + c) xi - c xi_before.
  rate, condition = 0.25, 9.0
  r = 1 - 1 / 3
  a, b, c = (1 + r) * rate, r**2 / (2 - r), r**2 / ((1 + r) * (2 - r))
  curvature = np.array([4.0, 4.0 / 9.0], np.float32)
  rule = dual.triple_momentum(rate, condition)
  y = jnp.ones(2)
  state = rule.init(y)
  before = xi = np.ones(2)
  for _ in range(12):
    updates, state = rule.update(curvature * y, state, y)
    y = optax.apply_updates(y, updates)
    expected = (1 + c) * xi - c * before
    before, xi = xi, (1 + b) * xi - b * before - a * curvature * expected
    np.testing.assert_allclose(y, (1 + c) * xi - c * before, atol=1e-6)
  # The error falls by r a step, once the method has settled.
  assert np.abs(xi).max() < 2 * r**8


_repair = jax.jit(assignment.repair, static_argnums=2)


@given(
  seed=st.integers(0, 10_000),
  k=st.sampled_from([1, 3, 7]),
  t=st.sampled_from([2, 24, 61]),
)
def test_repair_is_balanced_and_its_loss_is_the_gap(seed, k, t):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(t, 8)).astype(np.float32)
  bias = (rng.normal(size=8) * 0.5).astype(np.float32)
  x, loss = _repair(scores, bias, k)
  assert x.min() >= 0 and x.max() <= 1
  np.testing.assert_allclose(x.sum(1), k, atol=1e-5)
  np.testing.assert_allclose(x.sum(0), t * k / 8, atol=1e-3)
  value = float((x * scores).sum())
  gap = oracle.dual_value(scores, bias, k) - value
  np.testing.assert_allclose(loss, gap, atol=1e-3)
  if t * k % 8 == 0:
    np.testing.assert_array_equal(x, np.round(x))
  assert value <= assignment.solve(scores, k).value + 1e-3


def test_padding_is_invisible():
  scores, mask = _scores(), np.arange(T) % 3 > 0
  masked = scores.copy()
  masked[~mask] = np.nan
  kept = dual.solve(scores[mask], K, tolerance=0.0, max_iterations=8)
  padded = dual.solve(
    masked,
    K,
    token_mask=jnp.asarray(mask),
    tolerance=0.0,
    max_iterations=8,
  )
  np.testing.assert_allclose(padded.expert_bias, kept.expert_bias, atol=5e-6)
  np.testing.assert_allclose(padded.dual_values, kept.dual_values, rtol=1e-6)
  np.testing.assert_allclose(padded.primal_value, kept.primal_value, rtol=1e-6)
  x, _ = assignment.repair(masked, kept.expert_bias, K, jnp.asarray(mask))
  np.testing.assert_array_equal(x[~mask], 0)


def test_it_stops_when_a_balanced_assignment_proves_it(optimum):
  solution = dual.solve(_scores(), K, tolerance=2e-3)
  assert solution.converged
  assert solution.iterations in (2, 4, 8, 16, 32)
  gap = solution.gap[: int(solution.iterations)]
  assert gap.min() <= 2e-3 < gap[0]
  assert solution.primal_value <= optimum.value <= solution.dual_value
  assert np.isnan(solution.gap[int(solution.iterations) :]).all()
  again = dual.solve(
    _scores(), K, expert_bias=solution.expert_bias, tolerance=2e-3
  )
  assert again.converged and again.iterations == 1


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
    (lambda: dual.solve(jnp.zeros(4), 1), "`logits` must be"),
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
    (lambda: solvers.sinkhorn(0.0), "`temperature`.*0.0"),
    (
      lambda: solvers.sparse_transport(optax.sgd(0.1), -1.0),
      "`regularization`.*-1",
    ),
    (lambda: solvers.bundle(1), "`size`.*1"),
    (lambda: dual.triple_momentum(0.1, 0.5), "`condition`.*0.5"),
    (lambda: dual.triple_momentum(-0.1, 2.0), "`rate`.*-0.1"),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
