# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What an implementation of the experts provides, and the arithmetic they share."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxroute.experts.params import ExpertParams


class _Matmul(Protocol):
  def __call__(
    self, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: Any
  ) -> jax.Array: ...


class _Outer(Protocol):
  def __call__(
    self, lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
  ) -> jax.Array: ...


class _SwiGlu(Protocol):
  def __call__(
    self,
    x: jax.Array,
    params: ExpertParams,
    group_sizes: jax.Array,
    *,
    keep: bool,
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]: ...


class _SwiGluGradient(Protocol):
  def __call__(
    self,
    x: jax.Array,
    kept: tuple[jax.Array, ...],
    params: ExpertParams,
    group_sizes: jax.Array,
    d_out: jax.Array,
  ) -> tuple[jax.Array, ExpertParams]: ...


class Products(NamedTuple):
  """The products of one implementation. Sums are float32; rows past the groups give 0.

  Attributes:
    matmul: `[N, D]` times `[E, D, F]` by groups: `[N, F]` of `dtype`.
    outer: per group, the transpose of its `lhs` rows times its `d_out` rows:
      `[E, D, F]` of the dtype of `lhs`.
    swiglu: the layer, `[N, D]`, and, to keep for its gradient, what `silu` is
      applied to and what that is multiplied by, `[N, F]` each; or `()`.
    swiglu_gradient: the gradients to `x` and `params`.
  """

  matmul: _Matmul
  outer: _Outer
  swiglu: _SwiGlu
  swiglu_gradient: _SwiGluGradient


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
