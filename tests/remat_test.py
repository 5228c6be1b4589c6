# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What `save_routing` keeps from the forward pass for the backward pass."""

import itertools
import re

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute import experts, layer

pytestmark = pytest.mark.optimized

CONFIG = cases.family("deepseek_v3")
T, D, F, E = 16, 8, 4, 64


def _params():
  keys = jax.random.split(jax.random.key(0), 3)
  return experts.ExpertParams(
    w_gate=jax.random.normal(keys[0], (E, D, F)),
    w_up=jax.random.normal(keys[1], (E, D, F)),
    w_down=jax.random.normal(keys[2], (E, F, D)),
  )


@pytest.mark.parametrize("policy", [None, jaxroute.save_routing])
@pytest.mark.parametrize(
  ("family", "implementation"),
  [
    pytest.param("deepseek_v3", "pallas_tpu", marks=pytest.mark.any_jax),
    ("deepseek_v3", "xla"),
    ("olmoe", "xla"),
  ],
)
def test_the_backward_pass_has_the_routes_of_the_forward_pass(
  family, policy, implementation
):
  config = cases.family(family)
  # A router that is computed with other logits when it is computed again.
  calls = itertools.count()

  def noise():
    return np.random.default_rng(next(calls)).normal(size=(T, E)).astype("f4")

  interpret = implementation == "pallas_tpu"

  def loss(params, x):
    logits = x @ jnp.eye(D, E)
    logits += jax.pure_callback(
      noise, jax.ShapeDtypeStruct((T, E), jnp.float32)
    )
    routes = jaxroute.route(
      logits,
      None,
      config,
      implementation=implementation,
      interpret=interpret,
    )
    y, _ = layer.local_moe(x, routes, params)
    return jnp.sum(jnp.sin(y)), routes

  x = jnp.asarray(cases.logits("random", T, D))
  saved = jax.checkpoint(loss, policy=policy)
  jit = conformance.jit_interpreted if interpret else jax.jit
  grad = jit(jax.grad(saved, argnums=(0, 1), has_aux=True))
  (grads, _), routes = grad(_params(), x)
  # Only an expert that saw a token has a gradient.
  trained = np.abs(np.asarray(grads.w_down)).sum((1, 2)) > 0
  same = np.array_equal(trained, np.asarray(routes.load) > 0)
  # A softmax over the row is computed again; elsewhere K logits suffice.
  again = policy is None or config.score_fn == "softmax"
  assert next(calls) == 1 + again
  assert same == (policy is not None)


@pytest.mark.parametrize("policy", [None, jaxroute.save_routing])
def test_the_policy_saves_the_selection_and_the_sorts(policy):
  def loss(x):
    routes = jaxroute.route(x, None, CONFIG, implementation="pallas_tpu")
    y, _ = layer.local_moe(x[:, :D], routes, _params())
    return jnp.sum(y**2)

  grad = jax.grad(jax.checkpoint(loss, policy=policy))
  text = str(jax.make_jaxpr(grad)(jnp.zeros((T, E))))
  passes = 2 if policy is None else 1
  assert len(re.findall(r"name=route\b", text)) == passes
  assert text.count("= sort") == 2 * passes


@pytest.mark.any_jax
def test_it_joins_with_another_policy():
  policies = jax.checkpoint_policies
  both = policies.save_from_both_policies(
    jaxroute.save_routing, policies.dots_saveable
  )

  def loss(x):
    routes = jaxroute.route(x @ jnp.eye(D, E), None, CONFIG)
    return jnp.sum(routes.weights**2)

  x = jnp.asarray(cases.logits("random", T, D))
  expected = jax.grad(loss)(x)
  grad = jax.jit(jax.grad(jax.checkpoint(loss, policy=both)))
  np.testing.assert_allclose(grad(x), expected, rtol=1e-4, atol=1e-7)
  assert str(jax.make_jaxpr(grad)(x)).count("dot_general") == 2
