# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Auxiliary losses against their formulas, written out in NumPy."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxroute
from jaxroute import losses

pytestmark = pytest.mark.any_jax

SOFTMAX = jaxroute.RouterConfig(num_experts=4, top_k=2, score_fn="softmax")
SIGMOID = jaxroute.RouterConfig(num_experts=4, top_k=2)

_route = jax.jit(jaxroute.route, static_argnames="config")
_switch = jax.jit(losses.switch, static_argnames="config")
_global_batch = jax.jit(losses.global_batch, static_argnames="config")
_sequence_wise = jax.jit(losses.sequence_wise, static_argnums=(1, 2))
_z_loss = jax.jit(losses.z_loss)


def _logits(t, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(t, 4)), jnp.float32)


def _expected(logits, mask, score, chosen=None):
  """E sum_e f_e P_e over the tokens of `mask`, token by token."""
  f, p, n = np.zeros(4), np.zeros(4), 0
  for i in np.flatnonzero(mask):
    s = score(np.asarray(logits[i], np.float64))
    picks = np.argsort(-s, kind="stable")[:2] if chosen is None else chosen[i]
    f[np.asarray(picks)] += 1
    p += s / s.sum()
    n += 1
  return 4 * np.sum(f / (2 * n) * p / n)


def _softmax(x):
  return np.exp(x) / np.exp(x).sum()


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
  "config, score", [(SOFTMAX, _softmax), (SIGMOID, _sigmoid)]
)
def test_switch_against_the_formula(config, score):
  logits, mask = _logits(9), np.arange(9) % 3 != 1
  bias = jnp.array([0.5, 0.0, -0.5, 0.1])
  routing = _route(logits, bias, config, jnp.asarray(mask))
  expected = _expected(logits, mask, score, routing.expert_idx)
  np.testing.assert_allclose(
    _switch(logits, routing, config), expected, rtol=1e-5
  )


def test_switch_is_one_at_perfect_balance():
  # Every expert is first once and second once, by symmetric logits.
  base = jnp.array([2.0, 1.0, 0.0, -1.0])
  logits = jnp.stack([jnp.roll(base, i) for i in range(4)])
  routing = _route(logits, None, SOFTMAX)
  np.testing.assert_allclose(_switch(logits, routing, SOFTMAX), 1.0, rtol=1e-6)


def test_global_batch_uses_the_load_it_is_given():
  logits = _logits(8)
  halves = [_route(h, None, SOFTMAX) for h in (logits[:4], logits[4:])]
  total = halves[0].load + halves[1].load
  whole = _switch(logits, _route(logits, None, SOFTMAX), SOFTMAX)
  parts = [_global_batch(h, total, SOFTMAX) for h in (logits[:4], logits[4:])]
  np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)
  local = [
    _switch(h, r, SOFTMAX)
    for h, r in zip((logits[:4], logits[4:]), halves, strict=True)
  ]
  assert abs(np.mean(local) - whole) > 1e-3


def test_sequence_wise_is_the_mean_over_sequences_of_unbiased_top_k():
  logits, mask = _logits(12), np.ones(12, bool)
  mask[5] = mask[8:] = False  # the last of three sequences is all padding
  expected = np.mean(
    [_expected(logits[i : i + 4], mask[i : i + 4], _sigmoid) for i in (0, 4)]
  )
  got = _sequence_wise(logits, SIGMOID, 3, jnp.asarray(mask))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sequence_wise_chooses_beyond_the_limits_of_groups():
  # Experts 0 and 2 are the best, and of different groups.
  grouped = dataclasses.replace(SIGMOID, num_groups=2, group_score="top1")
  logits = jnp.tile(jnp.array([[3.0, 0.0, 2.0, -1.0]]), (4, 1))
  limited = _route(logits, None, grouped).load
  np.testing.assert_array_equal(limited, [4, 4, 0, 0])
  np.testing.assert_allclose(
    _sequence_wise(logits, grouped, 1),
    _expected(logits, np.ones(4, bool), _sigmoid),
    rtol=1e-5,
  )


def test_z_loss_against_the_formula():
  logits, mask = _logits(5), np.array([1, 1, 0, 1, 0], bool)
  z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2
  np.testing.assert_allclose(
    _z_loss(logits, jnp.asarray(mask)), z[mask].mean(), rtol=1e-5
  )


def test_padding_is_invisible_to_values_and_gradients():
  logits = _logits(6)
  padded = jnp.concatenate([logits, jnp.full((3, 4), jnp.nan)])
  mask = jnp.arange(9) < 6

  def total(logits, mask):
    routing = _route(logits, None, SIGMOID, mask)
    return (
      _switch(logits, routing, SIGMOID)
      + _z_loss(logits, mask)
      + _sequence_wise(logits, SIGMOID, 1, mask)
    )

  value_and_grad = jax.jit(jax.value_and_grad(total))
  value, grad = value_and_grad(logits, jnp.ones(6, bool))
  padded_value, padded_grad = value_and_grad(padded, mask)
  np.testing.assert_allclose(padded_value, value, rtol=1e-6)
  np.testing.assert_allclose(padded_grad[:6], grad, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(padded_grad[6:], 0)


def test_no_tokens_cost_nothing():
  logits, mask = _logits(4), jnp.zeros(4, bool)
  routing = _route(logits, None, SOFTMAX, mask)
  assert _switch(logits, routing, SOFTMAX) == 0
  assert _z_loss(logits, mask) == 0
  assert _sequence_wise(logits, SOFTMAX, 2, mask) == 0


def test_gradient_pushes_tokens_off_the_busy_expert():
  logits = jnp.zeros((8, 4)).at[:, 0].set(2.0).at[:, 1].set(1.0)
  routing = _route(logits, None, SOFTMAX)
  grad = jax.grad(lambda x: _switch(x, routing, SOFTMAX))(logits)
  assert (grad[:, 0] > 0).all() and (grad[:, 2:] < 0).all()


@pytest.mark.parametrize("num_sequences", [0, 5])
def test_sequences_must_divide_the_tokens(num_sequences):
  with pytest.raises(ValueError, match="`num_sequences` must divide T=8"):
    _sequence_wise(_logits(8), SIGMOID, num_sequences)


@pytest.mark.parametrize("score_fn", ("softmax", "sigmoid", "sqrtsoftplus"))
@pytest.mark.parametrize("norm_eps", (0.0, 1e-20))
def test_logits_of_every_size(score_fn, norm_eps):
  config = jaxroute.RouterConfig(
    num_experts=4, top_k=2, score_fn=score_fn, norm_eps=norm_eps
  )
  logits = cases.extreme_logits(4)
  logits = jnp.asarray(logits[np.abs(logits).max(1) < 1e19])

  @jax.jit
  def all_losses(logits):
    routing = jaxroute.route(logits, None, config)
    sequences = losses.sequence_wise(logits, config, 1)
    return jnp.stack([losses.switch(logits, routing, config), sequences])

  found, pull = jax.vjp(all_losses, logits)
  (gradient,) = pull(jnp.ones(2))
  assert np.isfinite(gradient).all()
  ids = np.asarray(jaxroute.route(logits, None, config).expert_idx)
  share = np.bincount(ids.reshape(-1), minlength=4) / ids.size
  everyone = dataclasses.replace(config, top_k=4)
  mean = np.mean(
    [
      oracle.chosen_weights(x, np.arange(4), everyone)
      for x in np.asarray(logits)
    ],
    axis=0,
  )
  np.testing.assert_allclose(found, 4 * share @ mean, rtol=1e-5)


def test_z_loss_of_many_huge_logits():
  logits = jnp.full((1000, 4), 1e18)
  value, gradient = jax.value_and_grad(losses.z_loss)(logits)
  np.testing.assert_allclose(value, 1e36, rtol=1e-5)
  np.testing.assert_allclose(gradient, 2e18 / 4000, rtol=1e-5)


@pytest.mark.devices(8)
def test_sequences_on_explicit_axes():
  logits = cases.logits("random", 32, 8)
  config = jaxroute.RouterConfig(num_experts=8, top_k=2)

  @jax.jit
  def all_losses(logits):
    # Whole ones on every device, and of several devices.
    return [losses.sequence_wise(logits, config, n) for n in (16, 4)]

  expected = all_losses(logits)
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    actual = all_losses(jax.device_put(logits, jax.P("data")))
  np.testing.assert_allclose(actual, expected, 1e-6)
