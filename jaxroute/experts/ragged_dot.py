# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped matrix products where XLA has them: TPU.

The same two functions as in `blocks`. What `jax.lax.ragged_dot` does with rows
past the groups differs by platform, so they are zeroed before and after.
"""

import jax.numpy as jnp
from jax import lax


def _owned(x, group_sizes):
  """Rows past the groups as 0: a NaN there must not meet a product's 0."""
  row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
  return jnp.where(row < jnp.sum(group_sizes), x, 0)


def matmul(dtype, lhs, rhs, group_sizes):
  """`[N, D]` times `[E, D, F]` by groups; see `experts.grouped_matmul`."""
  out = lax.ragged_dot(
    _owned(lhs, group_sizes),
    rhs,
    group_sizes,
    preferred_element_type=jnp.float32,
  )
  return _owned(out, group_sizes).astype(dtype)


def outer(lhs, d_out, group_sizes):
  """`[E, D, F]`: per group, the transpose of its `lhs` rows times `d_out`."""
  dimensions = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(),
  )
  out = lax.ragged_dot_general(
    _owned(lhs, group_sizes),
    _owned(d_out, group_sizes),
    group_sizes,
    dimensions,
    preferred_element_type=jnp.float32,
  )
  return out.astype(lhs.dtype)
