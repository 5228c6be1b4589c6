# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Programs with GPU kernels, lowered for CUDA: every shape, family and transformation.

The kernels are in them as Mosaic's code: what it cannot lower raises here.
"""

import functools

import cases
import flax.nnx
import gpu_mesh
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import dispatch

pytestmark = gpu_mesh.needs_kernels

_BY_KERNEL = dict(implementation="pallas_gpu")
_CONFIG = jaxroute.RouterConfig(num_experts=16, top_k=3)
_T = 64


def _step(x, bias, mask, config=_CONFIG):
  """Routes and orders by the kernels."""
  how = _BY_KERNEL | dict(with_rank=True)
  routing = jaxroute.route(x, bias, config, mask, **how)
  known = dict(rank=routing.rank, load=routing.load)
  order = dispatch.sort_by_expert(
    *(routing.expert_idx, config.num_experts, routing.token_mask),
    **_BY_KERNEL | known,
  )
  return routing, order


def _loss(x, bias, mask):
  """A loss that needs both kernels, and the order of the assignments."""
  routing, order = _step(x, bias, mask)
  rows = dispatch.dispatch(x, order)
  return jnp.sum(dispatch.combine(rows, routing.weights, order) ** 2)


def _arrays(t=_T, e=16, dtype=jnp.float32):
  x, bias = jnp.ones((t, e), dtype), jnp.zeros(e, jnp.float32)
  return x, bias, jnp.ones(t, bool)


def _assert_has_kernels(text, *names):
  for name in names or ("jaxroute_route", "jaxroute_order"):
    assert name in text


@pytest.mark.parametrize("last", (6, 12))
def test_every_shape(last):
  shapes = cases.SHAPES[last - 6 : last]

  def call(*operands):
    steps = zip(shapes, operands, strict=True)
    return [
      _step(*arrays, jaxroute.RouterConfig(num_experts=e, top_k=k))
      for (_, e, k), arrays in steps
    ]

  operands = [_arrays(t, e) for t, e, _ in shapes]
  _assert_has_kernels(gpu_mesh.export(call, *operands))


@pytest.mark.parametrize(
  ("names", "dtype"),
  (
    ([name for name in cases.FAMILIES if name != "soft_cap"], "float32"),
    (["deepseek_v3", "olmoe"], "bfloat16"),
    (["deepseek_v2", "mixtral"], "float16"),
  ),
)
def test_every_family(names, dtype):
  def call(*operands):
    route = functools.partial(jaxroute.route, *operands[:2], **_BY_KERNEL)
    return [
      route(config=cases.family(name), token_mask=operands[2]).weights
      for name in names
    ]

  text = gpu_mesh.export(call, *_arrays(70, 64, dtype))
  _assert_has_kernels(text, "jaxroute_route")


def _scan(x, bias, mask):
  def layer(x, _):
    routing, order = _step(x, bias, mask)
    rows = dispatch.dispatch(x, order)
    x = x + dispatch.combine(rows, routing.weights, order)
    return x, (routing.load, order.group_sizes)

  return jax.lax.scan(layer, x, None, length=3)


def _two_layers(x, bias, mask):
  first, _ = _step(x, bias, mask)
  return _step(x + jnp.sum(first.weights), bias, mask)


def _vmap(function):
  def call(x, bias, mask):
    batch = jnp.stack([x, x])
    return jax.vmap(function, in_axes=(0, None, None))(batch, bias, mask)

  return call


_TRANSFORMED = {
  "gradient": jax.value_and_grad(_loss),
  "rematerialised": jax.grad(jax.checkpoint(_loss)),
  "scan": _scan,
  "gradient of a scan": jax.grad(lambda *args: jnp.sum(_scan(*args)[0])),
  "two layers": _two_layers,
  "vmap": _vmap(_step),
  "vmap of a gradient": _vmap(jax.grad(_loss)),
}


@pytest.mark.parametrize("name", _TRANSFORMED)
def test_transformed(name):
  _assert_has_kernels(gpu_mesh.export(_TRANSFORMED[name], *_arrays()))


def test_where_words_have_64_bits():
  with jax.enable_x64(True):
    arrays = _arrays()
    dtypes = {
      x.dtype.name for x in jax.tree.leaves(jax.eval_shape(_step, *arrays))
    }
    assert dtypes == {"int32", "float32", "bool"}
    text = gpu_mesh.export(jax.value_and_grad(_loss), *arrays)
    _assert_has_kernels(text)


@pytest.mark.parametrize("with_gradient", (False, True))
def test_over_eight_devices(with_gradient):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

  # With `check_vma`, which is the default.
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(jax.P("data"), jax.P(), jax.P("data")),
    out_specs=jax.P("data"),
  )
  def run(*args):
    return _loss(*args)[None]

  def call(*args):
    return jnp.sum(run(*args))

  call = jax.grad(call) if with_gradient else call
  _assert_has_kernels(gpu_mesh.export(call, *_arrays()))


def test_with_explicit_axes():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

  def call(x):
    routing = jaxroute.route(x, None, _CONFIG, with_rank=True, **_BY_KERNEL)
    assert jax.typeof(routing.rank).sharding.spec == jax.P("data", None)
    assert jax.typeof(routing.load).sharding.spec == jax.P(None)
    return routing

  sharding = jax.NamedSharding(mesh, jax.P("data"))
  x = jax.ShapeDtypeStruct((_T, 16), jnp.float32, sharding=sharding)
  with jax.set_mesh(mesh):
    _assert_has_kernels(gpu_mesh.export(call, x), "jaxroute_route")


def test_what_is_donated():
  @functools.partial(jax.jit, donate_argnums=0)
  def call(x, bias, mask):
    return x - jax.grad(_loss)(x, bias, mask)

  text = jax.export.export(call, platforms=["cuda"])(*_arrays()).mlir_module()
  _assert_has_kernels(text)
  assert "tf.aliasing_output" in text


def _linen(x):
  """The loss of a layer, and its gradients."""
  model = jaxroute.linen.MoE(_CONFIG, hidden_size=8)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), shapes)
  params = variables.pop("params")

  def loss(params, x):
    counted = jaxroute.linen.COUNTED
    out, _ = model.apply({"params": params, **variables}, x, mutable=counted)
    return jnp.sum(out[0] ** 2)

  return jax.value_and_grad(loss)(params, x)


def _nnx(x):
  """The loss of a layer, and its gradients."""
  rngs = flax.nnx.Rngs(0)
  model = jaxroute.nnx.MoE(_CONFIG, in_features=8, hidden_size=8, rngs=rngs)

  def loss(model, x):
    return jnp.sum(model(x)[0] ** 2)

  value, grads = flax.nnx.value_and_grad(loss)(model, x)
  return value, flax.nnx.state(grads)


@pytest.mark.parametrize("function", (_linen, _nnx))
def test_layers_take_both_kernels_and_do_not_sort(function):
  x = jnp.ones((2, 32, 8))
  with jax.sharding.use_abstract_mesh(gpu_mesh.abstract()):
    traced = str(jax.make_jaxpr(lambda x: function(x))(x))
    _assert_has_kernels(traced)
    assert "sort[" not in traced
    _assert_has_kernels(gpu_mesh.export(function, x))
