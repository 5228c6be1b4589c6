# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Multilinear forms against JAX's own derivatives of the same formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_functions import FUNCTIONS

import jaxroute
from jaxroute import dispatch, layer, multilinear
from jaxroute.parallel import mesh as mesh_lib

# sum_ij x_0[i] x_1[j] x_2[i, j] at the places that the indices name.
FORM = multilinear.Form(
  "form",
  (
    lambda y, z, order, *, dtype: (z[order] @ y).astype(dtype),
    lambda x, z, order, *, dtype: (x @ z[order]).astype(dtype),
    lambda x, y, order, *, dtype: jnp.outer(x, y)[jnp.argsort(order)].astype(
      dtype
    ),
  ),
)
ORDER = jnp.asarray([2, 0, 1], jnp.int32)


def _ours(x, y):
  dtypes = (x.dtype,) * 3
  return multilinear.derivative(FORM, 2, [x, y], [ORDER], dtypes)


def _plain(x, y):
  return jnp.outer(x, y)[jnp.argsort(ORDER)]


def _normal(*shape):
  return jax.random.normal(jax.random.key(sum(shape)), shape)


def _assert_same(of, *args):
  for ours, plain in zip(
    *(jax.tree.leaves(jax.jit(of(f))(*args)) for f in (_ours, _plain)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def _loss(f):
  return lambda x, y: jnp.sum(jnp.sin(f(x, y)))


@pytest.mark.parametrize(
  "of",
  [
    lambda f: f,
    lambda f: jax.grad(_loss(f), (0, 1)),
    lambda f: jax.hessian(_loss(f), (0, 1)),
    lambda f: jax.jacrev(jax.jacrev(_loss(f), (0, 1)), (0, 1)),
    lambda f: jax.jacfwd(jax.jacrev(jax.jacfwd(_loss(f)))),
    # The same for all of a batch, which has to add up the gradients.
    lambda f: jax.grad(
      lambda x, y: jnp.sum(
        jax.vmap(jax.vmap(_loss(f), (None, 0)), (0, None))(
          jnp.stack([x, 2 * x]), jnp.stack([y, y + 1, 3 * y])
        )
      ),
      (0, 1),
    ),
    lambda f: jax.grad(
      lambda x, y: jnp.sum(
        jax.vmap(_loss(f), (None, 0))(x, jnp.stack([y, 2 * y]))
      ),
      (0, 1),
    ),
  ],
)
def test_values_and_derivatives(of):
  _assert_same(of, _normal(3), _normal(4))


@pytest.mark.devices(4)
def test_an_axis_may_be_mapped_and_another_left_to_the_compiler():
  kinds = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ("data", "other"), axis_types=kinds)

  def of(f):
    def rows(x, y):
      x, y = mesh_lib.vary_alike((x, y))
      return jax.vmap(f, (0, None))(x, y)

    mapped = jax.shard_map(
      rows,
      mesh=mesh,
      in_specs=(jax.P("data"), jax.P()),
      out_specs=jax.P("data"),
      axis_names={"data"},
    )
    return jax.grad(_loss(mapped), (0, 1))

  _assert_same(of, _normal(4, 3), _normal(4))


def test_one_gradient_is_the_only_one_taken():
  text = str(jax.make_jaxpr(jax.grad(_loss(_ours)))(_normal(3), _normal(4)))
  # Forwards, and backwards for one argument.
  assert text.count("jaxroute_multilinear[") == 2


def test_indices_may_come_out_of_a_custom_derivative():
  config = jaxroute.RouterConfig(num_experts=4, top_k=2)
  x, logits = jnp.ones((3, 8)), jnp.arange(12.0).reshape(3, 4)
  weights = jnp.ones((3, 2))

  @jax.custom_vjp
  def order_of(logits):
    idx = jaxroute.route(logits, None, config).expert_idx
    return dispatch.sort_by_expert(idx, 4)

  order_of.defvjp(lambda z: (order_of(z), None), lambda _, d_order: (None,))

  def loss(logits):
    order = order_of(logits)
    rows = dispatch.dispatch(x, order)
    out = dispatch.combine(jnp.ones((6, 8)), weights, order)
    return (jnp.sum(rows) + jnp.sum(out)) * jnp.sum(logits)

  gradient = jax.grad(loss)(logits)
  np.testing.assert_array_equal(gradient, jnp.full((3, 4), 96.0))


@pytest.mark.parametrize(
  ("axis_type", "token_axes", "exchange"),
  [
    (jax.sharding.AxisType.Auto, ("data",), None),
    (jax.sharding.AxisType.Explicit, ("data", "expert"), "all_gather"),
  ],
)
def test_the_layer_on_a_mesh_has_forward_and_second_derivatives(
  axis_type, token_axes, exchange
):
  config = jaxroute.RouterConfig(num_experts=4, top_k=2)
  x, kernel, params = FUNCTIONS["layer.moe"].args
  args = jnp.concatenate([x, x[:2] + 1]), kernel, params

  def derivatives(partition, args):
    def loss(x, kernel, params):
      routing, _ = layer.router(x, kernel, None, config)
      out, _ = layer.moe(
        x,
        routing,
        params,
        config=config,
        partition=partition,
        experts_implementation="ragged_dot",
      )
      return jnp.sum(jnp.sin(out))

    direction = jax.tree.map(jnp.cos, args)
    tangent = jax.jvp(loss, args, direction)
    return tangent, jax.jvp(jax.grad(loss, (0, 1, 2)), args, direction)

  expected = jax.jit(lambda args: derivatives(None, args))(args)
  partition = jaxroute.Partition(
    token_axes=token_axes, expert_axis="expert", exchange=exchange
  )
  specs = jax.P(token_axes), jax.P(), jax.P("expert")
  mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(axis_type,) * 2)
  with jax.set_mesh(mesh):
    placed = tuple(map(jax.device_put, args, specs))
    actual = jax.jit(lambda args: derivatives(partition, args))(placed)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=2e-5 * max(1.0, np.max(np.abs(b)))
    ),
    jax.device_get(actual),
    jax.device_get(expected),
  )
