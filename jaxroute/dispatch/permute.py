# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tokens to the rows of their experts and back, by a permutation.

Both directions gather, forwards and backwards: each assignment has one row, so
the transpose of a gather is the gather by the inverse permutation. XLA's
transpose would be a scatter-add, which is slow and, with atomics, not the same
in every run.
"""

import jax
import jax.numpy as jnp

from jaxroute.dispatch.api import Permutation
from jaxroute.parallel import mesh


def dispatch(x: jax.Array, permutation: Permutation) -> jax.Array:
  """Copies every token to the rows of its experts.

  Args:
    x: `[T, D]`. Tokens.
    permutation: from `sort_by_expert`, of T * K assignments.

  Returns:
    `[N, D]`, rows in expert order. Rows past `sum(group_sizes)` belong to no
    expert and are arbitrary; their gradient is not read.

  Raises:
    ValueError: if T does not divide the N assignments.
  """
  n = permutation.permutation.shape[0]
  if x.ndim != 2 or n % max(x.shape[0], 1):
    raise ValueError(
      f"`x` must be [T, D] and T divide the N={n} assignments of `permutation`,"
      f" got {x.shape}. Sort and dispatch the same tokens."
    )
  with jax.named_scope("jaxroute.dispatch"):
    return _dispatch(*mesh.vary_alike((x, permutation)))


def combine(
  rows: jax.Array, weights: jax.Array, permutation: Permutation
) -> jax.Array:
  """Sums what a token's experts returned, by the routing weights.

  Args:
    rows: `[N, D]`. Expert outputs in expert order; rows past
      `sum(group_sizes)` are not read.
    weights: `[T, K]` float32. Routing weights; NaN weights give a NaN token.
    permutation: the one that `dispatch` used.

  Returns:
    `[T, D]`, the dtype of `rows`; sums in float32. A dropped assignment adds
    nothing.

  Raises:
    ValueError: if `rows` and `weights` are not of the N assignments.
  """
  n = permutation.permutation.shape[0]
  if rows.ndim != 2 or rows.shape[0] != n or weights.ndim != 2:
    raise ValueError(
      f"`rows` must be [N={n}, D] and `weights` [T, K], got {rows.shape} and"
      f" {weights.shape}. Pass the permutation that `dispatch` used."
    )
  if weights.size != n or weights.dtype != jnp.float32:
    raise ValueError(
      f"`weights` must be float32 [T, K] with T * K = N = {n}, got"
      f" {weights.dtype} {weights.shape}. Pass `Routing.weights` as they are."
    )
  with jax.named_scope("jaxroute.combine"):
    return _combine(*mesh.vary_alike((rows, weights, permutation)))


def _slots(permutation: Permutation, t: int) -> tuple[jax.Array, jax.Array]:
  """Row of every assignment `[T, K]`, and which are in a group."""
  slots = permutation.inverse_permutation.reshape(t, -1)
  kept = slots < jnp.sum(permutation.group_sizes, dtype=jnp.int32)
  return jnp.where(kept, slots, 0), kept


def _take(x: jax.Array, idx: jax.Array) -> jax.Array:
  return x.at[idx].get(mode="promise_in_bounds")


@jax.custom_vjp
def _dispatch(x: jax.Array, permutation: Permutation) -> jax.Array:
  n, t = permutation.permutation.shape[0], x.shape[0]
  return _take(x, permutation.permutation // max(n // max(t, 1), 1))


def _dispatch_fwd(
  x: jax.Array, permutation: Permutation
) -> tuple[jax.Array, tuple[Permutation, jax.Array]]:
  return _dispatch(x, permutation), (permutation, x[:, :0])


def _dispatch_bwd(
  residuals: tuple[Permutation, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None]:
  permutation, like = residuals
  t, n = like.shape[0], d_rows.shape[0]
  if n == 0:
    return jnp.zeros((t, d_rows.shape[1]), d_rows.dtype), None
  slots, kept = _slots(permutation, t)
  total = jnp.zeros((t, d_rows.shape[1]), jnp.float32)
  for k in range(n // t):
    rows = _take(d_rows, slots[:, k]).astype(jnp.float32)
    total += jnp.where(kept[:, k, None], rows, 0.0)
  return total.astype(d_rows.dtype), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(
  rows: jax.Array, weights: jax.Array, permutation: Permutation
) -> jax.Array:
  t, k = weights.shape
  total = jnp.zeros((t, rows.shape[1]), jnp.float32)
  if rows.shape[0] == 0:
    return total.astype(rows.dtype)
  slots, kept = _slots(permutation, t)
  weights = jnp.where(kept | jnp.isnan(weights), weights, 0.0)
  for i in range(k):
    part = _take(rows, slots[:, i]).astype(jnp.float32)
    part = jnp.where(kept[:, i, None], part, 0.0)
    total += part * weights[:, i, None]
  return total.astype(rows.dtype)


def _combine_fwd(
  rows: jax.Array, weights: jax.Array, permutation: Permutation
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Permutation]]:
  return _combine(rows, weights, permutation), (rows, weights, permutation)


def _combine_bwd(
  residuals: tuple[jax.Array, jax.Array, Permutation], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  rows, weights, permutation = residuals
  t, k = weights.shape
  if rows.shape[0] == 0:
    return jnp.zeros_like(rows), jnp.zeros_like(weights), None
  d_out = d_out.astype(jnp.float32)
  assignment = permutation.permutation
  row = jnp.arange(rows.shape[0], dtype=jnp.int32)
  owned = row < jnp.sum(permutation.group_sizes, dtype=jnp.int32)
  d_rows = _take(d_out, assignment // k)
  d_rows = d_rows * _take(weights.reshape(-1), assignment)[:, None]
  d_rows = jnp.where(owned[:, None], d_rows, 0.0).astype(rows.dtype)
  slots, kept = _slots(permutation, t)
  d_weights = [
    jnp.sum(_take(rows, slots[:, i]).astype(jnp.float32) * d_out, axis=1)
    for i in range(k)
  ]
  return d_rows, jnp.where(kept, jnp.stack(d_weights, axis=1), 0.0), None


_combine.defvjp(_combine_fwd, _combine_bwd)
