# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Values on a TPU: what its kernels return against XLA on the same device.

JAX_PLATFORMS=tpu python -m pytest -m tpu tests/system/tpu_test.py
"""

import dataclasses
import functools

import device_cases
import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute import dispatch, experts, layer, routing, scores

pytestmark = pytest.mark.tpu

INPUTS = 12

kernel, xla = (
  functools.partial(jaxroute.route, implementation=name)
  for name in ("pallas_tpu", "xla")
)
V3 = device_cases.CASES["V3, T=15"]
# The kernel writes its own sigmoid, of which the last bits may be others than of
# the compiler's.
assert_routed_alike = functools.partial(
  device_cases.assert_routed_alike, exact=False
)


@pytest.mark.parametrize("name", device_cases.CASES)
def test_the_kernel_routes_as_xla_does(name):
  case = device_cases.CASES[name]
  config = case.config

  def by_kernel(*args):
    logits, bias, mask = args
    return kernel(logits, bias, config, mask)

  def by_xla(*args):
    logits, bias, mask = args
    selection = scores.selection_scores(logits, bias, config)
    return xla(logits, bias, config, mask), selection

  args = jax.device_put(case.inputs(0))
  by_kernel, by_xla = (
    device_cases.compiled(f, *args) for f in (by_kernel, by_xla)
  )
  for seed in range(INPUTS):
    args = jax.device_put(case.inputs(seed))
    ours = by_kernel(*args)
    assert_routed_alike(ours, *by_xla(*args), config)
    jax.tree.map(np.testing.assert_array_equal, ours, by_kernel(*args))


def test_a_histogram_counts_every_choice_that_could_flip():
  case = device_cases.CASES["sigmoid + bias in logits"]
  config = dataclasses.replace(case.config, histogram=True)
  args = case.finite()

  def counts(route, logits, bias, mask):
    return route(logits, bias, config, mask).counts

  ours, theirs = (
    device_cases.compiled(functools.partial(counts, route), *args)(*args)
    for route in (kernel, xla)
  )
  # It compares logits, which are the same bits in both.
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert jnp.any(ours.histogram != 0)


@pytest.mark.parametrize(
  "name",
  (
    "V3, bfloat16",
    "softmax, 10 of 512",
    "softmax after, 8 of 128",
    "sqrtsoftplus, 8 of 256",
  ),
)
def test_the_gradient_is_that_of_xla(name):
  case = device_cases.CASES[name]
  device_cases.check_gradient(kernel, xla, case, tolerance=2e-4)


def test_projection_and_routing_in_one_kernel():
  t, d, config = 520, 256, jaxroute.RouterConfig(num_experts=128, top_k=8)
  # Sums of products of such numbers are exact, in whatever order.
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(-2, 3, (t, d)), jnp.bfloat16)
  router_weight = rng.integers(-(2**14), 2**14 + 1, (d, 128)) / 2**16
  args = tokens, jnp.asarray(router_weight, jnp.float32)
  project_and_route = functools.partial(
    routing.project_and_route, expert_bias=None, config=config
  )

  def apart(tokens, router_weight):
    logits = routing.project(tokens, router_weight)
    selection = scores.selection_scores(logits, None, config)
    return xla(logits, None, config), selection

  one = functools.partial(project_and_route, implementation="pallas_tpu")
  ours = device_cases.compiled(one, *args)(*args)
  theirs, selection = device_cases.compiled(apart, *args)(*args)
  assert_routed_alike(ours, theirs, selection, config)


@pytest.mark.parametrize("capacity", (None, 20))
@pytest.mark.parametrize("name", ("V3, T=15", "sigmoid, 10 of 512"))
def test_the_order_of_the_kernel_is_that_of_a_sort(name, capacity):
  case = device_cases.CASES[name]
  e = case.config.num_experts

  def orders(logits, bias, mask):
    r = xla(logits, bias, case.config, mask)
    return [
      dispatch.sort_by_expert(
        r.expert_idx, e, r.token_mask, capacity, implementation=implementation
      )
      for implementation in ("pallas_tpu", "xla")
    ]

  args = jax.device_put(case.inputs(0))
  orders = device_cases.compiled(orders, *args)
  for seed in range(6):
    ours, theirs = orders(*jax.device_put(case.inputs(seed)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_layer_and_its_gradients_are_those_of_float32_products():
  t, d, f, e = 256, 256, 128, 16
  config = jaxroute.RouterConfig(num_experts=e, top_k=4)
  x = experts_cases.normal(0, t, d).astype(jnp.bfloat16)
  router_weight = experts_cases.normal(1, d, e)
  params = experts_cases.params(2, e, d, f)
  # Routes are given: a rounding may not choose another expert.
  logits = routing.project(x, router_weight)
  r = xla(logits, None, config)

  def ours(x, params, r):
    return layer.moe(x, r, params, config=config)[0].astype(jnp.float32)

  def exact(x, params, r):
    x, params = jax.tree.map(lambda v: v.astype(jnp.float32), (x, params))
    weights = jnp.zeros((t, e)).at[jnp.arange(t)[:, None], r.expert_idx]
    weights = weights.add(r.weights)
    with jax.default_matmul_precision("highest"):
      outs = jax.vmap(experts.dense_swiglu, (None, 0))(x, params)
      return jnp.einsum("te,etd->td", weights, outs)

  args = x, params, r

  def gradients(function):
    def loss(x, params):
      out = function(x, params, r)
      return jnp.sum(out * jnp.cos(jnp.arange(d, dtype=jnp.float32))[None])

    return device_cases.compiled(jax.grad(loss, (0, 1)), x, params)(x, params)

  actual, expected = (
    device_cases.compiled(function, *args)(*args) for function in (ours, exact)
  )
  experts_cases.assert_close(actual, expected, 2e-2)
  experts_cases.assert_close(gradients(ours), gradients(exact), 3e-2)
