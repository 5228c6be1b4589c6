# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`layer.local_moe`: sort, dispatch, experts and combine, against the oracle."""

import dataclasses
import functools
import itertools

import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from experts_cases import IMPLEMENTATIONS, D, E, each

from jaxroute import dispatch, experts, layer, metrics, types

pytestmark = pytest.mark.optimized


def _routing(expert_idx, weights, token_mask=None, num_experts=E):
  t = expert_idx.shape[0]
  mask = np.ones(t, bool) if token_mask is None else token_mask
  load = np.bincount(
    np.asarray(expert_idx)[mask].ravel(), minlength=num_experts
  )
  return types.Routing(
    expert_idx=jnp.asarray(expert_idx, jnp.int32),
    weights=jnp.asarray(weights, jnp.float32),
    counts=types.Counts(load=jnp.asarray(load, jnp.int32)),
    cutoff=jnp.zeros(t),
    token_mask=jnp.asarray(mask),
  )


def _choices(seed, t, k, num_experts=E):
  rng = np.random.default_rng(seed)
  order = np.argsort(rng.random((t, num_experts)), axis=1)
  return order[:, :k].astype(np.int32), rng.random((t, k)).astype(np.float32)


def _oracle_moe(x, params, routing, kept):
  weights = (params.w_gate, params.w_up, params.w_down)
  out = oracle.moe(
    *map(np.asarray, (x, *weights, routing.expert_idx, routing.weights)), kept
  )
  return jnp.asarray(out)


_moe = jax.jit(layer.local_moe, static_argnames=("capacity", "implementation"))


@pytest.mark.any_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t, k", [(0, 2), (1, 4), (7, 1), (90, 3)])
def test_moe_against_the_oracle(implementation, t, k):
  x, params = experts_cases.normal(0, t, D), experts_cases.params()
  routing = _routing(*_choices(1, t, k))
  out, group_sizes = _moe(x, routing, params, implementation=implementation)
  experts_cases.assert_close(
    out, _oracle_moe(x, params, routing, np.ones((t, k), bool))
  )
  np.testing.assert_array_equal(group_sizes, routing.load)


@pytest.mark.any_jax
@pytest.mark.parametrize("capacity", (1, 7, 50))
def test_an_expert_keeps_its_first_assignments_in_token_order(capacity):
  t, k = 40, 2
  x, params = experts_cases.normal(0, t, D), experts_cases.params()
  routing = _routing(*_choices(1, t, k))
  kept, seen = np.zeros((t, k), bool), np.zeros(E, int)
  for i, j in itertools.product(range(t), range(k)):
    e = int(routing.expert_idx[i, j])
    kept[i, j] = seen[e] < capacity
    seen[e] += 1
  out, group_sizes = _moe(x, routing, params, capacity=capacity)
  experts_cases.assert_close(out, _oracle_moe(x, params, routing, kept))
  np.testing.assert_array_equal(group_sizes, np.minimum(seen, capacity))


def test_an_assignment_to_no_expert_adds_nothing_and_counts_as_dropped():
  t, k = 24, 3
  expert_idx, weights = _choices(1, t, k)
  x, params = experts_cases.normal(0, t, D), experts_cases.params()
  routing = _routing(expert_idx, weights)
  lost = np.array([-1, E, E + 1, 2**31 - 1, -(2**31)], np.int32)
  expert_idx = expert_idx.copy()
  expert_idx[: lost.size, 1] = lost
  broken = dataclasses.replace(routing, expert_idx=jnp.asarray(expert_idx))
  kept = (expert_idx >= 0) & (expert_idx < E)
  config = types.RouterConfig(num_experts=E, top_k=k)
  out, group_sizes = layer.moe(x, broken, params, config=config)
  expected = _oracle_moe(x, params, routing, kept)
  experts_cases.assert_close(out, expected)
  np.testing.assert_array_equal(
    group_sizes, np.bincount(expert_idx[kept], minlength=E)
  )
  dropped = metrics.drop_fraction(broken.load, group_sizes)
  np.testing.assert_allclose(dropped, lost.size / (t * k))


@pytest.mark.any_jax
@each
def test_masked_and_nan_tokens(implementation):
  t, k = 30, 2
  expert_idx, weights = _choices(1, t, k)
  mask = np.arange(t) % 3 != 0
  weights[~mask] = 0
  weights[9] = np.nan  # a token with a NaN logit: in no group, and it shows
  routing = _routing(expert_idx, weights, mask)
  params = experts_cases.params()
  x = experts_cases.normal(0, t, D)

  def loss(x, params):
    out, group_sizes = layer.local_moe(
      x, routing, params, implementation=implementation
    )
    return jnp.sum(jnp.where(mask[:, None], out, 0)), (out, group_sizes)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (_, clean), (expected, _) = grad(x, params)
  dirty = jnp.where(mask[:, None], x, jnp.nan)
  (d_x, d_params), (out, group_sizes) = grad(dirty, params)
  np.testing.assert_array_equal(out, expected)
  np.testing.assert_array_equal(out[9], jnp.nan)
  padding = ~mask & (np.arange(t) != 9)
  np.testing.assert_array_equal(out[padding], 0)
  np.testing.assert_array_equal(d_x[~mask], 0)
  np.testing.assert_array_equal(group_sizes, routing.load)
  jax.tree.map(np.testing.assert_array_equal, d_params, clean)
  assert all(jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(d_params))


@each
def test_shards_of_the_experts_sum_to_the_whole(implementation):
  t, k, half = 40, 3, E // 2
  expert_idx, weights = _choices(1, t, k)
  x, params = experts_cases.normal(0, t, D), experts_cases.params()
  total = jnp.zeros_like(x)
  for first in (0, half):
    local = expert_idx - first
    local = np.where((local >= 0) & (local < half), local, half)
    shard = jax.tree.map(lambda w, i=first: w[i : i + half], params)
    out, group_sizes = _moe(
      x, _routing(local, weights), shard, implementation=implementation
    )
    assert group_sizes.shape == (half,)
    total += out
  whole, _ = _moe(x, _routing(expert_idx, weights), params)
  experts_cases.assert_close(total, whole)


def test_a_shard_is_cut_for_its_share():
  t, k, half = 400, 2, E // 2
  routing, params = _routing(*_choices(1, t, k)), experts_cases.params(e=half)
  moe = functools.partial(layer.local_moe, implementation="batched")
  text = str(
    jax.make_jaxpr(moe)(experts_cases.normal(0, t, D), routing, params)
  )
  # 1.25 times half of the 800 rows, over the half of the experts.
  assert f"f32[{half},256,{D}]" in text
  assert f"f32[{half},504,{D}]" not in text


@each
def test_moe_gradients(implementation):
  t, k = 50, 3
  expert_idx, weights = _choices(1, t, k)
  x, params, weights = (
    experts_cases.normal(0, t, D),
    experts_cases.params(),
    jnp.asarray(weights),
  )

  def ours(x, params, weights):
    routing = types.Routing(
      expert_idx=jnp.asarray(expert_idx),
      weights=weights,
      counts=types.Counts(load=jnp.zeros(E, jnp.int32)),
      cutoff=jnp.zeros(t),
      token_mask=jnp.ones(t, bool),
    )
    return layer.local_moe(x, routing, params, implementation=implementation)[0]

  def dense(x, params, weights):
    one_hot = jax.nn.one_hot(expert_idx, E)
    parts = [
      experts_cases.einsum_swiglu(x, params, one_hot[:, i])
      * weights[:, i, None]
      for i in range(k)
    ]
    return sum(parts[1:], parts[0])

  def grads(fn):
    def loss(*args):
      return jnp.sum(jnp.sin(fn(*args)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, params, weights)

  experts_cases.assert_close(grads(ours), grads(dense), 5e-6)


def test_identity_experts_give_back_the_tokens():
  # Through the same order as a layer's, with weights that sum to 1.
  t, k = 33, 3
  expert_idx, weights = _choices(0, t, k)
  weights = jnp.asarray(weights / weights.sum(1, keepdims=True))
  x, identity = experts_cases.normal(0, t, D), jnp.tile(jnp.eye(D), (E, 1, 1))
  order = dispatch.sort_by_expert(jnp.asarray(expert_idx), E)
  rows = experts.grouped_matmul(
    dispatch.dispatch(x, order), identity, order.group_sizes
  )
  experts_cases.assert_close(dispatch.combine(rows, weights, order), x)


@pytest.mark.parametrize("capacity", (None, 7))
def test_known_ranks_change_nothing(capacity):
  t, k = 40, 3
  expert_idx, weights = _choices(1, t, k)
  mask = np.arange(t) % 3 != 0
  routing = _routing(expert_idx, weights, mask)
  ranked = dataclasses.replace(routing, rank=oracle.ranks(expert_idx, mask))
  x, params = experts_cases.normal(0, t, D), experts_cases.params()
  jax.tree.map(
    np.testing.assert_array_equal,
    _moe(x, ranked, params, capacity=capacity),
    _moe(x, routing, params, capacity=capacity),
  )
  # Of a part of the experts they are not the ranks.
  half = jax.tree.map(lambda w: w[: E // 2], params)
  jax.tree.map(
    np.testing.assert_array_equal,
    _moe(x, ranked, half, capacity=capacity),
    _moe(x, routing, half, capacity=capacity),
  )
