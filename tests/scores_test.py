# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Score functions against NumPy, and their gradients where they are steep."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxroute import scores

_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


@pytest.mark.parametrize("score_fn", _FUNCTIONS)
def test_score_is_the_oracle(score_fn):
  score = jax.jit(lambda x: scores.apply_score_fn(x, score_fn))
  for kind in cases.KINDS:
    x = cases.logits(kind, 11, 8)
    expected = np.stack([oracle.score(row, score_fn) for row in x])
    np.testing.assert_allclose(
      score(x), expected, rtol=2e-5, atol=1e-30, err_msg=kind
    )


@pytest.mark.parametrize("score_fn", _FUNCTIONS)
def test_gradient_is_finite_everywhere(score_fn):
  grad = jax.jit(
    jax.grad(lambda x: jnp.sum(scores.apply_score_fn(x, score_fn)[:, 0]))
  )
  for kind in ("random", "constant", "masked", "saturated"):
    assert np.isfinite(grad(cases.logits(kind, 11, 8))).all(), kind


def test_the_far_tail_of_sqrtsoftplus():
  x = jnp.array([-14.9, -15.1, -40.0, -150.0, -jnp.inf])
  value = scores.apply_score_fn(x, "sqrtsoftplus")
  slope = jax.vmap(
    jax.grad(lambda x: scores.apply_score_fn(x, "sqrtsoftplus"))
  )(x)
  exact = np.exp(np.asarray(x, np.float64) / 2)
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  np.testing.assert_allclose(slope, exact / 2, rtol=1e-5)


def test_soft_cap_and_multiplier():
  config = cases.family("soft_cap")
  x = np.array([[0.0, 2.0, -1000.0, -np.inf] * 16], np.float32)
  capped = scores.prepare_logits(x.astype(jnp.bfloat16), config)
  assert capped.dtype == jnp.float32
  np.testing.assert_allclose(
    capped[:, :4], [[0.0, 3 * np.tanh(1 / 3), -3.0, -np.inf]], rtol=1e-6
  )


def test_selection_scores_have_neither_nan_nor_gradient():
  config, bias = cases.family("lfb"), jnp.zeros(64)
  x = jnp.asarray(cases.logits("nan", 5, 64))
  selection = scores.selection_scores(x, bias, config)
  np.testing.assert_array_equal(jnp.isnan(x), selection == -jnp.inf)
  grads = jax.grad(
    lambda x, b: scores.selection_scores(x, b, config).sum(), argnums=(0, 1)
  )(jnp.zeros((5, 64)), bias)
  assert not any(g.any() for g in grads)
