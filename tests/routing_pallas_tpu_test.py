# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Projection and routing in one TPU kernel, interpreted: as one after the other."""

import dataclasses
import functools

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as nnx_lib
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jaxroute
from jaxroute import layer, linen, nnx, routing

D = 128

_one_kernel = functools.partial(
  routing.project_and_route, implementation="pallas_tpu", interpret=True
)
_fused = conformance.jit_interpreted(_one_kernel, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _apart(x, router_weight, bias, config, mask=None):
  logits = routing.project(x, router_weight, mask)
  return jaxroute.route(logits, bias, config, mask, implementation="xla")


def _numbers(t, e):
  """Tokens and a router weight of 17 bits: sums of products are exact."""
  rng = np.random.default_rng(0)
  x = rng.integers(-2, 3, (t, D)).astype(np.float32)
  router_weight = rng.integers(-(2**16), 2**16 + 1, (D, e)) / 2**18
  return jnp.asarray(x, jnp.bfloat16), np.float32(router_weight)


def _config(num_experts=20, top_k=3, **kwargs):
  return jaxroute.RouterConfig(num_experts=num_experts, top_k=top_k, **kwargs)


def _assert_equal(actual, expected, mask=None):
  """But for what padding would choose: it is projected here, and zeroed there."""
  tokens = slice(None) if mask is None else np.asarray(mask)
  np.testing.assert_allclose(
    actual.weights, expected.weights, rtol=2e-5, atol=1e-6
  )
  for name in ("expert_idx", "cutoff"):
    a, b = (np.asarray(getattr(r, name))[tokens] for r in (actual, expected))
    np.testing.assert_array_equal(a, b)
  for name in ("counts", "token_mask"):
    a, b = (getattr(r, name) for r in (actual, expected))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("t", "config"),
  (
    (0, _config()),
    (1, _config()),
    # The third block is partly padding of the grid.
    (2100, _config(histogram=True)),
    pytest.param(
      40,
      dataclasses.replace(cases.family("deepseek_v3"), histogram=True),
      marks=pytest.mark.any_jax,
    ),
    pytest.param(40, cases.family("mixtral"), marks=pytest.mark.any_jax),
  ),
  ids=("none", "one", "blocks", "groups", "softmax_of_the_chosen"),
)
def test_it_is_projection_and_then_routing(t, config):
  x, router_weight = _numbers(t, config.num_experts)
  bias = conformance.bias(config.num_experts)
  mask = np.random.default_rng(1).random(t) < 0.7
  _assert_equal(
    _fused(x, router_weight, bias, config, mask),
    _apart(x, router_weight, bias, config, mask),
    mask,
  )


@pytest.mark.any_jax
def test_a_nan_token_is_uncounted():
  x, router_weight = _numbers(30, 20)
  x = x.at[3].set(jnp.nan)
  actual = _fused(x, router_weight, None, _config())
  assert np.isnan(actual.weights[3]).all()
  assert actual.load.sum() == 29 * 3
  _assert_equal(actual, _apart(x, router_weight, None, _config()))


def test_gradients_are_those_of_projection_and_routing():
  config, mask = _config(), np.arange(40) < 33
  x, router_weight = _numbers(40, 20)
  x = x.at[33:].set(jnp.nan)
  out = cases.logits("random", 40, 3)

  def grad(route, jit):
    def loss(x, router_weight, bias):
      return jnp.sum(out * route(x, router_weight, bias, config, mask).weights)

    return jit(jax.grad(loss, argnums=(0, 1, 2)))(
      x, router_weight, conformance.bias(20)
    )

  ours = grad(_one_kernel, conformance.jit_interpreted)
  expected = grad(_apart, jax.jit)
  # That of the tokens is bfloat16 like them.
  for a, b, rtol in zip(ours, expected, (2**-7, 1e-4, 0), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol, atol=1e-5)
  np.testing.assert_array_equal(np.float32(ours[0][33:]), 0)


def test_explicit_sharding_changes_nothing():
  config = _config(histogram=True)
  x, router_weight = _numbers(64, 20)
  mask = np.arange(64) % 5 > 0
  expected = _apart(x, router_weight, None, config, mask)
  mesh = jax.make_mesh((8,), ("data",))
  tokens = jax.NamedSharding(mesh, jax.P("data"))
  with jax.set_mesh(mesh):
    actual = _fused(
      *(jax.device_put(x, tokens), router_weight, None, config),
      jax.device_put(mask, tokens),
    )
    # Every shard has a part of the gradient to the router weight.
    d_router_weight = conformance.jit_interpreted(_d_router_weight)(
      jax.device_put(x, tokens), router_weight
    )
  _assert_equal(actual, expected, mask)
  assert actual.load.is_fully_replicated
  np.testing.assert_allclose(
    d_router_weight,
    conformance.jit_interpreted(_d_router_weight)(x, router_weight),
    rtol=1e-4,
    atol=1e-5,
  )


def _d_router_weight(x, router_weight):
  def loss(router_weight):
    routing = _one_kernel(x, router_weight, None, _config())
    return jnp.sum(routing.weights**2)

  return jax.grad(loss)(router_weight)


def test_the_simulator_finds_no_race_and_no_uninitialised_read():
  config = _config(8, 2, histogram=True)
  x, router_weight = _numbers(1500, 8)
  simulator = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan"
  )
  actual = routing.project_and_route(
    x,
    router_weight,
    None,
    config,
    implementation="pallas_tpu",
    interpret=simulator,
  )
  assert not interpret_pallas_call.races.races_found
  expected = _apart(x, router_weight, None, config)
  np.testing.assert_array_equal(actual.expert_idx, expected.expert_idx)
  jax.tree.map(np.testing.assert_array_equal, actual.counts, expected.counts)


@pytest.mark.any_jax
def test_a_layer_without_logits_routes_alike():
  x, router_weight = _numbers(30, 20)
  x, mask = x.reshape(2, 15, D), np.arange(30).reshape(2, 15) < 25
  with_logits, logits = layer.router(x, router_weight, None, _config(), mask)
  without, none = layer.router(
    x, router_weight, None, _config(), mask, fuse_projection=True
  )
  assert logits.shape == (30, 20) and none is None
  jax.tree.map(np.testing.assert_array_equal, with_logits, without)


def test_flax_layers_without_logits_are_the_same():
  x = jax.random.normal(jax.random.key(0), (3, 5, 16))

  def run(**kwargs):
    moe = linen.MoE(_config(4, 2), hidden_size=8, **kwargs)
    same = nnx.MoE(
      _config(4, 2),
      in_features=16,
      hidden_size=8,
      rngs=nnx_lib.Rngs(0),
      **kwargs,
    )
    y, out = moe.apply(moe.init(jax.random.key(1), x), x)
    z, also = same(x)
    return (y, z, out.routing, also.routing), (out.logits, also.logits)

  apart, logits = run()
  fused, none = run(fuse_projection=True)
  assert none == (None, None) and logits[0].shape == logits[1].shape == (15, 4)
  jax.tree.map(np.testing.assert_array_equal, apart, fused)


@pytest.mark.parametrize(
  ("kind", "dtype", "kernels"),
  (
    ("TPU v6 lite", jnp.bfloat16, "one"),
    # Without the kernel for both there is still the one for routing.
    ("TPU v6 lite", jnp.float32, "of routing"),
    ("TPU v5 lite", jnp.bfloat16, "of routing"),
    ("TPU v4", jnp.bfloat16, "none"),
  ),
)
def test_none_takes_one_kernel_for_both_where_it_can(kind, dtype, kernels):
  tpu = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  mesh = AbstractMesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=tpu
  )

  def call(x, router_weight):
    return routing.project_and_route(x, router_weight, None, _config())

  shapes = (16, D), (D, 20)
  operands = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in zip(shapes, (dtype, jnp.float32), strict=True)
  ]
  with jax.sharding.use_abstract_mesh(mesh):
    text = str(jax.make_jaxpr(call)(*operands))
  assert ("jaxroute_route" in text) == (kernels != "none")
  assert ("name=project_and_route" in text) == (kernels == "one")


@pytest.mark.parametrize(
  ("x", "e", "kwargs", "words"),
  (
    (jnp.zeros((4, D)), 20, {}, "bfloat16, got float32"),
    (jnp.zeros((4, 100), jnp.bfloat16), 20, {}, "multiple of 128, got 100"),
    (jnp.zeros((4, D), jnp.bfloat16), 20, {"score_fn": "softmax"}, "softmax"),
    (jnp.zeros((4, 2**14), jnp.bfloat16), 256, {}, "88 MiB of VMEM.* 20"),
    (jnp.zeros((4, D), jnp.bfloat16), 2000, {}, "at most 1024"),
  ),
)
def test_what_the_kernel_cannot_do_is_said(x, e, kwargs, words):
  with pytest.raises(NotImplementedError, match=words):
    routing.project_and_route(
      x,
      jnp.zeros((x.shape[1], e)),
      None,
      _config(e, **kwargs),
      implementation="pallas_tpu",
    )


def test_bad_input_is_named():
  x, router_weight = _numbers(4, 20)
  with pytest.raises(ValueError, match=r"`expert_bias` must be \[E=20\]"):
    routing.project_and_route(x, router_weight, jnp.zeros(3), _config())
  with pytest.raises(
    ValueError, match=r"`router_weight` must be \[D=128, E=20\]"
  ):
    routing.project_and_route(x, router_weight.T, None, _config())
