# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Quantile balancing: from histograms, and exactly, from the scores."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxroute
from jaxroute import dual, metrics
from jaxroute.dual.quantile import histogram_quantile, order_statistic
from jaxroute.routing import bias_histogram

# Another version of JAX runs its docstrings, and system/modes_test.py.
pytestmark = pytest.mark.any_jax

# Eight tokens, four experts, loads 4, 3, 1, 0 at first and 2 each after a step.
EXAMPLE = jnp.array(
  [
    [0.82, 0.12, 0.21, 0.62],
    [0.32, 0.83, 0.62, 0.02],
    [0.87, 0.25, 0.64, 0.22],
    [0.20, 0.64, 0.31, 0.53],
    [0.89, 0.22, 0.17, 0.02],
    [0.83, 0.24, 0.80, 0.65],
    [0.57, 0.87, 0.18, 0.54],
    [0.45, 0.68, 0.79, 0.03],
  ]
)

_route = jax.jit(
  functools.partial(jaxroute.route, implementation="xla"),
  static_argnames="config",
)

_exact = jax.jit(dual.quantile_bias, static_argnums=2)
_histogram_quantile = jax.jit(histogram_quantile)


def _on_scores(e, k, **kwargs):
  """A router whose selection scores are its logits."""
  return jaxroute.RouterConfig(
    num_experts=e, top_k=k, bias_space="logits", histogram=True, **kwargs
  )


def _distances(logits, bias, k):
  """[T, E] float64 needed bias minus bias, if the logits are scores."""
  selection = np.float64(logits + bias)
  cutoff = -np.sort(-selection, axis=1)[:, k]
  return cutoff[:, None] - selection


@given(
  seed=st.integers(0, 10_000),
  shape=st.sampled_from([(1, 3), (50, 7), (200, 1), (200, 3)]),
  scale=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_a_step_has_the_sign_of_the_exact_one_and_is_within_its_bin(
  seed, shape, scale
):
  (t, k), e = shape, 8
  rng = np.random.default_rng(seed)
  logits = (rng.normal(size=(t, e)) * scale).astype(np.float32)
  bias = (rng.normal(size=e) * scale).astype(np.float32)
  r = _route(logits, bias, _on_scores(e, k))
  found = _histogram_quantile(r.load, r.counts.histogram)
  exact = oracle.quantile_step(_distances(logits, bias, k), t * k // e)
  edges = np.float64(bias_histogram.EDGES)
  low = np.clip(np.searchsorted(edges, exact, side="right") - 1, 0, 15)
  # Float32 subtraction can move a distance over an edge that it is next to.
  slack = 1e-6 * (np.abs(bias) + np.abs(exact) + scale)
  assert (found >= edges[low] - slack).all()
  assert (found <= edges[low + 1] + slack).all()
  far = np.abs(exact) > slack + 2.0**-16
  np.testing.assert_array_equal(np.sign(found)[far], np.sign(exact)[far])
  inside = far & (np.abs(exact) < 32)
  ratio = np.abs(found / np.where(exact == 0, 1, exact))[inside]
  assert (ratio > 1 / 8.01).all() and (ratio < 8.01).all()


def test_the_example_is_balanced_in_one_step():
  config = _on_scores(4, 1)
  bias = jnp.zeros(4)
  load = _route(EXAMPLE, bias, config).load
  np.testing.assert_array_equal(load, [4, 3, 1, 0])
  bias = _exact(EXAMPLE, bias, 1)
  np.testing.assert_allclose(bias, [-0.13, -0.04, 0.07, 0.10], atol=1e-6)
  np.testing.assert_array_equal(_route(EXAMPLE, bias, config).load, 2)


@given(
  seed=st.integers(0, 10_000),
  shape=st.sampled_from([(1, 3), (24, 1), (61, 3), (61, 7)]),
)
def test_the_exact_step_is_the_order_statistic(seed, shape):
  t, k = shape
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(t, 8)).astype(np.float32)
  bias = (rng.normal(size=8) * 0.3).astype(np.float32)
  selection = x + bias
  cutoff = -np.sort(-selection, axis=1)[:, k]
  found = oracle.quantile_step(cutoff[:, None] - x, t * k // 8)
  np.testing.assert_allclose(
    _exact(x, bias, k), found - found.mean(), atol=1e-6
  )


def test_a_step_goes_between_the_edges_of_a_bin_by_hand():
  # T K / E = 6 tokens should be below; 4 are in lower bins, and the bin of the
  # 7th smallest, from 2^-4 to 2^-1, holds 5: that token is taken to be its
  # third.
  histogram = np.zeros((2, 16), np.int32)
  histogram[0, [2, 9, 13, 15]] = 1, 3, 5, 3
  histogram[1, [1, 15]] = 11, 1
  load = jnp.array([4, 8])
  low, high = 2.0**-4, 2.0**-1
  np.testing.assert_array_equal(bias_histogram.EDGES[13:15], [low, high])
  np.testing.assert_array_equal(bias_histogram.EDGES[1:3], [-4.0, -0.5])
  expected = [low + 2.5 / 5 * (high - low), -4.0 + 6.5 / 11 * 3.5]
  found = _histogram_quantile(load, histogram)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_with_the_cutoffs_held_the_mean_load_is_below():
  t, e, k = 512, 8, 2
  rng = np.random.default_rng(0)
  x, cutoff = rng.random((t, e)), rng.random(t)
  needed = jnp.asarray(cutoff[:, None] - x, jnp.float32)
  found = order_statistic(needed, jnp.full(e, t * k // e))
  np.testing.assert_array_equal((needed < found[None]).sum(0), t * k // e)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 7))
def test_a_coordinate_step_never_raises_the_dual(seed, k):
  t, e = 40, 8
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(t, e)).astype(np.float32)
  bias = (rng.normal(size=e) * 0.5).astype(np.float32)
  needed = _distances(x, bias, k) + bias
  # The function that coordinate steps descend on has cutoffs of its own.
  cutoff = -np.sort(-np.float64(x + bias), axis=1)[:, k]
  found = oracle.quantile_step(needed, t * k // e)

  def relaxed(b):
    above = np.maximum(np.float64(x) + b - cutoff[:, None], 0)
    return above.sum() + k * cutoff.sum() - t * k / e * b.sum()

  before = oracle.dual_value(x, bias, k)
  np.testing.assert_allclose(relaxed(bias), before, rtol=1e-6)
  for expert in range(e):
    alone = bias.copy()
    alone[expert] = found[expert]
    after = oracle.dual_value(x, alone, k)
    assert after <= relaxed(alone) + 1e-4 <= before + 2e-4
  # All at once too: the sum over experts separates while the cutoffs are held.
  assert oracle.dual_value(x, found, k) <= relaxed(found) + 1e-4
  assert relaxed(found) <= before + 1e-4


def test_scores_scaled_and_shifted_scale_the_bias():
  x = np.random.default_rng(0).integers(0, 4096, size=(128, 8)) / 4096
  x = jnp.asarray(x, jnp.float32)
  bias = jnp.zeros(8)
  scaled_bias = jnp.zeros(8)
  config = _on_scores(8, 2)
  for _ in range(3):
    bias = _exact(x, bias, 2)
    scaled_bias = _exact(4 * x + 1, scaled_bias, 2)
    np.testing.assert_allclose(scaled_bias, 4 * bias, rtol=1e-5)
  np.testing.assert_array_equal(
    _route(x, bias, config).load, _route(4 * x + 1, scaled_bias, config).load
  )


def _step_of(rule, config):
  """A jitted step: the state after the update, and the load before it."""

  @jax.jit
  def step(state, logits, mask=None):
    r = jaxroute.route(logits, state.expert_bias[0], config, mask)
    return jaxroute.update(jaxroute.accumulate(state, r), rule), r.load

  return step


def _balance(config, steps, ema=0.0, skew=1.0, fresh=False, mask=None):
  """MaxVio of every step under `dual.quantile`."""
  e, t = config.num_experts, 2048
  config = dataclasses.replace(config, histogram=True)
  rule = dual.quantile(ema)

  step = _step_of(rule, config)

  def fresh_step(state, seed):
    noise = jax.random.normal(jax.random.key(seed * int(fresh)), (t, e))
    logits = noise + skew * jnp.linspace(-1.0, 1.0, e)[None]
    state, load = step(state, logits, mask)
    return state, metrics.max_vio(load)

  state = jaxroute.init_router_state(rule, e, histogram=True)
  state, max_vio = jax.lax.scan(fresh_step, state, jnp.arange(steps))
  return np.asarray(max_vio), state


@pytest.mark.parametrize(
  "name", ("mixtral", "deepseek_v4", "olmoe", "lfb", "soft_cap")
)
def test_it_balances_every_score_function_in_a_few_steps(name):
  max_vio, state = _balance(cases.family(name), 6)
  assert max_vio[0] > 1.0
  assert max_vio[-1] < 0.15
  np.testing.assert_allclose(state.expert_bias.mean(), 0.0, atol=1e-6)


def test_with_groups_it_needs_the_average():
  max_vio, _ = _balance(cases.family("deepseek_v3"), 30, ema=0.8, fresh=True)
  assert max_vio[0] > 1.0
  assert max_vio[-5:].max() < 0.4


def test_padding_is_invisible_and_a_fractional_mean_is_taken():
  # 2045 tokens times 3 of 7 experts.
  config = jaxroute.RouterConfig(num_experts=7, top_k=3)
  max_vio, _ = _balance(config, 6, mask=jnp.arange(2048) >= 3)
  assert max_vio[-1] < 0.05


def test_fewer_assignments_than_experts():
  t, e = 8, 32
  x = jnp.asarray(cases.logits("random", t, e))
  config = _on_scores(e, 1)
  bias = _exact(x, jnp.zeros(e), 1)
  assert np.isfinite(bias).all()
  r = _route(x, bias, config)
  assert r.load.max() <= 2
  step = _histogram_quantile(r.load, r.counts.histogram)
  assert np.isfinite(step).all()


def test_what_cannot_be_balanced_stays_finite():
  rule = dual.quantile()
  x = np.array(cases.logits("random", 64, 8))
  x[:, 3] = -np.inf  # no token can choose it
  x[4:, 5] = -np.inf  # four can: it goes to the most that one needs
  config = _on_scores(8, 2)
  step = _step_of(rule, config)
  state = jaxroute.init_router_state(rule, 8, histogram=True)
  exact = jnp.zeros(8)
  for _ in range(30):
    state, _ = step(state, x)
    exact = _exact(x, exact, 2)
  for bias in (state.expert_bias[0], exact):
    load = np.asarray(_route(x, bias, config).load)
    assert np.isfinite(bias).all()
    assert load[3] == 0 and load[5] == 4
    # The others share the rest.
    assert abs(load - 124 / 6)[[0, 1, 2, 4, 6, 7]].max() <= 4


@pytest.mark.parametrize("k", (1, 8))
def test_nothing_counted_or_nothing_to_choose_moves_nothing(k):
  rule, config = dual.quantile(), _on_scores(8, k)
  x, mask = cases.logits("random", 16, 8), np.full(16, k == 8)
  state = jaxroute.init_router_state(rule, 8, histogram=True)
  state = dataclasses.replace(
    state, expert_bias=jnp.ones((1, 8)).at[0, 0].set(3)
  )
  after, _ = _step_of(rule, config)(state, x, mask)
  moved = after.expert_bias - state.expert_bias
  np.testing.assert_array_equal(moved - moved[0, 0], 0)
  exact = _exact(x, state.expert_bias[0], k, jnp.asarray(mask))
  np.testing.assert_array_equal(exact - exact[1], [2, 0, 0, 0, 0, 0, 0, 0])


def test_the_average_keeps_its_share():
  x = jnp.asarray(cases.logits("random", 64, 8))
  r = _route(x, None, _on_scores(8, 2))
  bias = jnp.zeros(8)
  whole, part, chained = (
    rule.update(
      bias, rule.init(bias), bias, load=r.load, histogram=r.counts.histogram
    )[0]
    for rule in (
      dual.quantile(),
      dual.quantile(0.75),
      optax.chain(dual.quantile(), optax.scale(0.25)),
    )
  )
  np.testing.assert_allclose(part, 0.25 * whole, rtol=1e-6)
  np.testing.assert_allclose(chained, 0.25 * whole, rtol=1e-6)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: dual.quantile(1.0), "`ema`.*1.0"),
    (
      lambda: jaxroute.update(
        jaxroute.init_router_state(dual.quantile(), 8), dual.quantile()
      ),
      "needs a histogram, got None.*histogram=True",
    ),
    (
      lambda: jaxroute.accumulate(
        jaxroute.init_router_state(dual.quantile(), 4, histogram=True),
        _route(EXAMPLE, None, jaxroute.RouterConfig(num_experts=4, top_k=1)),
      ),
      "`routing` must have a histogram, got None",
    ),
    (
      lambda: _exact(EXAMPLE, jnp.zeros(3), 1),
      r"`expert_bias` must be \[E=4\]",
    ),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_a_layer_can_be_left_out():
  load = {"a": jnp.array([3, 1]), "b": jnp.array([3, 1])}
  histogram = {
    name: jnp.zeros((2, 16), jnp.int32).at[0, 3].set(4).at[1, 12].set(4)
    for name in load
  }
  bias = jax.tree.map(jnp.zeros_like, load)
  bias = jax.tree.map(lambda x: x.astype(jnp.float32), bias)
  rule = optax.partition(
    {"moves": dual.quantile(), "stays": optax.set_to_zero()},
    {"a": "moves", "b": "stays"},
  )
  counts = dict(load=load, histogram=histogram)
  updates, _ = rule.update(bias, rule.init(bias), bias, **counts)
  alone = dual.quantile()
  expected, _ = alone.update(bias, alone.init(bias), bias, **counts)
  np.testing.assert_array_equal(updates["a"], expected["a"])
  assert jnp.all(updates["a"] != 0)
  np.testing.assert_array_equal(updates["b"], 0)
