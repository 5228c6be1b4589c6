# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where numbers lie in buffers; the package says what the layouts are.

Three kinds of buffers, all of rows of 128 lanes:

  by expert   Sublane s of register r is row `s * sublane_pitch + r`: the R
              experts of a sublane follow one another, as in the logits. It is
              stored that way, and loaded register by register.
  by columns  Register r of column c begins at row
              `(r * columns + c) * COLUMN_PITCH`. It is stored register by
              register, and loaded dense: one sublane of every column.
  dense       Dense register n begins at row `n * dense_pitch`, with column c in
              the c-th row. It is stored register by register, and loaded by
              columns: one column of 8 dense registers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route.plan import COLUMN_PITCH, Plan
from jaxroute.kernels.tpu.route.refs import Scratch

_LANES, _SUBLANES = device.LANES, device.SUBLANES


def sublane_index() -> jax.Array:
  """Returns the sublane of every element, `[8, 128]` int32."""
  return lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)


def lane_index() -> jax.Array:
  """Returns the lane of every element, `[8, 128]` int32."""
  return lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 1)


def pin(plan: Plan, x: jax.Array) -> jax.Array:
  """Keeps XLA from computing `x` anew, with other bits, where it is used.

  It does so only where the kernel is interpreted: Mosaic has no such freedom,
  and no barrier. It also keeps the stages apart, which XLA would be long in
  compiling as one.
  """
  return lax.optimization_barrier(x) if plan.interpret else x


def divide(expert_idx: jax.Array, divisor: int) -> jax.Array:
  """Divides indices of experts, 0 to 1023, by a constant, rounding down."""
  if divisor & (divisor - 1) == 0:
    exponent = divisor.bit_length() - 1
    return lax.shift_right_logical(
      expert_idx, jnp.full_like(expert_idx, exponent)
    )
  # Exact for indices below 1024: the inverse is too large by less than 2^-20,
  # which adds less than 2^-10 to the quotient, whose distance to the next
  # integer is more.
  return (expert_idx * np.int32(2**20 // divisor + 1)) >> 20


def store_experts(plan: Plan, ref: Ref, first: int, tile: jax.Array) -> None:
  """Writes experts `first`, `first` + 1, ... to a buffer by expert.

  Args:
    plan: the static shape of the call.
    ref: `[8 * sublane_pitch, 128]`. Written.
    first: the expert in the first row of `tile`.
    tile: `[n, 128]`; rows past expert E are left out.
  """
  end = min(first + tile.shape[0], plan.num_experts)
  expert = first
  while expert < end:
    sublane, register = divmod(expert, plan.experts_per_sublane)
    n = min(plan.experts_per_sublane - register, end - expert)
    rows = pl.ds(sublane * plan.sublane_pitch + register, n)
    ref[rows, :] = tile[expert - first :][:n]
    expert += n


def load_experts(plan: Plan, ref: Ref, register: int) -> jax.Array:
  """Reads a register of experts, `[8, 128]`, from a buffer by expert."""
  return ref[pl.ds(register, _SUBLANES, stride=plan.sublane_pitch), :]


def broadcast_bias(plan: Plan, bias_ref: Ref, scratch: Scratch) -> None:
  """Writes `bias` and `bias_row`: -inf for NaN, which so selects nothing."""
  bias = bias_ref[...].reshape(1, plan.num_experts)
  scratch.bias_row[:, : plan.num_experts] = jnp.where(
    jnp.isnan(bias), np.float32(-np.inf), bias
  )
  for first in range(0, plan.num_experts, _LANES):
    row = scratch.bias_row[:, first : first + _LANES]
    tile = jnp.broadcast_to(row, (_LANES, _LANES)).T
    store_experts(plan, scratch.bias, first, tile)


def column_slice(plan: Plan, register: int, column: int) -> pl.Slice | slice:
  """Rows of a column's register in a buffer by columns."""
  return pl.ds((register * plan.columns + column) * COLUMN_PITCH, _SUBLANES)


def across_columns(plan: Plan, register: int, sublane: int) -> pl.Slice | slice:
  """Rows of one sublane of every column's register in a buffer by columns."""
  first = register * plan.columns * COLUMN_PITCH + sublane
  return pl.ds(first, plan.columns, stride=COLUMN_PITCH)


def load_dense(plan: Plan, ref: Ref, register: int, sublane: int) -> jax.Array:
  """Reads one sublane of every column, `[columns, 128]`: dense."""
  return pin(plan, ref[across_columns(plan, register, sublane), :])


def dense_slice(plan: Plan, register: int) -> pl.Slice | slice:
  """Rows of a dense register in a dense buffer."""
  return pl.ds(register * plan.dense_pitch, plan.columns)


def load_column(plan: Plan, ref: Ref, first: int, column: int) -> jax.Array:
  """Reads a column of the 8 dense registers from `first` on, `[8, 128]`."""
  start = first * plan.dense_pitch + column
  return pin(plan, ref[pl.ds(start, _SUBLANES, stride=plan.dense_pitch), :])


def segment_register(sublane: int, segment: int) -> int:
  """The dense register with what belongs to a segment of a sublane."""
  return segment * _SUBLANES + sublane


def group_of(plan: Plan, sublane: int, segment: int) -> int:
  """The expert group that a segment of a sublane is in."""
  part = sublane * plan.segments_per_sublane + segment
  parts = _SUBLANES * plan.segments_per_sublane
  return part * plan.config.num_groups // parts
