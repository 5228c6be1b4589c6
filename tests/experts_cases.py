# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Small experts, and what einsums over all of them give, for tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute import experts

IMPLEMENTATIONS = (None, "tiled", "batched", "ragged_dot")
E, D, F = 4, 6, 5

each = pytest.mark.parametrize(
  "implementation", ("tiled", "batched", "ragged_dot")
)


def normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def params(seed=0, e=E, d=D, f=F):
  return experts.init_expert_params(jax.random.key(seed), e, d, f)


def sizes(*sizes):
  return jnp.asarray(sizes, jnp.int32)


def owner(group_sizes, n):
  """[N, E] one-hot float32: which group owns a row, 0 past the groups."""
  ends = np.cumsum(np.asarray(group_sizes))
  begins = ends - np.asarray(group_sizes)
  row = np.arange(n)[:, None]
  return jnp.asarray((begins <= row) & (row < ends), jnp.float32)


def einsum_matmul(lhs, rhs, owner):
  return jnp.einsum("nd,edf,ne->nf", lhs, rhs, owner)


def einsum_swiglu(x, params, owner):
  gate = einsum_matmul(x, params.w_gate, owner)
  up = einsum_matmul(x, params.w_up, owner)
  return einsum_matmul(jax.nn.silu(gate) * up, params.w_down, owner)


def gradients(fn):
  """Gradients of a curved function of `fn`'s result, compiled."""

  def loss(x, weights, third):
    return jnp.sum(jnp.sin(fn(x, weights, third)))

  return jax.jit(jax.grad(loss, argnums=(0, 1)))


def assert_close(actual, expected, tolerance=2e-6):
  """Equal trees, to a tolerance relative to each array's largest entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert a.dtype == b.dtype
    scale = np.max(np.abs(np.asarray(b, np.float32)), initial=1.0)
    np.testing.assert_allclose(
      np.asarray(a, np.float32),
      np.asarray(b, np.float32),
      rtol=0,
      atol=tolerance * scale,
    )
