# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What is true of balancing as dual descent, on fixed scores, and what is not.

docs/theory.md states these; every claim there names its test here. Scores and
steps are multiples of a power of two, so that float32 sums are exact, wherever
a test is of an identity.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxroute
from jaxroute import assignment, dual, metrics

pytestmark = pytest.mark.any_jax

GRAIN = 2.0**-12


_config = jaxroute.RouterConfig.on_scores


@functools.partial(jax.jit, static_argnums=2)
def _route(scores, bias, config):
  return jaxroute.route(scores, bias, config)


def _scores(t, e, seed=0, skew=0.0):
  """Multiples of GRAIN in [0, 1); `skew` favours the first experts."""
  rng = np.random.default_rng(seed)
  scores = rng.random((t, e)) + skew * np.linspace(1, 0, e)
  return (np.round(scores / GRAIN) * GRAIN).astype(np.float32)


def _descend(rule, scores, k, steps, bias=None):
  """Biases and loads of `steps` updates; the first are before any update."""
  config, e = _config(scores.shape[1], k), scores.shape[1]
  bias = jnp.zeros(e) if bias is None else bias
  scores = jnp.asarray(scores)

  @jax.jit
  def step(carry, _):
    bias, state = carry
    load = jaxroute.route(scores, bias, config).load
    updates, state = rule.update(metrics.violation(load), state, bias)
    return (optax.apply_updates(bias, updates), state), (bias, load)

  _, (biases, loads) = jax.lax.scan(step, (bias, rule.init(bias)), length=steps)
  return np.asarray(biases, np.float64), np.asarray(loads)


RULES = {
  "sign": lambda t, e, k: dual.sign(16 * GRAIN),
  # A common step of a GRAIN for every token too many.
  "proportional": lambda t, e, k: dual.proportional(GRAIN * t * k / e),
}


@pytest.mark.parametrize("k", (1, 2, 4))
@pytest.mark.parametrize("name", RULES)
def test_a_step_changes_the_dual_by_the_descent_and_the_rerouting(name, k):
  # g(b') - g(b) = -sum_e d_e (L - A_e) + sum_i B_i, B_i >= 0 what token i gains
  # by changing its experts at the new bias; d is the step.
  t, e = 64, 8
  scores = _scores(t, e, k, skew=0.5)
  biases, loads = _descend(RULES[name](t, e, k), scores, k, 300)
  steps = zip(itertools.pairwise(biases), loads, strict=False)
  rose = 0
  for (before, after), load in steps:
    change = oracle.dual_value(scores, after, k) - oracle.dual_value(
      scores, before, k
    )
    d = after - before
    descent = float(d @ (load - t * k / e))
    old = np.argsort(-(scores + before), axis=1, kind="stable")[:, :k]
    new = np.sort(scores + after, axis=1)[:, -k:].sum(1)
    gains = new - np.take_along_axis(scores + after, old, axis=1).sum(1)
    assert (gains >= -1e-12).all()
    np.testing.assert_allclose(change, descent + gains.sum(), atol=1e-9)
    assert descent <= 0
    rose += change > 0
  # No step is sure to lower it: in the end some raise it.
  assert name != "sign" or rose > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_dual_falls_while_no_load_crosses_the_mean(seed):
  t, e, k = 256, 8, 2
  scores = _scores(t, e, seed, skew=0.5)
  biases, loads = _descend(dual.sign(8 * GRAIN), scores, k, 200)
  mean, kept_side = t * k / e, 0
  for n in range(199):
    before, after = loads[n] - mean, loads[n + 1] - mean
    if (before * after >= 0).all():
      kept_side += 1
      change = oracle.dual_value(scores, biases[n + 1], k) - oracle.dual_value(
        scores, biases[n], k
      )
      assert change <= 1e-9
  assert kept_side > 5


@pytest.mark.parametrize("k", (1, 2, 4))
@pytest.mark.parametrize("name", RULES)
def test_tokens_move_to_experts_whose_bias_rises_more(name, k):
  t, e = 128, 8
  rng = np.random.default_rng(k)
  scores = rng.random((t, e)).astype(np.float32)
  biases, _ = _descend(RULES[name](t, e, k), scores, k, 50)
  moves = 0
  for before, after in itertools.pairwise(biases):
    step = after - before
    old, new = (
      np.asarray(_route(scores, jnp.float32(b), _config(e, k)).expert_idx)
      for b in (before, after)
    )
    for i in range(t):
      left, entered = set(old[i]) - set(new[i]), set(new[i]) - set(old[i])
      for a, b in itertools.product(left, entered):
        moves += 1
        assert step[b] > step[a]
  assert moves > 20


def _smallest_difference(scores):
  """Half the least |(s_ik - s_ik') - (s_jk - s_jk')|: the bound of the step."""
  least = np.inf
  for a, b in itertools.combinations(range(scores.shape[1]), 2):
    difference = np.sort(np.float64(scores[:, a]) - scores[:, b])
    least = min(least, np.diff(difference).min())
  return least / 2


@pytest.mark.parametrize("k", (1, 2, 3))
def test_under_a_small_step_loads_stay_within_e_minus_1_of_the_mean(k):
  t, e = 20, 4
  rng = np.random.default_rng(k)
  # Differences of float32 scores that are about 2^-12 apart.
  scores = rng.permutation(t * e).reshape(t, e) ** 1.5
  scores = (scores / scores.max()).astype(np.float32)
  u = 0.9 * _smallest_difference(scores)
  assert u > 1e-6
  _, loads = _descend(dual.sign(u), scores, k, int(2 / u))
  assert np.abs(np.diff(loads, axis=0)).max() <= e - 1
  within = np.abs(loads - t * k / e).max(1) <= e - 1
  entered = int(np.argmax(within))
  assert within.any() and within[entered:].all()


def test_under_a_usual_step_they_do_not():
  t, e, k = 512, 8, 2
  _, loads = _descend(dual.sign(3e-2), _scores(t, e, skew=0.5), k, 500)
  last = np.abs(loads[-100:] - t * k / e).max(1)
  assert last.max() > e - 1


def test_the_slope_of_uniform_scores():
  # Per token, dA_0 / db_0 = 1 and dA_1 / db_0 = -1 / (E - 1), whatever K.
  t, e, h = 200_000, 8, 0.02
  scores = np.random.default_rng(0).random((t, e)).astype(np.float32)
  for k in (1, 3):
    up, down = (
      np.asarray(_route(scores, h * s * jnp.eye(e)[0], _config(e, k)).load)
      for s in (1, -1)
    )
    slope = (up - down) / (2 * h * t)
    np.testing.assert_allclose(slope[0], 1.0, atol=0.05)
    np.testing.assert_allclose(slope[1:], -1 / (e - 1), atol=0.03)


def test_a_common_offset_changes_neither_routes_nor_the_dual():
  scores = _scores(64, 8)
  bias = jnp.asarray(_scores(1, 8, 1)[0])
  config = _config(8, 2)
  routes = [
    _route(scores, bias + offset, config).expert_idx
    for offset in (0.0, 2.0, -1.5)
  ]
  np.testing.assert_array_equal(routes[0], routes[1])
  np.testing.assert_array_equal(routes[0], routes[2])
  values = [oracle.dual_value(scores, bias + x, 2) for x in (0.0, 2.0)]
  np.testing.assert_allclose(*values, rtol=1e-12)


def test_in_bfloat16_an_offset_of_5_changes_routes():
  # So the bias stays float32: 8 bits cannot tell scores apart beside a 5.
  scores = np.random.default_rng(0).random((256, 64)).astype(np.float32)
  exact = _route(scores, jnp.full(64, 5.0), _config(64, 8)).expert_idx
  sums = jnp.asarray(scores, jnp.bfloat16) + jnp.full(
    (1, 64), 5.0, jnp.bfloat16
  )
  rounded = jax.lax.top_k(sums, 8)[1]
  same = np.all(np.sort(exact, axis=1) == np.sort(rounded, axis=1), axis=1)
  assert same.mean() < 0.7


@pytest.mark.parametrize(
  ("rate", "worst"),
  ((1e-3, 0.05), (dual.inverse_sqrt(1e-2), 0.02), (dual.inverse(0.3), 0.005)),
)
def test_step_sizes_that_shrink_end_nearer_to_balance(rate, worst):
  t, e, k = 512, 8, 2
  _, loads = _descend(dual.sign(rate), _scores(t, e, skew=0.5), k, 5000)
  assert metrics.max_vio(jnp.asarray(loads[0])) > 0.5
  assert metrics.max_vio(jnp.asarray(loads[-1])) <= worst


def test_a_first_step_too_small_to_travel_stalls():
  # u / n travels u ln N in all.
  scores = _scores(512, 8, skew=0.5)
  biases, loads = _descend(dual.sign(dual.inverse(1e-3)), scores, 2, 2000)
  assert np.abs(biases[-1]).max() <= 1e-3 * (1 + np.log(2000))
  assert metrics.max_vio(jnp.asarray(loads[-1])) > 0.5


def test_a_constant_step_ends_in_a_cycle_as_wide_as_the_step():
  scores = _scores(512, 8, skew=0.5)
  overflow = []
  for u in (4 * GRAIN, 40 * GRAIN, 400 * GRAIN):
    biases, loads = _descend(dual.sign(u), scores, 2, 3000)
    overflow.append(metrics.max_vio(jnp.asarray(loads[-1])))
    width = biases[-200:].max(0) - biases[-200:].min(0)
    assert width.max() <= 8 * u
  assert overflow[0] < overflow[1] < overflow[2]


def test_the_shrinking_sign_rule_finds_the_dual_of_the_linear_program():
  t, e, k = 1024, 16, 4
  scores = _scores(t, e, skew=0.3)
  biases, loads = _descend(dual.sign(dual.inverse_sqrt(1e-2)), scores, k, 5000)
  best = assignment.solve(scores, k)
  found = biases[-1] - biases[-1].mean()
  assert np.corrcoef(found, best.expert_bias)[0, 1] > 0.999
  gap = oracle.dual_value(scores, found, k) - best.value
  assert -1e-6 <= gap <= 1e-4 * best.value
  idx = np.asarray(_route(scores, jnp.float32(found), _config(e, k)).expert_idx)
  agreement = np.take_along_axis(best.x, idx, axis=1).mean()
  assert agreement > 0.99
  gap_of = jax.jit(assignment.duality_gap, static_argnums=2)
  proven = gap_of(scores, jnp.float32(found), k)
  assert gap - 1e-3 <= proven <= 1e-4 * best.value
  # The loads alone tell how far the bias and they are from complementary.
  slack = assignment.complementary_slackness(
    jnp.float32(found), jnp.asarray(loads[-1])
  )
  assert abs(slack) < 1e-3 * best.value


def test_a_proportional_step_is_stable_up_to_2_over_the_curvature():
  # The curvature of uniform scores is T E / (E - 1), on biases of mean 0.
  t, e, k = 4096, 8, 2
  scores = np.random.default_rng(0).random((t, e)).astype(np.float32)
  critical = 2 * (e - 1) / e / t
  start = jnp.linspace(-0.05, 0.05, e)
  ends = []
  for factor in (0.5, 2.0):
    rate = factor * critical * t * k / e  # of the violation
    _, loads = _descend(dual.proportional(rate), scores, k, 200, start)
    ends.append(float(metrics.max_vio(jnp.asarray(loads[-1]))))
  assert ends[0] < 0.03
  assert ends[1] > 10 * ends[0]


def test_regret_of_shrinking_steps_grows_slower_than_the_number_of_batches():
  t, e, k, n = 32, 4, 1, 128
  rng = np.random.default_rng(0)
  scores = rng.random((n, t, e)) + 0.3 * np.linspace(1, 0, e)
  scores = scores.astype(np.float32)
  rule, config = dual.sign(dual.inverse_sqrt(0.1)), _config(e, k)
  bias, biases = jnp.zeros(e), []
  state = rule.init(bias)
  for batch in scores:
    biases.append(np.asarray(bias, np.float64))
    load = _route(batch, bias, config).load
    updates, state = rule.update(metrics.violation(load), state, bias)
    bias = optax.apply_updates(bias, updates)
  half, whole = (
    assignment.regret(scores[:m], np.stack(biases[:m]), k) for m in (n // 2, n)
  )
  assert 0 < whole < 1.5 * half
  never = assignment.regret(scores, np.zeros((n, e)), k)
  assert whole < never / 5
