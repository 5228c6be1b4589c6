# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""SwiGLU experts under JAX's transformations."""

import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_cases import IMPLEMENTATIONS, D

from jaxroute import experts

pytestmark = pytest.mark.optimized


@pytest.mark.devices(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map_with_replicated_parameters(implementation):
  mesh = jax.make_mesh((4,), ("data",))
  x, params = experts_cases.normal(0, 4, 60, D), experts_cases.params()
  sizes = experts_cases.sizes(
    (1, 2, 3, 4), (60, 0, 0, 0), (0, 0, 0, 0), (0, 20, 20, 20)
  )

  def grads(x, params, sizes):
    def loss(x, params):
      out = experts.swiglu(
        x[0], params, sizes[0], implementation=implementation
      )
      return jnp.sum(jnp.sin(out))

    return jax.grad(loss, argnums=(0, 1))(x, params)

  specs = jax.P("data"), jax.P()
  with jax.set_mesh(mesh):
    args = [
      jax.device_put(v, spec)
      for v, spec in zip((x, params, sizes), (*specs, specs[0]), strict=True)
    ]
    d_x, d_params = jax.jit(
      jax.shard_map(
        grads, in_specs=(*specs, specs[0]), out_specs=specs, check_vma=True
      )
    )(*args)
  local = jax.jit(grads)
  parts = [local(x[i : i + 1], params, sizes[i : i + 1]) for i in range(4)]
  experts_cases.assert_close(
    jax.device_get(d_x), np.concatenate([np.asarray(p[0]) for p in parts])
  )
  total = jax.tree.map(
    lambda *w: np.sum(np.stack(w), 0), *[p[1] for p in parts]
  )
  experts_cases.assert_close(jax.device_get(d_params), total)


def test_scan_over_layers_and_remat_change_nothing():
  x, layers, sizes = (
    experts_cases.normal(0, 90, D),
    3,
    experts_cases.sizes(30, 40, 0, 15),
  )
  params = jax.tree.map(
    lambda *w: jnp.stack(w), *[experts_cases.params(i) for i in range(layers)]
  )

  def layer(x, params):
    return x + experts.swiglu(x, params, sizes)

  def loop(x, params):
    for i in range(layers):
      x = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return x

  def scan(fn):
    return lambda x, params: jax.lax.scan(
      lambda x, p: (fn(x, p), None), x, params
    )[0]

  def grads(fn):
    def loss(x, params):
      return jnp.sum(jnp.sin(fn(x, params)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params)

  expected = grads(loop)
  experts_cases.assert_close(grads(scan(layer)), expected)
  experts_cases.assert_close(grads(scan(jax.checkpoint(layer))), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_layers(implementation):
  x, sizes = (
    experts_cases.normal(0, 2, 90, D),
    experts_cases.sizes((30, 40, 0, 15), (0, 0, 90, 0)),
  )
  params = jax.tree.map(
    lambda *w: jnp.stack(w), experts_cases.params(0), experts_cases.params(1)
  )

  def swiglu(x, params, sizes):
    return experts.swiglu(x, params, sizes, implementation=implementation)

  parts = [
    swiglu(x[i], jax.tree.map(lambda w, i=i: w[i], params), sizes[i])
    for i in range(2)
  ]
  experts_cases.assert_close(
    jax.vmap(swiglu)(x, params, sizes), jnp.stack(parts)
  )


def test_new_group_sizes_do_not_retrace():
  traces = []

  @jax.jit
  def step(x, params, sizes):
    traces.append(1)
    return experts.swiglu(x, params, sizes)

  for sizes in ((10, 0, 0, 0), (0, 3, 3, 3)):
    step(
      experts_cases.normal(0, 10, D),
      experts_cases.params(),
      experts_cases.sizes(*sizes),
    )
  assert len(traces) == 1
