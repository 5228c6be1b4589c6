# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Values on a GPU: what its kernels return against XLA on the same device.

JAX_PLATFORMS=cuda python -m pytest -p no:benchmark -m gpu -n 4 tests/system/gpu_test.py
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
from jaxroute import dispatch, experts, scores

pytestmark = pytest.mark.gpu

# 25 times this are a thousand.
INPUTS = 40

kernel, xla = (
  functools.partial(jaxroute.route, implementation=name)
  for name in ("pallas_gpu", "xla")
)
V3 = device_cases.CASES["V3, T=15"]


def _rank(expert_idx, token_mask, num_experts):
  """[T, K]: the place of an assignment among its expert's, or among the uncounted."""
  key = np.where(token_mask[:, None], expert_idx, num_experts).reshape(-1)
  order = np.argsort(key, kind="stable")
  ordered = key[order]
  rank = np.empty_like(key)
  rank[order] = np.arange(key.size) - np.searchsorted(ordered, ordered)
  return rank.reshape(expert_idx.shape)


def _assert_routed_alike(ours, theirs, selection, config):
  """As `device_cases` says, and ranks are those of a sort."""
  device_cases.assert_routed_alike(ours, theirs, selection, config)
  np.testing.assert_array_equal(
    ours.rank, _rank(ours.expert_idx, ours.token_mask, config.num_experts)
  )


@pytest.mark.parametrize("name", device_cases.CASES)
def test_the_kernel_routes_as_xla_does(name):
  case = device_cases.CASES[name]
  config = case.config

  def by_kernel(*args):
    logits, bias, mask = args
    return kernel(logits, bias, config, mask, with_rank=True)

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
    _assert_routed_alike(ours, *by_xla(*args), config)
    jax.tree.map(np.testing.assert_array_equal, ours, by_kernel(*args))


def test_zeros_of_both_signs_tie():
  logits = jax.device_put(device_cases.zeros_of_both_signs())
  ours, theirs = (
    jax.jit(lambda x, route=route: route(x, None, device_cases.ZEROS))(logits)
    for route in (kernel, xla)
  )
  np.testing.assert_array_equal(ours.expert_idx, theirs.expert_idx)
  np.testing.assert_array_equal(ours.cutoff, theirs.cutoff)


@pytest.mark.parametrize(
  "name",
  ("V3, T=15", "V3, T=4096", "sigmoid, 8 of 384", "megatron, 4 groups of 16"),
)
def test_a_histogram_is_that_of_xla(name):
  case = device_cases.CASES[name]
  config = dataclasses.replace(case.config, histogram=True)
  args = jax.device_put(case.inputs(0))

  def counts(route, logits, bias, mask):
    return route(logits, bias, config, mask).counts

  ours, theirs = (
    device_cases.compiled(functools.partial(counts, route), *args)(*args)
    for route in (kernel, xla)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert jnp.any(ours.histogram != 0)


@pytest.mark.parametrize(
  "name",
  (
    "V3, bfloat16",
    "softmax, 10 of 512",
    "softmax after, 8 of 128",
    "sqrtsoftplus, 8 of 256",
    "sigmoid, 6 of 60",
  ),
)
def test_the_gradient_is_that_of_xla(name):
  case = device_cases.CASES[name]
  device_cases.check_gradient(kernel, xla, case, tolerance=1e-5)


def test_counts_of_several_tiles_are_kept_in_a_stack():
  config = jaxroute.RouterConfig(num_experts=64, top_k=4, histogram=True)
  logits = jax.random.normal(jax.random.key(0), (2048, 64))
  biases = jax.random.normal(jax.random.key(1), (3, 64)) / 8

  def layers(logits, biases):
    def layer(logits, bias):
      routing = kernel(logits, bias, config)
      return logits + 0.0 * jnp.sum(routing.weights), routing.counts

    return jax.lax.scan(layer, logits, biases)[1]

  def stack(logits, bias, loads):
    return loads.at[1].set(kernel(logits, bias, config).load)

  found = device_cases.compiled(layers, logits, biases)(logits, biases)
  for i, bias in enumerate(biases):
    alone = jax.jit(kernel, static_argnums=2)(logits, bias, config).counts
    assert int(jnp.sum(alone.load)) == 2048 * 4
    at_i = jax.tree.map(lambda x, i=i: x[i], found)
    jax.tree.map(np.testing.assert_array_equal, at_i, alone)
  loads = jnp.full((3, 64), -7, jnp.int32)
  stacked = jax.jit(stack)(logits, biases[0], loads)
  np.testing.assert_array_equal(stacked[1], found.load[0])
  np.testing.assert_array_equal(stacked[::2], loads[::2])


def test_vmap_is_a_loop():
  logits, bias, _ = V3.finite()
  logits = jnp.stack([logits, logits[::-1], -logits])

  def routed(logits):
    return kernel(logits, bias, V3.config, with_rank=True)

  batched = device_cases.compiled(jax.vmap(routed), logits)(logits)
  one = jax.jit(routed)
  for i, x in enumerate(logits):
    at_i = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
    jax.tree.map(np.testing.assert_array_equal, at_i, one(x))


@pytest.mark.parametrize("policy", (None, jaxroute.save_routing))
def test_a_scan_over_rematerialised_layers_is_a_loop(policy):
  args = V3.finite()
  biases = jnp.stack([args[1], -args[1], 2 * args[1]])

  def layer(logits, bias, route):
    weights = route(logits, bias, V3.config, args[2]).weights
    return logits + jnp.sum(weights**2, axis=1, keepdims=True) * bias[None]

  def scanned(logits, biases):
    body = jax.checkpoint(
      lambda x, bias: (layer(x, bias, kernel), None), policy=policy
    )
    return jnp.sum(jnp.sin(jax.lax.scan(body, logits, biases)[0]))

  def looped(logits, biases):
    for bias in biases:
      logits = layer(logits, bias, xla)
    return jnp.sum(jnp.sin(logits))

  ours, theirs = (
    jax.jit(jax.value_and_grad(f))(args[0], biases) for f in (scanned, looped)
  )
  experts_cases.assert_close(ours, theirs, 1e-5)


def test_donated_logits_are_routed():
  logits, bias, mask = V3.finite()

  def step(logits, bias, mask):
    routing = kernel(logits, bias, V3.config, mask)
    return logits + jnp.sum(routing.weights), routing

  expected = jax.jit(step)(logits, bias, mask)
  donated = jax.jit(step, donate_argnums=0)
  actual = donated(jnp.copy(logits), bias, mask)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("manual", (False, True), ids=("explicit", "shard_map"))
def test_on_a_mesh_of_one_device(manual):
  mesh = jax.make_mesh((1,), ("data",))
  args = V3.finite()
  config = V3.config

  def routed(logits, bias, mask):
    routing = kernel(logits, bias, config, mask)
    return routing.expert_idx, routing.weights, routing.load

  def on_shards(*args):
    *tokens, load = routed(*args)
    return *tokens, jax.lax.psum(load, "data")

  expected = jax.jit(routed)(*args)
  specs, on_mesh = (jax.P("data"), jax.P(), jax.P("data")), routed
  if manual:
    out = jax.P("data"), jax.P("data"), jax.P()
    on_mesh = jax.shard_map(
      on_shards, mesh=mesh, in_specs=specs, out_specs=out, check_vma=True
    )
  with jax.set_mesh(mesh):
    args = [
      jax.device_put(x, jax.NamedSharding(mesh, spec))
      for x, spec in zip(args, specs, strict=True)
    ]
    actual = jax.jit(on_mesh)(*args)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("capacity", (None, 20))
@pytest.mark.parametrize(
  "name", ("V3, T=15", "sigmoid, 6 of 60", "sigmoid, 10 of 512")
)
def test_the_order_by_rank_is_that_of_a_sort(name, capacity):
  case = device_cases.CASES[name]
  e = case.config.num_experts

  def orders(logits, bias, mask):
    r = kernel(logits, bias, case.config, mask, with_rank=True)
    sort = functools.partial(
      dispatch.sort_by_expert, r.expert_idx, e, r.token_mask, capacity
    )
    ranks = dict(rank=r.rank, load=r.load)
    return sort(implementation="pallas_gpu", **ranks), sort(
      implementation="xla"
    )

  orders = device_cases.compiled(orders, *jax.device_put(case.inputs(0)))
  for seed in range(6):
    ours, theirs = jax.device_get(orders(*jax.device_put(case.inputs(seed))))
    np.testing.assert_array_equal(ours.group_sizes, theirs.group_sizes)
    owned = theirs.group_sizes.sum()
    np.testing.assert_array_equal(
      ours.permutation[:owned], theirs.permutation[:owned]
    )
    is_owned = theirs.inverse_permutation < owned
    np.testing.assert_array_equal(
      ours.inverse_permutation[is_owned], theirs.inverse_permutation[is_owned]
    )
    np.testing.assert_array_equal(
      ours.permutation[ours.inverse_permutation], np.arange(is_owned.size)
    )


@pytest.mark.parametrize("implementation", (None, "pallas_gpu", "batched"))
def test_bfloat16_experts_against_a_float32_einsum(implementation):
  n, e, d, f = 1000, 8, 256, 128
  group_sizes = 300, 0, 128, 1, 271, 129, 63, 8  # 100 rows are of no expert
  x = experts_cases.normal(0, n, d).astype(jnp.bfloat16)
  params = jax.tree.map(
    lambda w: w.astype(jnp.bfloat16), experts_cases.params(0, e, d, f)
  )
  owner = experts_cases.owner(group_sizes, n)
  sizes = experts_cases.sizes(*group_sizes)

  def ours(x, params, sizes):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    return out.astype(jnp.float32)

  def exact(x, params, owner):
    x, params = jax.tree.map(lambda v: v.astype(jnp.float32), (x, params))
    with jax.default_matmul_precision("highest"):
      return experts_cases.einsum_swiglu(x, params, owner)

  # What rows of no expert hold must not matter.
  padded = x.at[sum(group_sizes) :].set(jnp.nan)
  actual = device_cases.compiled(ours, padded, params, sizes)(
    padded, params, sizes
  )
  experts_cases.assert_close(actual, jax.jit(exact)(x, params, owner), 1e-2)
  actual = experts_cases.gradients(ours)(padded, params, sizes)
  expected = experts_cases.gradients(exact)(x, params, owner)
  experts_cases.assert_close(actual, expected, 2e-2)
