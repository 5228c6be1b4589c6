# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Eight devices against one: the same routes and loads, the same layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxroute
from jaxroute import experts, layer
from jaxroute.parallel import shards

pytestmark = pytest.mark.optimized

T, D, F, E, K = 64, 16, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K, histogram=True)
PARTITIONS = {
  "data": jaxroute.Partition(token_axes=("data",)),
  "expert": jaxroute.Partition(expert_axis="expert"),
  "data_expert": jaxroute.Partition(token_axes=("data",), expert_axis="expert"),
  "expert_within_data": jaxroute.Partition(
    token_axes=("data", "expert"), expert_axis="expert"
  ),
}


def _mesh(kind):
  return jax.make_mesh((4, 2), ("data", "expert"), axis_types=(kind,) * 2)


def _inputs():
  keys = jax.random.split(jax.random.key(0), 6)
  params = experts.ExpertParams(
    w_gate=jax.random.normal(keys[0], (E, D, F)) / 4,
    w_up=jax.random.normal(keys[1], (E, D, F)) / 4,
    w_down=jax.random.normal(keys[2], (E, F, D)) / 3,
  )
  x = jax.random.normal(keys[3], (T, D)) + 0.3
  kernel = jax.random.normal(keys[4], (D, E)) / 4
  bias = jax.random.normal(keys[5], (E,)) * 0.1
  return x, kernel, bias, params, jnp.arange(T) % 7 != 0


def _layer(x, kernel, bias, params, mask, partition=None, **kwargs):
  routing, _ = layer.router(x, kernel, bias, CONFIG, mask)
  y, group_sizes = layer.moe(
    x, routing, params, config=CONFIG, partition=partition, **kwargs
  )
  return y, routing, group_sizes


def _placed(mesh, partition, x, kernel, bias, params, mask):
  def put(v, *spec):
    return jax.device_put(v, jax.NamedSharding(mesh, jax.P(*spec)))

  tokens = partition.token_axes or None
  return (
    put(x, tokens),
    put(kernel),
    put(bias),
    jax.tree.map(lambda w: put(w, partition.expert_axis), params),
    put(mask, tokens),
  )


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(
  "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
)
def test_the_layer_on_a_mesh_equals_the_layer_on_one_device(kind, name):
  partition = PARTITIONS[name]
  inputs = _inputs()

  def loss(x, kernel, bias, params, mask, partition=None):
    y, routing, group_sizes = _layer(x, kernel, bias, params, mask, partition)
    return jnp.mean(y**2), (y, routing, group_sizes)

  grad = jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True)
  expected = jax.jit(grad)(*inputs)
  mesh = _mesh(kind)
  with jax.set_mesh(mesh):
    got = jax.jit(grad, static_argnums=5)(
      *_placed(mesh, partition, *inputs), partition
    )
  (_, (y, routing, sizes)), grads = jax.device_get(got)
  (_, (y1, routing1, sizes1)), grads1 = jax.device_get(expected)
  np.testing.assert_array_equal(routing.expert_idx, routing1.expert_idx)
  np.testing.assert_array_equal(routing.load, routing1.load)
  np.testing.assert_array_equal(
    routing.counts.histogram, routing1.counts.histogram
  )
  np.testing.assert_array_equal(sizes, sizes1)
  np.testing.assert_allclose(y, y1, rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda g, g1: np.testing.assert_allclose(g, g1, rtol=1e-4, atol=1e-6),
    grads,
    grads1,
  )


@pytest.mark.any_jax
@pytest.mark.parametrize("name", PARTITIONS)
def test_known_ranks_change_nothing_on_a_mesh(name, monkeypatch):
  partition, (x, kernel, bias, params, mask) = PARTITIONS[name], _inputs()
  routing, _ = layer.router(x, kernel, bias, CONFIG, mask)
  # Every token shard has ranks of its own.
  shards = 4 if name == "data" else 1
  found = zip(
    np.split(np.asarray(routing.expert_idx), shards),
    np.split(np.asarray(routing.token_mask), shards),
    strict=True,
  )
  rank = np.concatenate([oracle.ranks(*shard) for shard in found])
  ranked = dataclasses.replace(routing, rank=jnp.asarray(rank))
  loads, local_moe = [], layer.local_moe

  def spy(x, routing, params, **kwargs):
    if routing.rank is not None:
      assert routing.rank.shape == (x.shape[0], K)
      jax.debug.callback(loads.append, routing.load)
    return local_moe(x, routing, params, **kwargs)

  monkeypatch.setattr(layer, "local_moe", spy)

  @jax.jit
  def run(x, routing, params):
    return layer.moe(x, routing, params, config=CONFIG, partition=partition)

  with jax.set_mesh(_mesh(jax.sharding.AxisType.Auto)):
    (y, sizes), (expected, load) = (
      run(x, routes, params) for routes in (ranked, routing)
    )
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(sizes, load)
  # They are used where a device has all experts, with the load of its tokens.
  jax.effects_barrier()
  assert len(loads) == (8 if name == "data" else 0)
  if loads:
    np.testing.assert_array_equal(np.sum(loads, axis=0), 2 * routing.load)


@pytest.mark.any_jax
def test_capacity_is_per_token_shard_and_counted():
  partition = PARTITIONS["data_expert"]
  inputs = _inputs()
  mesh = _mesh(jax.sharding.AxisType.Explicit)
  with jax.set_mesh(mesh):
    _, routing, sizes = jax.jit(
      lambda *a: _layer(*a, partition, capacity_factor=0.5)
    )(*_placed(mesh, partition, *inputs))
  # Four shards of 16 tokens: ceil(0.5 * 16 * 2 / 8) = 2 rows per expert each.
  ids = np.asarray(routing.expert_idx).reshape(4, 16 * K)
  mask = np.repeat(np.asarray(inputs[-1]), K).reshape(4, 16 * K)
  expected = sum(
    np.minimum(np.bincount(i[m], minlength=E), 2)
    for i, m in zip(ids, mask, strict=True)
  )
  np.testing.assert_array_equal(sizes, expected)


def test_nan_tokens_stay_nan_and_uncounted_on_a_mesh():
  partition = PARTITIONS["data_expert"]
  x, kernel, bias, params, mask = _inputs()
  x = x.at[3].set(jnp.nan)
  mesh = _mesh(jax.sharding.AxisType.Explicit)
  with jax.set_mesh(mesh):
    y, routing, sizes = jax.jit(lambda *a: _layer(*a, partition))(
      *_placed(mesh, partition, x, kernel, bias, params, mask)
    )
  y = jax.device_get(y)
  assert np.isnan(y[3]).all() and not np.isnan(np.delete(y, 3, axis=0)).any()
  assert int(routing.load.sum()) == K * (int(mask.sum()) - 1)
  np.testing.assert_array_equal(sizes, routing.load)


@pytest.mark.any_jax
def test_no_mesh_and_odd_sizes_are_named():
  x, kernel, bias, params, mask = _inputs()
  partition = PARTITIONS["data_expert"]
  with pytest.raises(ValueError, match=r"'data', 'expert'.*jax.set_mesh"):
    _layer(x, kernel, bias, params, mask, partition)
  with jax.set_mesh(_mesh(jax.sharding.AxisType.Auto)):
    with pytest.raises(ValueError, match="shards 63 tokens.*4 devices"):
      _layer(x[:63], kernel, bias, params, mask[:63], partition)
    seven = jax.tree.map(lambda w: w[:7], params)
    config = dataclasses.replace(CONFIG, num_experts=7)
    routing, _ = layer.router(x, kernel[:, :7], bias[:7], config, mask)
    with pytest.raises(ValueError, match="shards 7 experts.*2 devices"):
      shards.map_experts(layer.local_moe, x, routing, seven, partition)
