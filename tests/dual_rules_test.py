# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rules against their papers' updates, on numbers worked out by hand."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxroute
from jaxroute import dual, metrics, scores

pytestmark = pytest.mark.any_jax

# Loads 8, 4, 4, 0: mean 4, violation 1, 0, 0, -1.
VIOLATION = jnp.array([[1.0, 0.0, 0.0, -1.0]])

RULES = {
  "sign": lambda: dual.sign(1e-2),
  "sign_sqrt": lambda: dual.sign(dual.inverse_sqrt(1e-2)),
  "sign_inverse": lambda: dual.sign(dual.inverse(0.1)),
  "sign_centered": lambda: optax.chain(dual.sign(1e-2), dual.center()),
  "proportional": lambda: dual.proportional(1e-2),
  "smebu": lambda: dual.smebu(1e-2),
  "pid": lambda: dual.pid(1e-2, 1e-4, 1e-3),
  "momentum": lambda: optax.chain(
    dual.center(), optax.trace(0.9), optax.scale(-1e-3)
  ),
  "nesterov": lambda: optax.sgd(1e-3, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-2),
}


_route = jax.jit(jaxroute.route, static_argnames="config")


def _run(rule, violations):
  """The bias after each of a sequence of violations."""
  bias = jnp.zeros_like(violations[0])
  state = rule.init(bias)
  trajectory = []
  for v in violations:
    updates, state = rule.update(v, state, bias)
    bias = optax.apply_updates(bias, updates)
    trajectory.append(bias)
  return trajectory


def test_sign_moves_by_the_rate_against_the_violation():
  first, second = _run(dual.sign(0.25), [VIOLATION, VIOLATION])
  np.testing.assert_array_equal(first, [[-0.25, 0, 0, 0.25]])
  np.testing.assert_array_equal(second, [[-0.5, 0, 0, 0.5]])


def test_sign_sees_only_the_sign():
  (bias,) = _run(dual.sign(0.5), [jnp.array([[1e-7, -3.0, 0.0]])])
  np.testing.assert_array_equal(bias, [[-0.5, 0.5, 0.0]])


def test_proportional_is_minus_rate_times_violation():
  (bias,) = _run(dual.proportional(0.1), [jnp.array([[1.5, -0.5, -0.5, -0.5]])])
  np.testing.assert_allclose(bias, [[-0.15, 0.05, 0.05, 0.05]], rtol=1e-6)


def test_center_makes_any_update_zero_sum():
  rule = optax.chain(dual.sign(1.0), dual.center())
  (bias,) = _run(rule, [jnp.array([[3.0, -1.0, -1.0, -1.0]])])
  np.testing.assert_array_equal(bias, [[-1.5, 0.5, 0.5, 0.5]])


def test_center_takes_every_layer_by_itself():
  rule = dual.center()
  updates, _ = rule.update(jnp.array([[3.0, 1.0], [0.0, -8.0]]), rule.init(0))
  np.testing.assert_array_equal(updates, [[1.0, -1.0], [4.0, -4.0]])


def test_smebu_by_hand():
  # d = 0.1 tanh(2 v'), v' = -violation = (-1, 0, 0, 1); already zero-mean.
  # m1 = d / 2, m2 = m1 / 2 + d / 2; bias = m1 + m2 = d (1/2 + 3/4).
  d = 0.1 * math.tanh(2.0)
  first, second = _run(dual.smebu(0.1, beta=0.5, kappa=2.0), [VIOLATION] * 2)
  np.testing.assert_allclose(first, [[-d / 2, 0, 0, d / 2]], rtol=1e-6)
  np.testing.assert_allclose(second, [[-1.25 * d, 0, 0, 1.25 * d]], rtol=1e-6)


def test_smebu_subtracts_the_mean_step():
  v = jnp.array([[3.0, -1.0, -1.0, -1.0]])
  (bias,) = _run(dual.smebu(1.0, beta=0.0, kappa=100.0), [v])
  np.testing.assert_allclose(bias, [[-1.5, 0.5, 0.5, 0.5]], rtol=1e-6)


def test_smebu_without_momentum_and_hard_clamp_is_the_centred_sign_rule():
  violations = [
    jnp.asarray(np.random.default_rng(i).normal(size=(2, 8)), jnp.float32)
    for i in range(4)
  ]
  smebu = _run(dual.smebu(0.01, beta=0.0, kappa=1e6), violations)
  sign = _run(optax.chain(dual.sign(0.01), dual.center()), violations)
  chex.assert_trees_all_close(smebu, sign, atol=1e-7)


def test_pid_by_hand():
  # v = 1 then 0.5 on expert 0: sums 1, 1.5; changes 1, -0.5.
  # increments -(0.1 + 0.01 + 1) and -(0.05 + 0.015 - 0.5).
  rule = dual.pid(0.1, 0.01, 1.0)
  first, second = _run(rule, [jnp.array([[1.0]]), jnp.array([[0.5]])])
  np.testing.assert_allclose(first, [[-1.11]], rtol=1e-6)
  np.testing.assert_allclose(second, [[-1.11 + 0.435]], rtol=1e-6)


def test_pid_of_gain_mu_over_e_is_longcat():
  # mu (1 / N - T_i / (K T_all)) with loads (8, 4, 4, 0), N = 4, K T_all = 16.
  mu = 0.2
  (bias,) = _run(dual.pid(mu / 4), [VIOLATION])
  load = np.array([8, 4, 4, 0])
  np.testing.assert_allclose(bias[0], mu * (1 / 4 - load / 16), rtol=1e-6)


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


def test_momentum_chain_is_a_rule():
  # trace: t1 = v, t2 = v + 0.5 v; bias -= 0.1 t.
  rule = optax.chain(dual.center(), optax.trace(0.5), optax.scale(-0.1))
  _, second = _run(rule, [VIOLATION] * 2)
  np.testing.assert_allclose(second, [[-0.25, 0, 0, 0.25]], rtol=1e-6)


@pytest.mark.implicit_promotion  # optax.adam promotes its count
@pytest.mark.parametrize("name", RULES)
def test_state_is_stable_under_update_and_init_is_abstract(name):
  rule = RULES[name]()
  state = rule.init(VIOLATION)
  abstract = jax.eval_shape(rule.init, VIOLATION)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
  updates, after = jax.jit(rule.update)(VIOLATION, state, VIOLATION)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
  assert updates.dtype == jnp.float32


@pytest.mark.implicit_promotion  # optax.adam promotes its count
@pytest.mark.parametrize("name", RULES)
def test_every_rule_balances_a_skewed_router(name):
  t, e, k = 512, 8, 2
  rng = np.random.default_rng(0)
  logits = jnp.asarray(
    rng.normal(size=(t, e)) + np.linspace(-1, 1, e), jnp.float32
  )
  config = jaxroute.RouterConfig(num_experts=e, top_k=k)
  rule = RULES[name]()

  def step(state, _):
    routing = jaxroute.route(logits, state.expert_bias[0], config)
    state = jaxroute.update(jaxroute.accumulate(state, routing), rule)
    return state, metrics.max_vio(routing.load)

  state = jaxroute.init_router_state(rule, e)
  _, max_vio = jax.jit(lambda s: jax.lax.scan(step, s, length=600))(state)
  assert max_vio[0] > 1.0
  # The constant steps end in a cycle; the widest of it is the last stretch.
  assert jnp.max(max_vio[-20:]) < 0.2


_scores = jax.jit(scores.scores, static_argnames="config")


def _dual_value(logits, bias, config):
  return oracle.dual_value(_scores(logits, config), bias, config.top_k)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 3))
def test_violation_is_a_subgradient_of_the_dual(seed, k):
  # g(b') >= g(b) + (load - L) . (b' - b) for all b'.
  rng = np.random.default_rng(seed)
  config = jaxroute.RouterConfig(num_experts=6, top_k=k)
  logits = jnp.asarray(rng.normal(size=(24, 6)), jnp.float32)
  b, other = rng.normal(size=(2, 6)).astype(np.float32) * 0.3
  routing = _route(logits, b, config)
  mean = 24 * k / 6
  slope = np.asarray(metrics.violation(routing.load)) * mean
  bound = _dual_value(logits, b, config) + slope @ (other - b)
  assert _dual_value(logits, other, config) >= bound - 1e-4


PLAIN_AND_CENTRED = (
  dual.sign(0.125),
  optax.chain(dual.sign(0.125), dual.center()),
)


@functools.partial(jax.jit, static_argnums=2)
def _count_and_update(state, routing, rule):
  return jaxroute.update(jaxroute.accumulate(state, routing), rule)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_centred_and_plain_sign_rules_choose_alike(seed):
  rng = np.random.default_rng(seed)
  config = jaxroute.RouterConfig(num_experts=8, top_k=2, bias_space="logits")
  # Multiples of 1/64 and a step of 1/8: every sum below is exact in float32.
  logits = jnp.asarray(rng.integers(-64, 64, size=(32, 8)) / 64, jnp.float32)
  rules = PLAIN_AND_CENTRED
  states = [jaxroute.init_router_state(rule, 8) for rule in rules]
  for _ in range(4):
    routings = [_route(logits, s.expert_bias[0], config) for s in states]
    np.testing.assert_array_equal(
      routings[0].expert_idx, routings[1].expert_idx
    )
    states = [
      _count_and_update(s, routing, rule)
      for s, routing, rule in zip(states, routings, rules, strict=True)
    ]


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: dual.sign(-1e-3), "`rate`.*-0.001"),
    (lambda: dual.sign(math.nan), "`rate`.*nan"),
    (lambda: dual.proportional(-1.0), "`rate`.*-1"),
    (lambda: dual.smebu(beta=1.0), "`beta`.*1.0"),
    (lambda: dual.smebu(kappa=0.0), "`kappa`.*0"),
    (lambda: dual.smebu(-1.0), "`rate`.*-1"),
    (lambda: dual.pid(-0.1), "`proportional`.*-0.1"),
    (lambda: dual.pid(0.1, -1.0), "`integral`.*-1"),
    (lambda: dual.pid(0.1, 0.0, -1.0), "`derivative`.*-1"),
    (lambda: dual.triple_momentum(0.1, 0.5), "`condition`.*0.5"),
    (lambda: dual.triple_momentum(-0.1, 2.0), "`rate`.*-0.1"),
  ],
)
def test_bad_rates_are_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
