# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The maps of `permute.py` by the kernels for TPU, where XLA would gather from HBM."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import ladder
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu import rows as kernel


def check_can_run(x: jax.Array, row: jax.Array) -> None:
  """Raises `ladder.Refusal` unless the kernels can do this, here, and faster.

  Args:
    x: `[T, D]` or `[N, D]`.
    row: `[T, K]`.

  Raises:
    ladder.Refusal: with the reason.
  """
  t, width = row.shape[0], x.shape[1]
  refused = kernel.unsupported(t, row.size, width, x.dtype)
  if device.gathers_apart():
    refused = "XLA gathers rows on the SparseCore"
  ladder.check_can_run(
    refused, unavailable=device.unavailable, by_name=False, interpret=False
  )


def sum_rows(
  rows: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """As `permute._sum`, in the order of the rows."""
  return kernel.add(
    rows,
    _tokens(assignment, row, num_owned),
    None,
    num_tokens=row.shape[0],
    dtype=dtype,
    interpret=interpret,
  )


def weighted_sum(
  rows: jax.Array,
  weights: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """As `permute._weighted_sum`, in the order of the rows."""
  # A dropped assignment is no row, but its weight may be NaN.
  is_lost = jnp.any(jnp.isnan(weights), axis=1)
  return kernel.add(
    rows,
    _tokens(assignment, row, num_owned),
    _by_row(weights, row),
    num_tokens=row.shape[0],
    dtype=dtype,
    first=jnp.where(is_lost, jnp.nan, jnp.float32(0)),
    interpret=interpret,
  )


def weighted_copy(
  weights: jax.Array,
  d_out: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """As `permute._weighted_copy`."""
  is_owned = jnp.arange(row.size, dtype=jnp.int32) < num_owned
  return kernel.take(
    d_out,
    _tokens(assignment, row, num_owned),
    jnp.where(is_owned, _by_row(weights, row), 0),
    dtype=dtype,
    interpret=interpret,
  )


def products(
  rows: jax.Array,
  d_out: jax.Array,
  assignment: jax.Array,
  row: jax.Array,
  num_owned: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """As `permute._products`."""
  tokens = _tokens(assignment, row, num_owned)
  by_row = kernel.multiply(d_out, rows, tokens, interpret=interpret)
  _, by_assignment = jax.lax.sort(
    (assignment, by_row), num_keys=1, is_stable=False
  )
  is_owned = row < num_owned
  return jnp.where(is_owned, by_assignment.reshape(row.shape), 0).astype(dtype)


def _tokens(
  assignment: jax.Array, row: jax.Array, num_owned: jax.Array
) -> jax.Array:
  """`[N]` int32: the token of every row; T for a row of no expert."""
  t, k = row.shape
  is_owned = jnp.arange(t * k, dtype=jnp.int32) < num_owned
  return jnp.where(is_owned, assignment // k, t)


def _by_row(x: jax.Array, row: jax.Array) -> jax.Array:
  """Numbers of assignments, `[T, K]`, in the order of the rows, `[N]`.

  Sorted there: a gather of numbers takes longer on TPU.
  """
  operands = row.reshape(-1), x.reshape(-1)
  _, by_row = jax.lax.sort(operands, num_keys=1, is_stable=False)
  return by_row
