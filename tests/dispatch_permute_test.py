# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Dispatch and combine against loops over assignments, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute import dispatch

pytestmark = pytest.mark.optimized

E, D = 5, 3


def _case(t, k, seed=0, masked=0.0, capacity=None):
  """Tokens, weights, their `Permutation`, and which assignments it keeps."""
  rng = np.random.default_rng(seed)
  expert_idx = np.argsort(rng.random((t, E)), axis=1)[:, :k].astype(np.int32)
  mask = rng.random(t) >= masked
  arrays = oracle.sort_by_expert(expert_idx, E, mask, capacity)
  permutation = dispatch.Permutation(
    **dict(
      zip(
        ("permutation", "inverse_permutation", "group_sizes"),
        map(jnp.asarray, arrays),
        strict=True,
      )
    )
  )
  x = jnp.asarray(rng.normal(size=(t, D)), jnp.float32)
  weights = jnp.asarray(rng.random((t, k)), jnp.float32)
  kept = arrays[1].reshape(t, k) < arrays[2].sum()
  return x, weights, permutation, kept


CASES = (
  dict(t=0, k=2),
  dict(t=1, k=1),
  dict(t=7, k=3),
  dict(t=20, k=E, masked=0.3),
  dict(t=40, k=2, masked=0.2, capacity=4),
  dict(t=9, k=2, masked=1.1),
)

cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_dispatch_copies_the_token_of_every_row(case):
  x, _, permutation, _ = _case(**case)
  rows = dispatch.dispatch(x, permutation)
  assert rows.shape == (case["t"] * case["k"], D)
  for i, n in enumerate(np.asarray(permutation.permutation)):
    np.testing.assert_array_equal(rows[i], x[n // case["k"]])


@cases
def test_combine_sums_kept_rows_by_weight(case):
  _, weights, permutation, kept = _case(**case)
  t, k = weights.shape
  rows = jnp.asarray(np.random.default_rng(1).normal(size=(t * k, D)))
  rows = jnp.asarray(rows, jnp.float32)
  expected = np.zeros((t, D), np.float64)
  for i in range(t):
    for j in range(k):
      if kept[i, j]:
        row = int(permutation.inverse_permutation[i * k + j])
        expected[i] += float(weights[i, j]) * np.asarray(rows[row], np.float64)
  out = dispatch.combine(rows, weights, permutation)
  assert out.shape == (t, D)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


# A new shape is a compilation: few of them, many orders.
@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(1, 1), (30, 3), (13, E)]), st.integers(0, 1000))
def test_combine_of_dispatch_is_the_identity(shape, seed):
  t, k = shape
  x, weights, permutation, _ = _case(t, k, seed)
  weights = weights / jnp.sum(weights, axis=1, keepdims=True)
  rows = dispatch.dispatch(x, permutation)
  out = dispatch.combine(rows, weights, permutation)
  np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-6)


def _plain(x, weights, permutation):
  """Dispatch, a curved function of the rows, combine: indexing alone."""
  t, k = weights.shape
  rows = jnp.sin(x[permutation.permutation // k])
  slots = permutation.inverse_permutation.reshape(t, k)
  kept = slots < jnp.sum(permutation.group_sizes)
  rows = jnp.where(kept[..., None], rows[slots], 0.0)
  return jnp.sum(rows * weights[..., None], axis=1)


def _ours(x, weights, permutation):
  rows = jnp.sin(dispatch.dispatch(x, permutation))
  return dispatch.combine(rows, weights, permutation)


@cases
def test_gradients_are_those_of_plain_indexing(case):
  x, weights, permutation, kept = _case(**case)

  def grads(fn):
    def loss(x, weights):
      return jnp.sum(jnp.cos(fn(x, weights, permutation)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights)

  (d_x, d_weights), expected = grads(_ours), grads(_plain)
  np.testing.assert_allclose(d_x, expected[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(d_weights, expected[1], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(np.asarray(d_weights)[~kept], 0)


def test_neither_direction_scatters():
  x, weights, permutation, _ = _case(20, 2)

  def loss(x, weights):
    return jnp.sum(_ours(x, weights, permutation))

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  assert "scatter" not in grad.lower(x, weights).as_text()


def test_rows_of_no_expert_are_not_read():
  x, weights, permutation, kept = _case(40, 2, masked=0.3, capacity=5)
  total = int(jnp.sum(permutation.group_sizes))
  past = jnp.arange(80)[:, None] >= total

  def grads(filler):
    def fn(x, weights):
      rows = jnp.where(past, filler, dispatch.dispatch(x, permutation))
      return dispatch.combine(rows, weights, permutation)

    out, pull = jax.vjp(fn, x, weights)
    return out, *pull(jnp.ones_like(out))

  for clean, dirty in zip(grads(0.0), grads(jnp.nan), strict=True):
    np.testing.assert_array_equal(clean, dirty)
  # The other way: a NaN gradient of those rows stays there.
  _, pull = jax.vjp(lambda x: dispatch.dispatch(x, permutation), x)
  (d_x,) = pull(jnp.where(past, jnp.nan, 1.0) * jnp.ones((80, D)))
  np.testing.assert_array_equal(d_x, kept.sum(1, keepdims=True) * np.ones(D))


def test_nan_weights_make_a_nan_token():
  x, weights, permutation, kept = _case(12, 2, masked=0.5)
  lost = int(np.flatnonzero(~kept[:, 0])[0])
  weights = weights.at[lost].set(jnp.nan)
  out = dispatch.combine(
    dispatch.dispatch(x, permutation), weights, permutation
  )
  assert jnp.all(jnp.isnan(out[lost]))
  others = np.arange(12) != lost
  assert jnp.all(jnp.isfinite(out[others]))


def test_bfloat16_sums_in_float32():
  # 256 + 1 + 1: in bfloat16 each 1 is lost, one after the other.
  permutation = dispatch.sort_by_expert(jnp.array([[0, 1, 2]]), 3)
  rows = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
  out = dispatch.combine(rows, jnp.ones((1, 3)), permutation)
  assert out.dtype == jnp.bfloat16
  assert out[0, 0] == 258

  def total(x):
    return jnp.sum(dispatch.dispatch(x, permutation) * rows)

  assert jax.grad(total)(jnp.ones((1, 1), jnp.bfloat16))[0, 0] == 258


@pytest.mark.devices(2)
def test_under_shard_map_and_remat_the_gradients_stay():
  mesh = jax.make_mesh((2,), ("data",))
  x, weights, _, _ = _case(12, 2)
  expert_idx = jnp.asarray(np.tile([[0, 1], [1, 2], [4, 3]], (4, 1)), jnp.int32)

  def grads(x, weights, expert_idx):
    permutation = dispatch.sort_by_expert(expert_idx, E, capacity=2)

    @jax.checkpoint
    def loss(x, weights):
      return jnp.sum(jnp.sin(_ours(x, weights, permutation)))

    return jax.grad(loss, argnums=(0, 1))(x, weights)

  halves = [
    grads(*(v[s] for v in (x, weights, expert_idx)))
    for s in (slice(0, 6), slice(6, 12))
  ]
  spec = jax.P("data")
  with jax.set_mesh(mesh):
    args = [jax.device_put(v, spec) for v in (x, weights, expert_idx)]
    sharded = jax.jit(
      jax.shard_map(
        grads, in_specs=(spec,) * 3, out_specs=(spec,) * 2, check_vma=True
      )
    )(*args)
  for whole, *parts in zip(sharded, *halves, strict=True):
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5)


def test_arrays_of_another_batch_are_refused():
  x, weights, permutation, _ = _case(6, 2)
  rows = dispatch.dispatch(x, permutation)
  for call, words in (
    (lambda: dispatch.dispatch(x[:5], permutation), r"`x`.*N=12.*\(5, 3\)"),
    (lambda: dispatch.dispatch(x[0], permutation), r"`x`.*\[T, D\].*\(3,\)"),
    (
      lambda: dispatch.combine(rows[:3], weights, permutation),
      r"`rows` must be \[N=12, D\].*\(3, 3\)",
    ),
    (
      lambda: dispatch.combine(rows, weights[:2], permutation),
      r"`weights`.*12, got float32 \(2, 2\)",
    ),
    (
      lambda: dispatch.combine(rows, weights.astype(jnp.bfloat16), permutation),
      "`weights` must be float32.*bfloat16",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      call()
