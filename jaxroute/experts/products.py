# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What an implementation of the experts provides, and the arithmetic they share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute.experts.params import ExpertParams


class Products(NamedTuple):
  """The products of one implementation. Sums are float32; rows past the groups give 0.

  Attributes:
    matmul: `(lhs, rhs, group_sizes, *, dtype)`: `[N, D]` times `[E, D, F]` by
      groups, `[N, F]` of that dtype.
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
