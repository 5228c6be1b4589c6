# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tokens to the rows of their experts and back, by a permutation.

Both directions gather, forwards and backwards: each assignment has one row, so
the transpose of a gather is the gather by the inverse permutation. XLA's
transpose would be a scatter-add, which is slow and, with atomics, not the same
in every run. On a TPU whose gathers come from HBM row by row, kernels take the
rows in order and keep the tokens in VMEM instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import checks, ladder, multilinear
from jaxroute.dispatch import permute_tpu
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
  x, fix = checks.as_jax(x), "Flatten batch and sequence into T."
  n = _checked_size(permutation)
  checks.check_array("x", x, "[T, D]", "", fix)
  if n % max(x.shape[0], 1):
    raise ValueError(
      f"`x` must be [T, D] and T divide the N={n} assignments of `permutation`,"
      f" got {x.shape}. Sort and dispatch the same tokens."
    )
  t, dtypes = x.shape[0], (x.dtype, x.dtype)
  x, permutation = mesh.vary_alike((x, permutation))
  with jax.named_scope("jaxroute.dispatch"):
    indices = _indices(permutation, t, n // max(t, 1))
    form = _DISPATCH[_has_kernels(x, indices[1])]
    return multilinear.derivative(form, 1, [x], indices, dtypes)


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
    `[T, D]`, the dtype of `rows`; sums in float32, in the order of a token's
    choices, or by the kernel for TPU in that of the experts, which rounds
    otherwise. A dropped assignment adds nothing.

  Raises:
    ValueError: if `rows` and `weights` are not of the N assignments.
  """
  rows, weights = map(checks.as_jax, (rows, weights))
  fix = "Pass the permutation that `dispatch` used."
  n = _checked_size(permutation)
  checks.check_array("rows", rows, "[N, D]", "floating point", fix, N=n)
  fix = "Pass `Routing.weights` as they are."
  checks.check_array("weights", weights, "[T, K]", "float32", fix)
  if weights.size != n:
    raise ValueError(
      f"`weights` must be float32 [T, K] with T * K = N = {n}, got"
      f" {weights.dtype} {weights.shape}. Pass `Routing.weights` as they are."
    )
  dtypes = rows.dtype, weights.dtype, rows.dtype
  rows, weights, permutation = mesh.vary_alike((rows, weights, permutation))
  with jax.named_scope("jaxroute.combine"):
    indices = _indices(permutation, *weights.shape)
    form = _COMBINE[_has_kernels(rows, indices[1])]
    arguments = [rows, weights]
    return multilinear.derivative(form, 2, arguments, indices, dtypes)


def _checked_size(permutation: Permutation) -> int:
  """N, the number of assignments."""
  fix = "Pass what `sort_by_expert` returned."
  checks.check_instance("permutation", permutation, Permutation, fix)
  sizes = {}
  for field, shape in (
    ("permutation", "[N]"),
    ("inverse_permutation", "[N]"),
    ("group_sizes", "[E]"),
  ):
    x = getattr(permutation, field)
    checks.check_array(f"permutation.{field}", x, shape, "int32", fix, **sizes)
    sizes["N"] = permutation.permutation.shape[0]
  return sizes["N"]


def _take(x: jax.Array, idx: jax.Array) -> jax.Array:
  return x.at[idx].get(mode="promise_in_bounds")


def _indices(permutation: Permutation, t: int, k: int) -> tuple[jax.Array, ...]:
  """What the maps below take: the assignment of every row, and back.

  Returns:
    The assignment `[N]` of every row, the row `[T, K]` of every assignment, and
    how many rows belong to an expert.
  """
  return (
    permutation.permutation,
    permutation.inverse_permutation.reshape(t, k),
    jnp.sum(permutation.group_sizes, dtype=jnp.int32),
  )


def _choice(
  rows: jax.Array, row: jax.Array, num_owned: jax.Array, i: int
) -> tuple[jax.Array, jax.Array]:
  """The row `[T, D]` of every token's i-th choice in float32, and which are owned."""
  kept = row[:, i] < num_owned
  return _take(rows, jnp.where(kept, row[:, i], 0)).astype(jnp.float32), kept


def _copy(
  x: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
) -> jax.Array:
  """Every row's token."""
  del num_owned
  return _take(x, assignment // max(row.shape[1], 1)).astype(dtype)


def _sum(
  rows: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
) -> jax.Array:
  """The sum of every token's rows."""
  del assignment
  t, k = row.shape
  total = jnp.zeros((t, rows.shape[1]), jnp.float32)
  for i in range(k):
    part, kept = _choice(rows, row, num_owned, i)
    total += jnp.where(kept[:, None], part, 0.0)
  return total.astype(dtype)


def _weighted_sum(
  rows: jax.Array,
  weights: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
) -> jax.Array:
  """The sum of every token's rows, by weight; NaN for NaN weights."""
  del assignment
  t, k = row.shape
  total = jnp.zeros((t, rows.shape[1]), jnp.float32)
  for i in range(k):
    part, kept = _choice(rows, row, num_owned, i)
    part = jnp.where(kept[:, None], part, 0.0)
    weight = jnp.where(kept | jnp.isnan(weights[:, i]), weights[:, i], 0.0)
    total += part * weight[:, None]
  return total.astype(dtype)


def _weighted_copy(
  weights: jax.Array,
  d_out: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
) -> jax.Array:
  """Every owned row's token by the weight, which is the gradient to the row."""
  tokens = _take(d_out.astype(jnp.float32), assignment // row.shape[1])
  rows = tokens * _take(weights.reshape(-1), assignment)[:, None]
  is_owned = jnp.arange(rows.shape[0], dtype=jnp.int32) < num_owned
  return jnp.where(is_owned[:, None], rows, 0.0).astype(dtype)


def _products(
  rows: jax.Array,
  d_out: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
) -> jax.Array:
  """Every token times its owned rows, which is the gradient to the weights."""
  del assignment
  d_out = d_out.astype(jnp.float32)
  d_weights = []
  for i in range(row.shape[1]):
    part, kept = _choice(rows, row, num_owned, i)
    d_weights.append(jnp.where(kept, jnp.sum(part * d_out, axis=1), 0.0))
  return jnp.stack(d_weights, axis=1).astype(dtype)


def _has_kernels(x: jax.Array, row: jax.Array) -> bool:
  try:
    permute_tpu.check_can_run(x, row)
  except ladder.Refusal:
    return False
  return True


def _on_tpu(
  kernel: Callable[..., jax.Array], plain: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """A map by a kernel, and by XLA where a program is lowered for another platform."""

  def call(*operands: jax.Array, dtype: Any) -> jax.Array:
    def by_kernel(*operands):
      with jax.enable_x64(False):  # as in `ladder.call_kernel`
        return kernel(*operands, dtype=dtype)

    def by_xla(*operands):
      return plain(*operands, dtype=dtype)

    return lax.platform_dependent(*operands, tpu=by_kernel, default=by_xla)

  return call


# `dispatch` is linear in tokens and rows, `combine` in rows, weights and tokens. The
# first form of each is without kernels, the second with them.
_DISPATCH = (
  multilinear.Form("dispatch", (_sum, _copy)),
  multilinear.Form(
    "dispatch", (_on_tpu(permute_tpu.sum_rows, _sum), _copy), is_looped=True
  ),
)
_COMBINE = (
  multilinear.Form("combine", (_weighted_copy, _products, _weighted_sum)),
  multilinear.Form(
    "combine",
    (
      _on_tpu(permute_tpu.weighted_copy, _weighted_copy),
      _on_tpu(permute_tpu.products, _products),
      _on_tpu(permute_tpu.weighted_sum, _weighted_sum),
    ),
    is_looped=True,
  ),
)
