# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`route` by the GPU kernel: who takes it, and its gradients."""

import functools

import cases
import conformance
import gpu_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_mesh import H100
from jax.sharding import AxisType

import jaxroute
from jaxroute.kernels.gpu import device

pytestmark = gpu_mesh.needs_kernels

_route = functools.partial(
  jaxroute.route, implementation="pallas_gpu", interpret=True
)


def _config(num_experts=16, top_k=3, **kwargs):
  return jaxroute.RouterConfig(num_experts=num_experts, top_k=top_k, **kwargs)


def _trace(config=None, implementation=None, t=16, dtype=jnp.float32):
  """What `route` traces to, as text."""
  config, sharding = config or _config(), None
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit in mesh.axis_types:
    sharding = jax.NamedSharding(mesh, jax.P("data"))
  shape = t, config.num_experts
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  # A function of its own, so that nothing is cached.
  def call(x):
    return jaxroute.route(x, None, config, implementation=implementation)

  return str(jax.make_jaxpr(call)(x))


def _takes_kernel(*args, **kwargs):
  return "jaxroute_route" in _trace(*args, **kwargs)


@pytest.mark.parametrize(
  ("size", "axis_type", "kind", "takes"),
  (
    (1, AxisType.Auto, H100, True),
    (1, AxisType.Auto, "NVIDIA B200", True),
    (1, AxisType.Explicit, H100, True),
    (8, AxisType.Explicit, H100, True),
    (8, AxisType.Manual, H100, True),
    (8, AxisType.Auto, H100, False),
    (1, AxisType.Auto, "NVIDIA A100-SXM4-80GB", False),
    (1, AxisType.Auto, "NVIDIA L4", False),
    (1, AxisType.Auto, "cpu", False),
  ),
)
def test_none_takes_it_where_it_runs_and_can_be_mapped(
  size, axis_type, kind, takes
):
  mesh = gpu_mesh.abstract(size, axis_type, kind)
  with jax.sharding.use_abstract_mesh(mesh):
    assert _takes_kernel() == takes
    is_mapped = axis_type == AxisType.Explicit
    assert ("shard_map" in _trace()) == is_mapped
    assert not _takes_kernel(implementation="xla")
    # What it cannot do is left to XLA.
    assert not _takes_kernel(_config(logit_soft_cap=3.0))
    assert not _takes_kernel(dtype=jnp.float8_e4m3fn)


def test_none_leaves_a_symbolic_number_of_tokens_to_xla():
  (t,) = jax.export.symbolic_shape("T")
  with jax.sharding.use_abstract_mesh(gpu_mesh.abstract()):
    assert not _takes_kernel(t=t)
    with pytest.raises(NotImplementedError, match="a number of tokens, got T"):
      _trace(implementation="pallas_gpu", t=t)


def test_none_takes_it_without_a_mesh_on_one_gpu_only(monkeypatch):
  assert not _takes_kernel()  # A CPU.
  monkeypatch.setattr(device, "capability", lambda: (9, 0))
  assert not _takes_kernel()  # Of eight devices, none says which it is for.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert _takes_kernel()
  monkeypatch.setattr(device, "capability", lambda: (8, 0))
  assert not _takes_kernel()


def test_asked_for_by_name_it_is_traced_anywhere_and_refused_by_a_cpu():
  assert _takes_kernel(implementation="pallas_gpu")

  @jax.jit
  def route(x):
    return jaxroute.route(x, None, _config(), implementation="pallas_gpu")

  with pytest.raises(NotImplementedError) as error:
    route(jnp.zeros((16, 16)))
  for words in (
    "the CUDA kernel of `route`",
    "another platform",
    "interpret=True",
  ):
    assert words in str(error.value)


@pytest.mark.parametrize(
  ("fields", "words"),
  (
    (dict(num_experts=64, top_k=17), ("top_k", "17", "'xla'")),
    (dict(num_experts=2048), ("num_experts", "2048", "'xla'")),
    (dict(logit_soft_cap=30.0), ("logit_soft_cap", "'xla'")),
  ),
)
def test_what_it_cannot_do_is_named(fields, words):
  config = _config(**fields)
  x = jnp.zeros((2, config.num_experts))
  with pytest.raises(NotImplementedError) as error:
    jaxroute.route(x, None, config, implementation="pallas_gpu")
  for word in words:
    assert word in str(error.value)
  assert jaxroute.route(x, None, config).load.sum() == 2 * config.top_k


def test_only_the_kernel_counts_ranks():
  x, config = cases.logits("ties", 20, 16), _config()
  assert jaxroute.route(x, None, config, with_rank=True).rank is None
  ranked = jax.jit(lambda x: _route(x, None, config, with_rank=True))(x)
  assert ranked.rank.shape == (20, 3) and ranked.rank.dtype == jnp.int32
  assert jax.eval_shape(lambda x: _route(x, None, config), x).rank is None
  with pytest.raises(ValueError, match="with_rank"):
    _route(x, None, config, with_rank="yes")


@pytest.mark.parametrize(
  "config",
  (
    cases.family("deepseek_v3", 32, 4),
    cases.family("olmoe", 16, 3),
    cases.family("mixtral", 16, 3),
  ),
  ids=lambda config: config.score_fn,
)
def test_gradients_are_those_of_xla(config):
  e, k = config.num_experts, config.top_k
  x, mask = cases.logits("random", 23, e), np.arange(23) < 20
  x[20:] = np.nan  # Padding.
  out, bias = cases.logits("random", 23, k, seed=2), conformance.bias(e)

  def grad(route):
    def loss(x, bias):
      routing = route(x, bias, config, mask)
      return jnp.sum(out * routing.weights), routing

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(x, bias)

  (ours, ours_bias), routing = grad(_route)
  xla = functools.partial(jaxroute.route, implementation="xla")
  (expected, _), expected_routing = grad(xla)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(ours[20:], 0)
  np.testing.assert_array_equal(ours_bias, 0)
  np.testing.assert_array_equal(routing.expert_idx, expected_routing.expert_idx)
  np.testing.assert_array_equal(routing.load, expected_routing.load)


def test_histograms_and_batches_are_those_of_xla():
  config = _config(histogram=True, num_groups=4, group_top_k=2)
  x = cases.logits("ties", 24, 16).reshape(3, 8, 16)
  ours, xla = (
    jax.jit(jax.vmap(lambda x, f=f: f(x, conformance.bias(16), config)))(x)
    for f in (_route, functools.partial(jaxroute.route, implementation="xla"))
  )
  np.testing.assert_array_equal(ours.counts.histogram, xla.counts.histogram)
  np.testing.assert_array_equal(ours.expert_idx, xla.expert_idx)
  np.testing.assert_array_equal(ours.load, xla.load)
