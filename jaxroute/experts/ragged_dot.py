# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts where XLA has them: TPU.

What `jax.lax.ragged_dot` does with rows past the groups differs by platform, so
they are zeroed before and after.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import multilinear
from jaxroute.experts import products


def _owned(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Rows past the groups as 0: a NaN there must not meet a product's 0."""
  row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
  return jnp.where(row < jnp.sum(group_sizes, dtype=jnp.int32), x, 0)


def _ragged_matmul(
  lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: Any
) -> jax.Array:
  out = lax.ragged_dot(
    _owned(lhs, group_sizes),
    rhs,
    group_sizes,
    preferred_element_type=jnp.float32,
  )
  return _owned(out, group_sizes).astype(dtype)


def _ragged_outer(
  lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array, *, dtype: Any
) -> jax.Array:
  dimensions = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
  )
  out = lax.ragged_dot_general(
    _owned(lhs, group_sizes),
    _owned(d_out.astype(lhs.dtype), group_sizes),
    group_sizes,
    dimensions,
    preferred_element_type=jnp.float32,
  )
  return out.astype(dtype)


def _ragged_matmul_back(
  rhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array, *, dtype: Any
) -> jax.Array:
  d_out = d_out.astype(rhs.dtype)
  return _ragged_matmul(d_out, rhs.mT, group_sizes, dtype=dtype)


# Of the rows, the matrices and the products. JAX does not differentiate
# `ragged_dot` twice, and the TPU's compiler takes none with a batch axis.
_FORM = multilinear.Form(
  "ragged_matmul",
  (_ragged_matmul_back, _ragged_outer, _ragged_matmul),
  is_looped=True,
)


def _matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  transpose_rhs: bool = False,
) -> jax.Array:
  rhs = rhs.mT if transpose_rhs else rhs
  dtypes = lhs.dtype, rhs.dtype, jnp.dtype(dtype)
  return multilinear.derivative(_FORM, 2, [lhs, rhs], [group_sizes], dtypes)


def _outer(
  lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
) -> jax.Array:
  dtypes = lhs.dtype, lhs.dtype, d_out.dtype
  return multilinear.derivative(_FORM, 1, [lhs, d_out], [group_sizes], dtypes)


PRODUCTS = products.of(_matmul, _outer)
