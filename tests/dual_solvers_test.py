# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Solvers against the exact optimum, and their steps against their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxroute
from jaxroute import assignment, dual
from jaxroute.dual import solvers

# Another version of JAX runs one in dual_solve_test.py.
pytestmark = pytest.mark.any_jax

T, E, K = 512, 16, 4

SOLVERS = {
  "alternating_quantiles": solvers.alternating_quantiles(),
  "bip": solvers.bip(),
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


_route = jax.jit(jaxroute.route, static_argnames="config")


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
  assert -1e-6 <= gap <= (3e-4 if name != "bip" else 2e-3)
  assert solution.primal_value <= optimum.value * (1 + 1e-6)
  assert solution.converged == (solution.iterations < 200)
  assert solution.dual_values[0] == pytest.approx(
    oracle.dual_value(_scores(), np.zeros(E), K), rel=1e-6
  )
  assert solution.dual_value == jnp.min(solution.dual_values)
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
  config = jaxroute.RouterConfig.on_scores(8, 1)
  problem = solvers.Problem(jnp.asarray(scores), jnp.float32(1))
  bias, state = jnp.zeros(8), ()

  @jax.jit
  def step(bias, state):
    routes = jaxroute.route(problem.scores, bias, config)
    return solver.step(problem, state, solvers.Iterate(bias, routes, None))

  for _ in range(200):
    bias, state = step(bias, state)
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
  after = jax.jit(dual.quantile_bias, static_argnums=2)(
    _scores(), jnp.zeros(E), K
  )
  np.testing.assert_allclose(
    first.dual_values[1],
    oracle.dual_value(_scores(), np.asarray(after), K),
    rtol=1e-6,
  )


def test_bip_by_hand():
  # q is the (T K / E + 1)-th largest of s - p, and p of s - q, both at least 0.
  scores = jnp.asarray(_scores(64, 8) - 0.6)
  config = jaxroute.RouterConfig.on_scores(8, 2)
  problem = solvers.Problem(scores, jnp.float32(1))
  step = jax.jit(solvers.bip().step)
  s, q, bias = np.asarray(scores), np.zeros(8, np.float32), jnp.zeros(8)
  for _ in range(3):
    routes = _route(scores, bias, config)
    bias, _ = step(problem, (), solvers.Iterate(bias, routes, None))
    p = np.maximum(np.sort(s - q, axis=1)[:, -3], 0)
    q = np.maximum(np.sort(s - p[:, None], axis=0)[-(64 * 2 // 8) - 1], 0)
    np.testing.assert_allclose(bias, -q, atol=1e-6)
  assert (q == 0).any() and (q > 0).any()


def test_equal_solvers_are_one_to_jit():
  assert solvers.bundle(8) is solvers.bundle(8)
  rule = dual.sign(0.1)
  assert solvers.subgradient(rule) is solvers.subgradient(rule)


@pytest.mark.implicit_promotion  # optax.sgd promotes its momentum
def test_sparse_transport_by_hand():
  scores, bias = _scores(6, 4), np.float32([0.3, -0.1, 0.0, 0.2])
  scale, rate, regularization = 2.0, 0.5, 0.25
  mask = np.arange(6) != 2
  routes = _route(
    scores, bias, jaxroute.RouterConfig.on_scores(4, 2), jnp.asarray(mask)
  )
  mass = np.zeros(4)
  for row in np.float64(scores + bias)[mask]:
    first, second = np.argsort(-row)[:2]
    # Two numbers that sum to 1 and differ as the scaled scores do, or 1 and 0.
    difference = (row[first] - row[second]) / (regularization * scale)
    share = min(1.0, (1.0 + difference) / 2)
    mass[first] += share
    mass[second] += 1.0 - share
  expected = bias - scale * rate * (mass / (5 / 4) - 1.0)
  solver = solvers.sparse_transport(optax.sgd(rate), regularization)
  problem = solvers.Problem(jnp.asarray(scores), jnp.float32(scale))
  state = solver.init(problem, jnp.asarray(bias))
  at = solvers.Iterate(jnp.asarray(bias), routes, None)
  moved, _ = jax.jit(solver.step)(problem, state, at)
  np.testing.assert_allclose(moved, expected, rtol=1e-5)


@pytest.mark.implicit_promotion  # optax.sgd promotes its momentum
@pytest.mark.parametrize("name", ["sinkhorn", *SOLVERS])
def test_padding_is_invisible_to_a_step(name):
  solver = SOLVERS.get(name, solvers.sinkhorn(0.5))
  scores, mask = _scores(24, 8), np.arange(24) % 3 > 0
  # No token can choose the last expert, whose bias stays.
  scores[:, 7] = -np.inf
  config = jaxroute.RouterConfig.on_scores(8, 2)
  bias = jnp.linspace(0.2, -0.1, 8)

  @jax.jit
  def step(scores, mask):
    problem = solvers.Problem(scores, jnp.float32(0.5))
    routes = jaxroute.route(scores, bias, config, mask)
    value = jnp.float32(30)
    state = solver.init(problem, bias)
    return solver.step(problem, state, solvers.Iterate(bias, routes, value))[0]

  padded = step(scores, mask)
  kept = step(scores[mask], np.ones(16, np.bool_))
  np.testing.assert_allclose(padded, kept, atol=1e-6)
  assert (padded != bias).any()


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: solvers.sinkhorn(0.0), "`temperature`.*0.0"),
    (
      lambda: solvers.sparse_transport(optax.sgd(0.1), -1.0),
      "`regularization`.*-1",
    ),
    (lambda: solvers.bundle(1), "`size`.*1"),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
