# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The layers under Flax's own transformations, against the plain layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx

CONFIG = jaxroute.RouterConfig(num_experts=4, top_k=2)
LAYERS, T, D, F = 2, 6, 4, 3
COLLECTIONS = {"params": 0, "expert_bias": 0, "load": 0}
X = jax.random.normal(jax.random.key(1), (LAYERS, T, D))


class Block(nn.Module):
  """A layer as a step of a scan."""

  @nn.compact
  def __call__(self, x, _):
    out, _ = jaxroute.linen.MoE(CONFIG, hidden_size=F, name="moe")(x)
    return x + out, None


def _apply(module, variables, *args):
  """A jitted forward pass that counts."""
  return jax.jit(
    lambda v, *a: module.apply(v, *a, mutable=jaxroute.linen.COUNTED)
  )(variables, *args)


def _close(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    actual,
    expected,
  )


@pytest.mark.parametrize("block", [Block, nn.remat(Block)])
def test_linen_scan(block):
  scanned = nn.scan(
    block,
    variable_axes=COLLECTIONS,
    split_rngs={"params": True},
    length=LAYERS,
  )()
  variables = scanned.init(jax.random.key(0), X[0], None)
  (out, _), counted = _apply(scanned, variables, X[0], None)
  x, loads = X[0], []
  for i in range(LAYERS):
    of_layer = jax.tree.map(lambda v, i=i: v[i], variables)
    (x, _), one = _apply(Block(), of_layer, x, None)
    loads.append(one["load"]["moe"]["router"]["load"])
  _close(out, x)
  _close(counted["load"]["moe"]["router"]["load"], jnp.stack(loads))


@pytest.mark.parametrize("axis", [0, None])
def test_linen_vmap(axis):
  """With parameters of their own, or with the same for all."""
  axes = COLLECTIONS | {"params": axis, "expert_bias": axis}
  module = nn.vmap(
    jaxroute.linen.MoE,
    variable_axes=axes,
    split_rngs={"params": axis is not None},
  )(CONFIG, hidden_size=F)
  variables = module.init(jax.random.key(0), X)
  (out, _), counted = _apply(module, variables, X)
  plain = jaxroute.linen.MoE(CONFIG, hidden_size=F)
  for i in range(LAYERS):
    one = {
      name: value
      if axes[name] is None
      else jax.tree.map(lambda v, i=i: v[i], value)
      for name, value in variables.items()
    }
    (expected, _), load = _apply(plain, one, X[i])
    _close(out[i], expected)
    _close(jax.tree.map(lambda v, i=i: v[i], counted), load)


def _model(rngs):
  return jaxroute.nnx.MoE(CONFIG, in_features=D, hidden_size=F, rngs=rngs)


@nnx.split_rngs(splits=LAYERS)
@nnx.vmap(in_axes=0, out_axes=0)
def _models(rngs):
  return _model(rngs)


def _one(models, i):
  graph, state = nnx.split(models)
  return nnx.merge(graph, jax.tree.map(lambda v: v[i], state))


def test_nnx_scan_and_remat():
  models = _models(nnx.Rngs(0))
  singles = [_one(models, i) for i in range(LAYERS)]

  @nnx.jit
  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  def scan(model, x):
    return x + nnx.remat(lambda model, x: model(x)[0])(model, x)

  out, expected = scan(models, X[0]), X[0]
  for model in singles:
    expected = expected + nnx.jit(lambda m, x: m(x)[0])(model, expected)
  _close(out, expected)
  loads = jnp.stack([model.router.load[...] for model in singles])
  np.testing.assert_array_equal(models.router.load[...], loads)


def test_nnx_vmap():
  models = _models(nnx.Rngs(0))
  singles = [_one(models, i) for i in range(LAYERS)]
  call = nnx.jit(nnx.vmap(lambda model, x: model(x)[0], in_axes=(0, 0)))
  out = call(models, X)
  for i, model in enumerate(singles):
    _close(out[i], nnx.jit(lambda m, x: m(x)[0])(model, X[i]))
    np.testing.assert_array_equal(
      models.router.load[...][i], model.router.load[...]
    )


def test_nnx_view_that_is_deterministic_counts_nothing():
  model = _model(nnx.Rngs(0))
  view = nnx.view(model, deterministic=True)
  view(X[0])
  np.testing.assert_array_equal(model.router.load[...], 0)
  assert not model.router.deterministic
  again = nnx.view(view, deterministic=False)
  again(X[0])
  assert jnp.sum(model.router.load[...]) == T * CONFIG.top_k
  model.router.set_view()
  assert not model.router.deterministic
