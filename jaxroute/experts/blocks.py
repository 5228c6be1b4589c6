# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped matrix products from dense ones over blocks of rows.

A `fold` walks the rows in blocks that cover every group exactly: one expert's at a
time (`tiles`) or those of many at once (`rounds`). What is done with a block is
written once, here and in `experts`; R and the axes before it are the block's.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxroute import dispatch


class Block(Protocol):
  """Rows of one expert, `[R, ...]`, or of G experts, `[G, R, ...]`."""

  def read(self, x: jax.Array) -> jax.Array:
    """The block's rows of `x`, `[N, ...]`; 0 where it has none."""
    ...

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x` with the block's rows replaced."""
    ...

  def of(self, w: jax.Array) -> jax.Array:
    """What `w`, `[E, ...]`, holds for the block's experts."""
    ...

  def add(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """`w`, `[E, ...]`, with a value added for each of the block's experts."""
    ...


Body = Callable[[Block, Any], Any]
# (body, carry, group_sizes, number of rows) -> carry
Fold = Callable[[Body, Any, jax.Array, int], Any]

# A product of the last two axes with float32 sums and a float32 result.
dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
  """Zeros, `[*shape]`, that vary over the mesh like another array, as loop carries must."""
  return dispatch.vary_alike((jnp.zeros(shape, dtype), like))[0]


def matmul(
  fold: Fold,
  dtype: Any,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> jax.Array:
  """`[N, D]` times `[E, D, F]` by groups; see `experts.grouped_matmul`."""
  n = lhs.shape[0]

  def body(block, out):
    return block.write(out, dot(block.read(lhs), block.of(rhs)))

  out = zeros((n, rhs.shape[2]), dtype, lhs)
  return fold(body, out, group_sizes, n)


def outer(
  fold: Fold, lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
) -> jax.Array:
  """`[E, D, F]`: per group, the transpose of its `lhs` rows times `d_out`."""

  def body(block, total):
    return block.add(total, dot(block.read(lhs).mT, block.read(d_out)))

  shape = (group_sizes.shape[0], lhs.shape[1], d_out.shape[1])
  total = zeros(shape, jnp.float32, lhs)
  return fold(body, total, group_sizes, lhs.shape[0]).astype(lhs.dtype)
