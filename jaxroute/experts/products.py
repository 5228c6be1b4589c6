# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What an implementation of the experts provides, and the arithmetic they share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute.experts.params import ExpertParams


class Products(NamedTuple):
  """The products of one implementation. Sums are float32; rows past the groups give 0.

  Attributes:
    matmul: `(lhs, rhs, group_sizes, *, dtype, transpose_rhs=False)`: `[N, D]`
      times `[E, D, F]` by groups, `[N, F]` of that dtype; times the transposes
      of `[E, F, D]` if `transpose_rhs`.
    outer: `(lhs, d_out, group_sizes)`: per group, the transpose of its `lhs`
      rows times its `d_out` rows, `[E, D, F]` of the dtype of `lhs`.
    swiglu: `(x, params, group_sizes, *, keep)`: the output, `[N, D]`, and, if
      `keep`, the projections by `w_gate` and `w_up`, `[N, F]` each, for the
      gradient; else `()`.
    swiglu_gradient: `(x, kept, params, group_sizes, d_out)`: the gradients to
      `x` and `params`.
  """

  matmul: Callable[..., jax.Array]
  outer: Callable[..., jax.Array]
  swiglu: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
  swiglu_gradient: Callable[..., tuple[jax.Array, ExpertParams]]


def of(
  matmul: Callable[..., jax.Array], outer: Callable[..., jax.Array]
) -> Products:
  """The products of an implementation whose SwiGLU is made of the other two.

  Args:
    matmul: as in `Products`.
    outer: as in `Products`.

  Returns:
    `Products`.
  """
  return Products(
    matmul,
    outer,
    functools.partial(_swiglu, matmul),
    functools.partial(_swiglu_gradient, matmul, outer),
  )


def gate_hidden(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up`.

  Args:
    gate: float32.
    up: float32.

  Returns:
    float32.
  """
  return jax.nn.silu(gate) * up


def gate_hidden_pullback(
  gate: jax.Array, up: jax.Array, d_hidden: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`gate_hidden` and its gradient.

  Args:
    gate: floating point, taken as float32; as is `up`.
    up: what the activated gate is multiplied by.
    d_hidden: float32. The gradient to `gate_hidden(gate, up)`.

  Returns:
    `gate_hidden(gate, up)` and the gradients to `gate` and `up`, all float32.
  """
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
  return silu * up, d_gate, d_hidden * silu


def _swiglu(
  matmul: Callable[..., jax.Array],
  x: jax.Array,
  params: ExpertParams,
  group_sizes: jax.Array,
  *,
  keep: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  # The backward pass computes anew what lies between two products.
  @jax.checkpoint
  def down(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> jax.Array:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    hidden = gate_hidden(gate, up).astype(x.dtype)
    return matmul(hidden, w_down, group_sizes, dtype=x.dtype)

  gate = matmul(x, params.w_gate, group_sizes, dtype=x.dtype)
  up = matmul(x, params.w_up, group_sizes, dtype=x.dtype)
  return down(gate, up, params.w_down), (gate, up) if keep else ()


def _swiglu_gradient(
  matmul: Callable[..., jax.Array],
  outer: Callable[..., jax.Array],
  x: jax.Array,
  kept: tuple[jax.Array, ...],
  params: ExpertParams,
  group_sizes: jax.Array,
  d_out: jax.Array,
) -> tuple[jax.Array, ExpertParams]:
  gate, up = kept

  def back(d_out: jax.Array, w: jax.Array) -> jax.Array:
    return matmul(d_out, w, group_sizes, dtype=jnp.float32, transpose_rhs=True)

  hidden, d_gate, d_up = (
    v.astype(x.dtype)
    for v in gate_hidden_pullback(gate, up, back(d_out, params.w_down))
  )
  d_x = back(d_gate, params.w_gate) + back(d_up, params.w_up)
  d_params = ExpertParams(
    w_gate=outer(x, d_gate, group_sizes),
    w_up=outer(x, d_up, group_sizes),
    w_down=outer(hidden, d_out, group_sizes),
  )
  return d_x.astype(x.dtype), d_params
