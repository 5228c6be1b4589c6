# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Weights and their gradients from logits of every size, against float64."""

import functools
import itertools

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute import types
from jaxroute.routing import weights

pytestmark = pytest.mark.optimized

SCORES = {
  "sigmoid": dict(score_fn="sigmoid"),
  "softmax": dict(score_fn="softmax"),
  "softmax of the chosen": dict(score_fn="softmax", score_after_top_k=True),
  "sqrtsoftplus": dict(score_fn="sqrtsoftplus"),
}


@functools.partial(jax.jit, static_argnames="config")
def _weigh(logits, config):
  """Weighs the K best experts of half of the tokens, and the K worst of the rest."""
  t = logits.shape[0] // 2
  order = jnp.argsort(logits, axis=1)
  expert_idx = jnp.concatenate([order[:t], order[t:, ::-1]])[:, : config.top_k]
  found, _ = weights.weigh(logits, expert_idx, config, None)
  return found, expert_idx


@pytest.mark.parametrize("norm_eps", (None, 0.0, 1e-20, 1e-6, 1.0))
@pytest.mark.parametrize("name", SCORES)
def test_any_finite_logits(name, norm_eps):
  x = np.repeat(cases.extreme_logits(8), 2, axis=0)
  x = np.concatenate([x[::2], x[1::2]])
  config = types.RouterConfig(
    num_experts=8,
    top_k=3,
    normalize_weights=norm_eps is not None,
    norm_eps=norm_eps or 0.0,
    scaling_factor=2.5,
    **SCORES[name],
  )
  weigh = functools.partial(_weigh, config=config)
  conformance.assert_weights_are_exact(weigh, x, config)


@pytest.mark.parametrize("name", SCORES)
def test_a_cap_and_a_multiplier(name):
  x = cases.extreme_logits(8)
  config = types.RouterConfig(
    num_experts=8,
    top_k=3,
    logit_soft_cap=200.0,
    logit_multiplier=8.0,
    **SCORES[name],
  )
  found, pull, _ = jax.vjp(
    functools.partial(_weigh, config=config), jnp.asarray(x), has_aux=True
  )
  (gradient,) = pull(found)
  assert np.isfinite(found).all() and np.isfinite(gradient).all()


def test_without_jit():
  x = cases.extreme_logits(4)[::7]
  for fields in SCORES.values():
    config = types.RouterConfig(num_experts=4, top_k=2, norm_eps=0.0, **fields)
    with jax.disable_jit(), jax.debug_nans(True):
      weigh = functools.partial(_weigh, config=config)
      conformance.assert_weights_are_exact(weigh, x, config)


@pytest.mark.parametrize("is_optimized", (False, True))
def test_scores_that_underflow_are_counted(is_optimized):
  # XLA divides on a GPU by approximations, each right to two last bits.
  tolerance = 3e-6 if jax.default_backend() == "gpu" else 1e-6
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, not is_optimized)
  try:
    for fields, x in itertools.product(SCORES.values(), (-75.0, -88.0, -1e18)):
      config = types.RouterConfig(
        num_experts=2, top_k=2, norm_eps=0.0, **fields
      )
      logits = jnp.array([[x, x - 1]], jnp.float32)

      def first(logits, config=config):
        routing = jaxroute.route(logits, None, config)
        return routing.weights[0, 0], routing.load

      (weight, load), gradient = jax.jit(
        jax.value_and_grad(first, has_aux=True)
      )(logits)
      # Logits of 1e18 are equal: 1 is less than they are rounded by.
      gap = 1.0 if x > -1e18 else 0.0
      gap = gap / 2 if config.score_fn == "sqrtsoftplus" else gap
      share = 1 / (1 + np.exp(-gap))
      slope = share * (1 - share)
      slope = slope / 2 if config.score_fn == "sqrtsoftplus" else slope
      np.testing.assert_allclose(weight, share, rtol=tolerance)
      np.testing.assert_allclose(gradient, [[slope, -slope]], rtol=tolerance)
      np.testing.assert_array_equal(load, [1, 1])
  finally:
    jax.config.update(name, before)


@pytest.mark.any_jax
@pytest.mark.parametrize("norm_eps", (0.0, 1e-20))
@pytest.mark.parametrize("name", SCORES)
def test_masked_experts_have_weights_of_0(name, norm_eps):
  config = types.RouterConfig(
    num_experts=4, top_k=2, norm_eps=norm_eps, **SCORES[name]
  )
  x = jnp.array([[-jnp.inf] * 4, [-jnp.inf, -jnp.inf, -jnp.inf, -90.0]])
  idx = jnp.array([[0, 1], [3, 0]])
  with jax.debug_nans(True):
    found, pull, counted = jax.vjp(
      lambda x: weights.weigh(x, idx, config, None), x, has_aux=True
    )
    (gradient,) = pull(jnp.ones_like(found))
  np.testing.assert_array_equal(found[0], 0)
  assert found[1, 1] == 0 and np.isfinite(gradient).all()
  if not norm_eps or config.score_fn == "softmax":
    assert found[1, 0] == 1
  assert counted.all()


@pytest.mark.parametrize("score_fn", ("sigmoid", "sqrtsoftplus", "softmax"))
def test_second_derivatives_at_zero(score_fn):
  # Where a router starts; the parts that scores are taken of meet near there.
  config = types.RouterConfig(num_experts=3, top_k=2, score_fn=score_fn)
  idx = jnp.array([[0, 1]])

  def first(x, weigh):
    return weigh(x[None])[0, 0]

  def plain(x):
    s = {
      "sigmoid": jax.nn.sigmoid,
      "softmax": jax.nn.softmax,
      "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    }[score_fn](x)[:, :2]
    return s / s.sum(1, keepdims=True)

  x = jnp.array([0.0, 1.0, 0.0])
  hessian = jax.jit(jax.hessian(first), static_argnums=1)
  ours = hessian(x, lambda x: weights.weigh(x, idx, config, None)[0])
  np.testing.assert_allclose(ours, hessian(x, plain), atol=1e-6)
