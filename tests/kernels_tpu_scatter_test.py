# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The kernels that scatter K numbers of a token into E, interpreted."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import jaxroute
from jaxroute import scores
from jaxroute.kernels.tpu import scatter


def _example(t, e, k):
  rng = np.random.default_rng(0)
  idx = np.argsort(rng.random((t, e)), axis=1)[:, :k].astype(np.int32)
  values = rng.normal(size=(t, k)).astype(np.float32)
  expected = np.zeros((t, e), np.float32)
  np.put_along_axis(expected, idx, values, axis=1)
  return idx, values, expected


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_every_shape(shape):
  idx, values, expected = _example(*shape)
  scattered = scatter.scatter(
    idx, values, num_experts=shape[1], dtype=jnp.float32, interpret=True
  )
  np.testing.assert_array_equal(scattered, expected)


@pytest.mark.parametrize("e", [64, 128])
def test_blocks_dtype_and_what_is_not_finite(e):
  idx, values, expected = _example(1100, e, 2)
  values[7], values[1099, 0] = np.nan, np.inf
  np.put_along_axis(expected, idx, values, axis=1)
  scattered = scatter.scatter(
    idx, values, num_experts=e, dtype=jnp.bfloat16, interpret=True
  )
  assert scattered.dtype == jnp.bfloat16
  expected = jnp.asarray(expected, jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(scattered.astype(jnp.float32), expected)


def test_the_simulator_finds_no_race():
  idx, values, expected = _example(300, 128, 3)
  simulated = functools.partial(
    scatter.scatter, num_experts=128, dtype=jnp.float32
  )
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  scattered = jax.jit(functools.partial(simulated, interpret=params))(
    idx, values
  )
  assert not interpret_pallas_call.races.races_found
  np.testing.assert_array_equal(scattered, expected)


@pytest.mark.parametrize("soft_cap", (None, 3.0))
@pytest.mark.parametrize("shape", ((4, 4, 4), (33, 65, 3), (1100, 128, 2)))
def test_the_gradient_of_a_softmax_is_that_of_xla(shape, soft_cap):
  t, e, k = shape
  idx, d_scores, _ = _example(t, e, k)
  x = cases.logits("random", t, e)
  # Masked experts, which none chose if there are others.
  x[:, idx[0, -1] if k == e else np.argmin(x.sum(0))] = -np.inf
  config = jaxroute.RouterConfig(
    num_experts=e,
    top_k=k,
    score_fn="softmax",
    logit_multiplier=0.7,
    logit_soft_cap=soft_cap,
  )

  def chosen(x):
    return jnp.take_along_axis(scores.scores(x, config), idx, axis=1)

  values, pull = jax.vjp(chosen, x)
  expected = pull(d_scores)[0]
  d_log_scores = values * d_scores
  actual = _softmax_gradient(x, idx, d_log_scores, 0.7, soft_cap)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_softmax_is_zero_at_what_is_not_a_number():
  idx, d_log_scores, _ = _example(9, 16, 2)
  d_log_scores[3] = 0.0  # a token that is padding
  x = cases.logits("random", 9, 16)
  x[3], x[4, (idx[4, 0] + 1) % 16] = np.nan, np.nan
  x[3, 0] = np.inf
  x = jnp.asarray(x, jnp.bfloat16)
  actual = _softmax_gradient(x, idx, d_log_scores, 1.0, None)
  assert actual.dtype == jnp.bfloat16
  assert np.all(np.isfinite(actual.astype(jnp.float32)))
  np.testing.assert_array_equal(actual[3].astype(jnp.float32), 0)


def _softmax_gradient(x, idx, d_log_scores, multiplier, soft_cap):
  return scatter.softmax_gradient(
    x,
    idx,
    d_log_scores,
    multiplier=multiplier,
    soft_cap=soft_cap,
    interpret=True,
  )
