# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The pure layer: padding, NaN and what the gradients may reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute import experts, layer

pytestmark = pytest.mark.optimized

T, D, F, E, K = 24, 16, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K)


def _inputs():
  keys = jax.random.split(jax.random.key(0), 5)
  params = experts.init_expert_params(keys[0], E, D, F)
  shared = experts.ExpertParams(
    w_gate=jax.random.normal(keys[1], (D, F)) / 4,
    w_up=jax.random.normal(keys[2], (D, F)) / 4,
    w_down=jax.random.normal(keys[3], (F, D)) / 3,
  )
  kernel = jax.random.normal(keys[4], (D, E)) / 4
  return jax.random.normal(jax.random.key(1), (T, D)), kernel, params, shared


def _loss(kernel, params, shared, x, mask=None, bias=None):
  bias = jnp.zeros(E) if bias is None else bias
  routing, _ = layer.router(x, kernel, bias, CONFIG, mask)
  y, _ = layer.moe(x, routing, params, shared, config=CONFIG)
  return jnp.sum(y**2), (y, routing)


_grad = jax.jit(jax.grad(_loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("filler", [0.0, 1e6, np.nan, np.inf])
def test_padding_reaches_neither_outputs_nor_gradients(filler):
  x, *weights = _inputs()
  padded = jnp.concatenate([x, jnp.full((8, D), filler)])
  mask = jnp.arange(T + 8) < T
  grads, (y, routing) = _grad(*weights, x)
  padded_grads, (padded_y, padded_routing) = _grad(*weights, padded, mask)
  np.testing.assert_array_equal(padded_y[T:], 0)
  np.testing.assert_allclose(padded_y[:T], y, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
    padded_routing.expert_idx[:T], routing.expert_idx
  )
  np.testing.assert_array_equal(padded_routing.load, routing.load)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    padded_grads,
    grads,
  )


def test_a_nan_token_is_nan_alone_and_uncounted():
  x, *weights = _inputs()
  _, (y, routing) = _grad(*weights, x.at[3].set(jnp.nan))
  assert np.isnan(y[3]).all()
  assert not np.isnan(np.delete(y, 3, axis=0)).any()
  assert int(routing.load.sum()) == K * (T - 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_tokens_are_projected_as_exactly_as_float32(dtype):
  x, kernel, *_ = _inputs()
  x = x.astype(dtype)

  def pull(x):
    def logits(x, kernel):
      return layer.router(x, kernel, None, CONFIG)[1]

    out, pull = jax.vjp(logits, x, kernel)
    return out, pull(jnp.cos(out))

  (out, (d_x, d_kernel)), expected = (
    jax.jit(pull)(v) for v in (x, x.astype(jnp.float32))
  )
  assert out.dtype == jnp.float32 and d_x.dtype == dtype
  # Two programs of an accelerator may sum in different orders.
  rtol = 0 if jax.default_backend() == "cpu" else 1e-5
  for actual, exact in (
    (out, expected[0]),
    (d_x, expected[1][0].astype(dtype)),
    (d_kernel, expected[1][1]),
  ):
    actual, exact = (np.asarray(v, np.float32) for v in (actual, exact))
    np.testing.assert_allclose(actual, exact, rtol=rtol, atol=rtol)
  # For a TPU the tokens reach the product as they are.
  traced = jax.jit(pull).trace(x)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert f"16>) -> tensor<{T}x{D}xf32>" not in text


def test_the_bias_gets_no_gradient():
  x, *weights = _inputs()
  grad = jax.grad(lambda b: _loss(*weights, x, None, b)[0])(jnp.zeros(E))
  np.testing.assert_array_equal(grad, 0)


def test_a_router_weight_of_another_shape_is_named():
  x, kernel, *_ = _inputs()
  with pytest.raises(
    ValueError, match=r"`router_weight` must be \[D=16, E=8\], got"
  ):
    layer.router(x, kernel[:, :4], None, CONFIG)


def test_numpy_s_float64_is_what_jax_takes_it_for():
  config = jaxroute.RouterConfig(num_experts=4, top_k=2)
  x = np.random.default_rng(0).normal(size=(6, 8))
  params = experts.init_expert_params(jax.random.key(0), 4, 8, 5)

  def run(x, params):
    routes, _ = layer.router(x, x[:4].T, None, config)
    return layer.moe(x, routes, params, config=config)

  expected = run(jnp.asarray(x), params)
  wide = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  for given in (params, wide):
    actual = run(x, given)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert actual[0].dtype == jnp.float32
