# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The calls of the sort kernels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, registers
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.sort.matrix import build_matrix, multiply, write_rows
from jaxroute.kernels.tpu.sort.plan import (
  BF16_SUBLANES,
  Inputs,
  Plan,
  Scratch,
  allocate_scratch,
  make_plan,
)

_LANES = device.LANES
# Counts are float32: exact below this many assignments, T * K.
_MAX_ASSIGNMENTS = 2**24
# A token's assignments to no expert, doubled, are exact in bfloat16 up to 256.
_MAX_TOP_K = 128


def unsupported(num_tokens: int, top_k: int) -> str | None:
  """Says why the kernels cannot count so many assignments exactly.

  Args:
    num_tokens: T.
    top_k: K.

  Returns:
    The reason, for an error message; None if they can.
  """
  if num_tokens * top_k >= _MAX_ASSIGNMENTS:
    return (
      f"the TPU kernel counts fewer than {_MAX_ASSIGNMENTS} assignments, got"
      f" {num_tokens} x {top_k}"
    )
  if top_k > _MAX_TOP_K:
    return f"K is at most {_MAX_TOP_K} in the TPU kernel, got {top_k}"
  return None


@functools.partial(jax.jit, static_argnames=("num_experts", "interpret"))
def count_assignments(
  expert_idx: jax.Array, *, num_experts: int, interpret: Any = False
) -> jax.Array:
  """Counts the assignments of every expert.

  Args:
    expert_idx: `[T, K]` int32 from `[0, E]`, distinct within a token below E.
      T and K are not `unsupported`.
    num_experts: E; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[E + 1]` int32; the last for index E.
  """
  if expert_idx.size == 0:
    return jnp.zeros(num_experts + 1, jnp.int32)
  plan = make_plan(expert_idx, num_experts, interpret)
  counts = _call(
    _count_kernel,
    "jaxroute_count",
    plan,
    Inputs(expert_idx=expert_idx.T),
    jax.ShapeDtypeStruct(plan.experts_shape, jnp.float32),
    plan.experts_spec,
    interpret,
  )[:, 0].astype(jnp.int32)
  return jnp.append(counts[:num_experts], counts[plan.unassigned])


@functools.partial(jax.jit, static_argnames=("interpret",))
def assignment_rows(
  expert_idx: jax.Array, start: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """Numbers the assignments of every expert, in order, from `start` on.

  Args:
    expert_idx: as in `count_assignments`.
    start: `[E + 1]` int32. First row of every expert, and of index E.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[T, K]` int32, `start[expert_idx]` plus the rank within the expert.
  """
  if expert_idx.size == 0:
    return jnp.zeros(expert_idx.shape, jnp.int32)
  num_experts = start.shape[0] - 1
  plan = make_plan(expert_idx, num_experts, interpret)
  gap = jnp.zeros(plan.unassigned - num_experts, jnp.int32)
  unassigned = jnp.broadcast_to(start[num_experts:], (BF16_SUBLANES,))
  first_row = jnp.concatenate([start[:num_experts], gap, unassigned])
  first_row = first_row.astype(jnp.float32)[:, None]
  return _call(
    _rows_kernel,
    "jaxroute_rows",
    plan,
    Inputs(
      expert_idx=expert_idx.T,
      first_row=jnp.broadcast_to(first_row, plan.experts_shape),
    ),
    jax.ShapeDtypeStruct((plan.top_k, plan.num_tokens), jnp.int32),
    plan.choices_spec,
    interpret,
  ).T


def _call(
  kernel: Callable[[Plan, Inputs, Ref, Scratch], None],
  name: str,
  plan: Plan,
  inputs: Inputs,
  out: jax.ShapeDtypeStruct,
  out_spec: pl.BlockSpec,
  interpret: Any,
) -> jax.Array:
  """Calls a kernel on all grid blocks of tokens, one after the other."""
  counts_only = inputs.first_row is None
  # Inside `jax.shard_map` the operands vary alike, and so does the result.
  varying = jax.typeof(inputs.expert_idx).manual_axis_type
  return pl.pallas_call(
    functools.partial(kernel, plan),
    grid=(plan.grid,),
    in_specs=[
      Inputs(
        expert_idx=plan.choices_spec,
        first_row=None if counts_only else plan.experts_spec,
      )
    ],
    out_specs=out_spec,
    out_shape=jax.ShapeDtypeStruct(
      out.shape, out.dtype, manual_axis_type=varying
    ),
    scratch_shapes=[allocate_scratch(plan)],
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    name=name,
  )(inputs)


def _count_kernel(
  plan: Plan, inputs: Inputs, counts_ref: Ref, scratch: Scratch
) -> None:
  """Adds the assignments of a grid block to `counts_ref`, on all lanes."""

  @pl.when(pl.program_id(0) == 0)
  def _start() -> None:
    counts_ref[...] = jnp.zeros_like(counts_ref)

  build_matrix(plan, inputs, scratch)
  halves = jnp.full((plan.product_tokens, _LANES), 0.5, jnp.bfloat16)

  def count_product(product: Any) -> None:
    counts_ref[...] += multiply(plan, product, halves, scratch)

  registers.unroll(plan.products, count_product, plan.interpret)


def _rows_kernel(
  plan: Plan, inputs: Inputs, rows_ref: Ref, scratch: Scratch
) -> None:
  """Writes the rows of a grid block and moves `next_row` past them."""

  @pl.when(pl.program_id(0) == 0)
  def _start() -> None:
    scratch.next_row[...] = inputs.first_row[...]

  build_matrix(plan, inputs, scratch)
  square = plan.product_tokens, plan.product_tokens
  token = lax.broadcasted_iota(jnp.int32, square, 0)
  up_to_token = lax.broadcasted_iota(jnp.int32, square, 1)
  triangle = jnp.where(token <= up_to_token, 0.5, 0.0).astype(jnp.bfloat16)

  def number_product(product: Any) -> None:
    counts = multiply(plan, product, triangle, scratch)
    for column in range(plan.columns):
      write_rows(plan, product, column, counts, rows_ref, scratch)
    # The counts up to the last token are those of the whole product.
    totals = counts[:, plan.product_tokens - 1 :]
    scratch.next_row[...] += jnp.broadcast_to(totals, plan.experts_shape)

  registers.unroll(plan.products, number_product, plan.interpret)
