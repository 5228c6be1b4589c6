# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The router weight as bfloat16 terms."""

import jax.numpy as jnp
import numpy as np

import jaxroute
from jaxroute.kernels.tpu.route import projection
from jaxroute.kernels.tpu.route.plan import Plan


def test_a_float32_weight_loses_no_bits():
  rng = np.random.default_rng(0)
  router_weight = rng.normal(size=(128, 16)).astype(np.float32)
  config = jaxroute.RouterConfig(num_experts=16, top_k=3)
  plan = Plan(config=config, tokens=64, width=128)
  terms = projection.split_bf16x3(plan, router_weight)
  assert [term.dtype for term in terms] == [jnp.bfloat16] * 3
  high, middle, low = (term.astype(jnp.float32).T for term in terms)
  np.testing.assert_array_equal(high + (middle + low), router_weight)


def test_a_weight_is_padded_to_whole_registers():
  config = jaxroute.RouterConfig(num_experts=20, top_k=3)
  plan = Plan(config=config, tokens=64, width=128)
  terms = projection.split_bf16x3(plan, jnp.ones((128, 20)))
  for term in terms:
    assert term.shape == (32, 128)
    np.testing.assert_array_equal(term[20:], 0)
