# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts, from dense ones over blocks of rows.

`tiled` and `batched` walk the rows in blocks that cover every group exactly:
one expert's rows at a time, or those of many experts at once. What is done with
a block is written once, here. R is the number of a block's rows.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxroute.experts import products
from jaxroute.experts.params import ExpertParams
from jaxroute.parallel import mesh


class Block(Protocol):
  """Rows of one expert, `[R, ...]`, or of B experts, `[B, R, ...]`."""

  def read(self, x: jax.Array) -> jax.Array:
    """The block's rows of `x`, `[N, ...]`; 0 where it has none."""
    ...

  def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x` with the block's rows replaced."""
    ...

  def gather_weights(self, w: jax.Array) -> jax.Array:
    """What `w`, `[E, ...]`, holds for the block's experts."""
    ...

  def accumulate(self, w: jax.Array, value: jax.Array) -> jax.Array:
    """`w`, `[E, ...]`, with a value added for each of the block's experts."""
    ...


Body = Callable[[Any, Any], Any]
# (body of a block and the carry, carry, group_sizes, number of rows) -> carry
ForEachBlock = Callable[[Body, Any, jax.Array, int], Any]

# A product of the last two axes with float32 sums and a float32 result.
dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
  """Zeros that vary over the mesh like another array, as loop carries must.

  Args:
    shape: of the zeros.
    dtype: of the zeros.
    like: the other array.

  Returns:
    `[*shape]`.
  """
  return mesh.vary_alike((jnp.zeros(shape, dtype), like))[0]


def products_over(for_each_block: ForEachBlock) -> products.Products:
  """The products of an implementation that walks the rows in blocks.

  Args:
    for_each_block: folds a body over blocks that cover every group exactly.

  Returns:
    Its `Products`.
  """
  return products.Products(
    matmul=functools.partial(_matmul, for_each_block),
    outer=functools.partial(_outer, for_each_block),
    swiglu=functools.partial(_swiglu, for_each_block),
    swiglu_gradient=functools.partial(_swiglu_gradient, for_each_block),
  )


def _matmul(
  for_each_block: ForEachBlock,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  transpose_rhs: bool = False,
) -> jax.Array:
  n = lhs.shape[0]
  rhs = rhs.mT if transpose_rhs else rhs

  def body(block: Block, out: jax.Array) -> jax.Array:
    return block.write(out, dot(block.read(lhs), block.gather_weights(rhs)))

  out = zeros((n, rhs.shape[2]), dtype, lhs)
  return for_each_block(body, out, group_sizes, n)


def _outer(
  for_each_block: ForEachBlock,
  lhs: jax.Array,
  d_out: jax.Array,
  group_sizes: jax.Array,
) -> jax.Array:
  def body(block: Block, total: jax.Array) -> jax.Array:
    return block.accumulate(total, dot(block.read(lhs).mT, block.read(d_out)))

  shape = (group_sizes.shape[0], lhs.shape[1], d_out.shape[1])
  total = zeros(shape, jnp.float32, lhs)
  total = for_each_block(body, total, group_sizes, lhs.shape[0])
  return total.astype(lhs.dtype)


def _swiglu(
  for_each_block: ForEachBlock,
  x: jax.Array,
  params: ExpertParams,
  group_sizes: jax.Array,
  *,
  keep: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """One pass over the rows: what lies between two products stays in cache."""

  def body(block: Block, carry: Any) -> Any:
    out, kept = carry
    rows = block.read(x)
    gate = dot(rows, block.gather_weights(params.w_gate))
    up = dot(rows, block.gather_weights(params.w_up))
    hidden = products.gate_hidden(gate, up).astype(x.dtype)
    rows_out = dot(hidden, block.gather_weights(params.w_down))
    if keep:
      kept = block.write(kept[0], gate), block.write(kept[1], up)
    return block.write(out, rows_out), kept

  n, f = x.shape[0], params.w_gate.shape[2]
  kept = (zeros((n, f), x.dtype, x),) * 2 if keep else ()
  carry = zeros(x.shape, x.dtype, x), kept
  return for_each_block(body, carry, group_sizes, n)


def _swiglu_gradient(
  for_each_block: ForEachBlock,
  x: jax.Array,
  kept: tuple[jax.Array, ...],
  params: ExpertParams,
  group_sizes: jax.Array,
  d_out: jax.Array,
) -> tuple[jax.Array, ExpertParams]:
  gate, up = kept

  def body(block: Block, carry: Any) -> Any:
    d_x, d_params = carry
    weights = jax.tree.map(block.gather_weights, params)
    rows, d_rows = block.read(x), block.read(d_out)
    d_hidden = dot(d_rows, weights.w_down.mT)
    hidden, d_gate, d_up = (
      v.astype(x.dtype)
      for v in products.gate_hidden_pullback(
        block.read(gate), block.read(up), d_hidden
      )
    )
    d_x = block.write(
      d_x, dot(d_gate, weights.w_gate.mT) + dot(d_up, weights.w_up.mT)
    )
    d_weights = ExpertParams(
      w_gate=dot(rows.mT, d_gate),
      w_up=dot(rows.mT, d_up),
      w_down=dot(hidden.mT, d_rows),
    )
    return d_x, jax.tree.map(block.accumulate, d_params, d_weights)

  totals = jax.tree.map(lambda w: zeros(w.shape, jnp.float32, x), params)
  carry = zeros(x.shape, x.dtype, x), totals
  d_x, totals = for_each_block(body, carry, group_sizes, x.shape[0])
  return d_x, jax.tree.map(lambda t: t.astype(x.dtype), totals)
