# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Operands, results and shared memory of the routing kernel, by name."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxroute.kernels.gpu.mosaic import plgpu
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.threads import THREADS, Ref

# Pallas aligns every buffer to so many bytes, and reserves some for reductions.
_ALIGNMENT = 1024
_REDUCTION_BYTES = 2048

DISTANCE_BITS = 5
"""Bits by which the histogram counts a distance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
  """In global memory. T and E are padded.

  Attributes:
    rows: `[T * lanes, part]`. The logits, a row for each thread.
    logits: `[T * E]`. The same.
    expert_bias: `[E]` float32, not padded; None if there is none.
    token_mask: `[T]` bool, not padded; None if there is none.
    load: `[E]` int32, which blocks add to; None if there is one block only.
    histogram: `[16 * E]` int32, by bin, which blocks add to; None without a histogram,
      or if there is one block only.
    span_counts: `[spans * count_pitch]` int32, which blocks add to; see
      `order.SPANS`. None without a rank, or if there is one block only.
  """

  rows: Ref
  logits: Ref
  expert_bias: Ref = None
  token_mask: Ref = None
  load: Ref = None
  histogram: Ref = None
  span_counts: Ref = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """In global memory.

  Attributes:
    expert_idx: `[T * K]` int32.
    weights: `[T * K]` float32.
    cutoff: `[T]` float32.
    token_mask: `[T]` bool.
    load: `[E]` int32, if there is one block only.
    histogram: `[16 * E]` int32, by bin; None without a histogram, or if there is more
      than one block.
    chosen: `[T * K]`, of the dtype of the logits; None if not asked for.
    rank: `[T * K]` int32. The rank of an assignment within its expert and tile; the
      complement, which is negative, of that among the assignments of the tile that
      are not counted. If there is one block only, these of all are ranks, too. None
      if not asked for.
    counts: `[tiles * count_pitch]` int32: of a tile, assignments of every expert, and
      at E those that are not counted. None without a rank, or if there is one block
      only.
  """

  expert_idx: Ref
  weights: Ref
  cutoff: Ref
  token_mask: Ref
  load: Ref = None
  histogram: Ref = None
  chosen: Ref = None
  rank: Ref = None
  counts: Ref = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
  """In shared memory. Rows are those of the block.

  Attributes:
    logits: `[chunks, 128, width]`, of their dtype.
    selection_scores: like `logits`, float32; the same memory if these are. For a
      moment the exponentials of a softmax.
    expert_bias: `[lanes * bias_pitch]` float32, by parts; None if there is none.
    lists: `[groups * length * 128]` float32. The largest of the groups of a row.
    bits: `[chunks * 128]` int32, 128 more with a rank. A bit for every expert of a
      row: whether its score is not below, or is above, the K-th largest. Then, for
      an expert of a chunk and a warp, a bit for every row that chose it; and behind
      those of all chunks, for a warp, a bit for every row that is not counted.
    distances: `[5 * chunks * 128]` int32. A bit for every expert of a row, five times:
      what `histogram` counts of its distance to the cutoff. Then, like `bits`, a bit
      for every row. None without a histogram.
    softmax_sums: `[2 * 128]` float32. The largest logit of a row's token and the sum
      of the exponentials.
    chosen: `[tile_tokens * slots]` int32. By token, the chosen experts in order of
      their index; then with their place in order of their score. With spare lanes
      128 more, which these read.
    is_counted: `[tile_tokens]` int32. Whether a token is: 1, 0 or, for those of
      another block, -1.
    ranks: `[4 * (E + 1)]` int32. Assignments of an expert in the warps before one;
      None without a rank.
    arrived: barriers of the chunks.
  """

  logits: Ref
  chosen: Ref
  is_counted: Ref
  bits: Ref
  arrived: Ref
  selection_scores: Ref = None
  expert_bias: Ref = None
  lists: Ref = None
  distances: Ref = None
  softmax_sums: Ref = None
  ranks: Ref = None


def buffer_shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shapes and dtypes of the buffers that a call needs, but for the barriers."""
  chunk = plan.chunks, THREADS, plan.width
  lists = plan.groups * plan.group_list_length * THREADS
  spare = THREADS if plan.has_spare_lanes else 0
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {
    "logits": (chunk, plan.dtype),
    "chosen": ((plan.tile_tokens * plan.slots + spare,), jnp.int32),
    "is_counted": ((plan.tile_tokens,), jnp.int32),
    "bits": (((plan.chunks + plan.with_rank) * THREADS,), jnp.int32),
  }
  if plan.dtype != jnp.float32:
    shapes["selection_scores"] = chunk, jnp.float32
  if plan.has_bias:
    shapes["expert_bias"] = (plan.lanes * plan.bias_pitch,), jnp.float32
  if lists:
    shapes["lists"] = (lists,), jnp.float32
  if plan.config.histogram:
    size = DISTANCE_BITS * plan.chunks * THREADS
    shapes["distances"] = (size,), jnp.int32
  if plan.needs_softmax_sums:
    shapes["softmax_sums"] = (2 * THREADS,), jnp.float32
  if plan.with_rank:
    shapes["ranks"] = (4 * (plan.num_experts + 1),), jnp.int32
  return shapes


def shared_bytes(plan: Plan) -> int:
  """Bytes of shared memory that Pallas asks for: of buffers, barriers and its own."""
  buffers = (
    math.prod(shape) * jnp.dtype(dtype).itemsize
    for shape, dtype in buffer_shapes(plan).values()
  )
  barriers = 8 * plan.chunks
  return sum(map(_aligned, buffers)) + barriers + _REDUCTION_BYTES


def _aligned(size: int) -> int:
  return -(-size // _ALIGNMENT) * _ALIGNMENT


def scratch_types(plan: Plan) -> dict[str, Any]:
  """The buffers, as Pallas takes them."""
  types = {
    name: plgpu.SMEM(shape, dtype, transforms=_transforms(plan, name, dtype))
    for name, (shape, dtype) in buffer_shapes(plan).items()
  }
  return types | {"arrived": plgpu.Barrier(num_barriers=plan.chunks)}


def _transforms(plan: Plan, name: str, dtype: Any) -> tuple[Any, ...]:
  """How a copy lays out a chunk: by rows, so that threads read from all banks."""
  if name not in ("logits", "selection_scores"):
    return ()
  row_bytes = plan.width * jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((8, plan.width)),
    plgpu.SwizzleTransform(row_bytes),
  )
