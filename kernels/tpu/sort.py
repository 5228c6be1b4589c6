# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counting sort of expert indices on TPU: the row of every assignment, no sort.

The row of an assignment in expert order is its expert's first row plus its rank
among that expert's assignments. A rank is a running count, and the MXU counts: as
many tokens as it is wide are a 0/1 matrix [experts, tokens], times a triangle of
ones. XLA would sort, or gather and scatter one number at a time.

Experts are on sublanes, 128 tokens on lanes. The 0/1 matrix is built from bits:
one word per token and sublane holds 32 experts, of which a shift and a mask make
two rows of bfloat16 at once. Expert e is row e of the matrix, so that it is
bit (e / 16) % 16 + 16 (e % 2) of word e / 256 on sublane (e / 2) % 8. Assignments
to no expert (index E) may share a token, so they are counted in a row of their own.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, registers

# Counts are float32: exact below this many assignments, T * K.
_MAX_ASSIGNMENTS = 2**24
# A token's assignments to no expert, doubled, are exact in bfloat16 up to 256.
_MAX_TOP_K = 128
_LANES, _SUBLANES = device.LANES, device.SUBLANES
# Tokens of one block.
_BLOCK = 2048
# Of a register of bfloat16, and of the experts that one bit of all words makes.
_PACKED = 16
_WORD = 256
# bfloat16 2.0 in both halves of a word.
_TWOS = np.int32(0x40004000)


def unsupported(num_tokens: int, top_k: int) -> str | None:
  """Why the kernels cannot count so many assignments exactly, or None if they can.

  Args:
    num_tokens: T.
    top_k: K.

  Returns:
    The reason, for an error message.
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
    interpret: what `pallas_call` takes.

  Returns:
    `[E + 1]` int32; the last for index E.
  """
  t, k = expert_idx.shape
  if t * k == 0:
    return jnp.zeros(num_experts + 1, jnp.int32)
  padded = _padded(num_experts)
  counts = _call(
    _count_kernel,
    [expert_idx.T],
    jax.ShapeDtypeStruct((padded + _PACKED, _LANES), jnp.float32),
    num_experts,
    interpret,
  )[:, 0].astype(jnp.int32)
  return jnp.append(counts[:num_experts], counts[padded])


@functools.partial(jax.jit, static_argnames=("interpret",))
def assignment_rows(
  expert_idx: jax.Array, start: jax.Array, *, interpret: Any = False
) -> jax.Array:
  """Numbers the assignments of every expert, in order, from `start` on.

  Args:
    expert_idx: as in `count_assignments`.
    start: `[E + 1]` int32. First row of every expert, and of index E.
    interpret: what `pallas_call` takes.

  Returns:
    `[T, K]` int32, `start[expert_idx]` plus the rank within the expert.
  """
  t, k = expert_idx.shape
  if t * k == 0:
    return jnp.zeros((t, k), jnp.int32)
  num_experts = start.shape[0] - 1
  gap = jnp.zeros(_padded(num_experts) - num_experts, jnp.int32)
  rest = jnp.broadcast_to(start[num_experts:], (_PACKED,))
  start = jnp.concatenate([start[:num_experts], gap, rest])
  start = jnp.broadcast_to(
    start.astype(jnp.float32)[:, None], (start.shape[0], _LANES)
  )
  return _call(
    _rows_kernel,
    [expert_idx.T, start],
    jax.ShapeDtypeStruct((k, t), jnp.int32),
    num_experts,
    interpret,
  ).T


def _padded(num_experts):
  return pl.cdiv(num_experts, _PACKED) * _PACKED


def _call(kernel, operands, out, num_experts, interpret):
  """Calls a kernel on blocks of tokens; what is not [K, T] is there whole."""
  k, t = operands[0].shape
  columns = _columns(interpret)
  width = columns * _LANES
  products = min(_BLOCK, pl.cdiv(t, width) * width) // width
  block = products * width
  chosen = pl.cdiv(k, _SUBLANES) * _SUBLANES, block
  experts = _padded(num_experts) + _PACKED
  buffers = {
    "place": (chosen, jnp.int32),
    "bit": (chosen, jnp.int32),
    "row": (chosen, jnp.int32),
    "earlier": (chosen, jnp.int32),
    "mask": ((columns, products, experts // 2, _LANES), jnp.int32),
    "own": ((columns, products, 1, _LANES), jnp.float32),
    "base": ((experts, _LANES), jnp.float32),
  }

  def spec(x):
    if x.shape == (k, t):
      return pl.BlockSpec((k, block), lambda i: (0, i))
    return pl.BlockSpec(x.shape, lambda i: (0, 0))

  def body(*refs):
    scratch = dict(zip(buffers, refs[-len(buffers) :], strict=True))
    kernel(
      num_experts,
      t,
      bool(interpret),
      *refs[: -len(buffers)],
      types.SimpleNamespace(**scratch),
    )

  # Inside `jax.shard_map` the operands vary alike, and so do the results.
  varying = jax.typeof(operands[0]).manual_axis_type
  return pl.pallas_call(
    body,
    grid=(pl.cdiv(t, block),),
    in_specs=[spec(x) for x in operands],
    out_specs=spec(out),
    out_shape=jax.ShapeDtypeStruct(
      out.shape, out.dtype, manual_axis_type=varying
    ),
    scratch_shapes=[pltpu.VMEM(*buffer) for buffer in buffers.values()],
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    name="jaxroute" + kernel.__name__.removesuffix("_kernel"),
  )(*operands)


def _columns(interpret):
  """Columns of 128 tokens in a product: 2, or 1 on MXUs 128 wide, before v6e.

  Those would multiply the empty quarter of a larger triangle as well.
  """
  found = device.generation()
  return 2 if interpret or found is None or found >= 6 else 1


def _count_kernel(num_experts, tokens, interpret, idx_ref, counts_ref, buf):
  step = pl.program_id(0)

  @pl.when(step == 0)
  def _start():
    counts_ref[...] = jnp.zeros_like(counts_ref)

  left = tokens - step * idx_ref.shape[1]
  _fill_mask(num_experts, left, interpret, idx_ref, buf)
  width = buf.mask.shape[0] * _LANES
  halves = jnp.full((width, _LANES), 0.5, jnp.bfloat16)

  def product(i):
    counts_ref[...] += _product(buf, i, halves)

  registers.unroll(buf.mask.shape[1], product, interpret)


def _rows_kernel(
  num_experts, tokens, interpret, idx_ref, start_ref, rows_ref, buf
):
  step = pl.program_id(0)

  @pl.when(step == 0)
  def _start():
    buf.base[...] = start_ref[...]

  left = tokens - step * idx_ref.shape[1]
  _fill_mask(num_experts, left, interpret, idx_ref, buf)
  columns = buf.mask.shape[0]
  width = columns * _LANES
  token = lax.broadcasted_iota(jnp.int32, (width, width), 0)
  up_to = lax.broadcasted_iota(jnp.int32, (width, width), 1)
  halves = jnp.where(token <= up_to, 0.5, 0.0).astype(jnp.bfloat16)

  def product(i):
    counts = _product(buf, i, halves)
    for c in range(columns):
      _gather_rows(i, c, counts, rows_ref, buf)
    total = counts[:, width - 1 :]
    buf.base[...] += jnp.broadcast_to(total, buf.base.shape)

  registers.unroll(buf.mask.shape[1], product, interpret)


def _product(buf, i, counted):
  mask = jnp.concatenate(
    [buf.mask[c, i] for c in range(buf.mask.shape[0])], axis=1
  )
  return jnp.dot(
    pltpu.bitcast(mask, jnp.bfloat16),
    counted,
    preferred_element_type=jnp.float32,
  )


def _fill_mask(num_experts, left, interpret, idx_ref, buf):
  """2 where a token, of those that are left, chose the row's expert, else 0."""
  k = idx_ref.shape[0]
  chosen = idx_ref[...]
  here = lax.broadcasted_iota(jnp.int32, chosen.shape, 1) < left
  nowhere = here & (chosen == num_experts)
  # What is past the last token is any bits.
  chosen = jnp.where(here & (chosen < num_experts), chosen, 0)
  shift = ((chosen >> 4) & 15) + ((chosen & 1) << 4)
  bit = lax.shift_left(jnp.ones_like(shift), shift)
  some = pl.ds(0, k)
  buf.bit[some, :] = jnp.where(here & ~nowhere, bit, 0)
  buf.place[some, :] = ((chosen >> 8) << 3) + ((chosen >> 1) & 7)
  buf.row[some, :] = jnp.where(nowhere, -1, chosen)
  buf.earlier[some, :] = nowhere.astype(jnp.int32)

  def product(i):
    for c in range(buf.mask.shape[0]):
      _fill_column(k, i, c, buf)

  registers.unroll(buf.mask.shape[1], product, interpret)


def _tokens(i, c, buf):
  """Where column c of product i is in a block."""
  return pl.ds((i * buf.mask.shape[0] + c) * _LANES, _LANES)


def _fill_column(k, i, c, buf):
  """The mask of 128 tokens."""
  tokens = _tokens(i, c, buf)
  experts = buf.base.shape[0] - _PACKED
  sublane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)
  for first in range(0, experts, _WORD):
    word = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
    for n in range(k):
      place = jnp.broadcast_to(buf.place[pl.ds(n, 1), tokens], word.shape)
      mine = place == sublane + first // 32
      word |= jnp.where(mine, buf.bit[pl.ds(n, 1), tokens], 0)
    for row in range(first, min(first + _WORD, experts), _PACKED):
      by = 14 - (row - first) // _PACKED
      shifted = lax.shift_left(word, jnp.full_like(word, max(by, 0)))
      if by < 0:
        shifted = lax.shift_right_logical(word, jnp.full_like(word, -by))
      buf.mask[c, i, pl.ds(row // 2, _SUBLANES), :] = shifted & _TWOS

  earlier = jnp.zeros((1, _LANES), jnp.int32)
  for n in range(k):
    nowhere = buf.earlier[pl.ds(n, 1), tokens]
    buf.earlier[pl.ds(n, 1), tokens] = earlier
    earlier += nowhere
  buf.own[c, i] = earlier.astype(jnp.float32)
  twice = jnp.broadcast_to((2 * earlier).astype(jnp.float32), (_PACKED, _LANES))
  buf.mask[c, i, pl.ds(experts // 2, _SUBLANES), :] = pltpu.bitcast(
    twice.astype(jnp.bfloat16), jnp.int32
  )


def _gather_rows(i, c, counts, rows_ref, buf):
  """The rows of the chosen experts of 128 tokens, out of those of all experts."""
  k, counts = rows_ref.shape[0], counts[:, c * _LANES :][:, :_LANES]
  tokens = _tokens(i, c, buf)
  experts = buf.base.shape[0] - _PACKED
  registers = experts // _SUBLANES

  def ends(start, n=_SUBLANES):
    """The row after the last one that is taken up to each token."""
    rows = pl.ds(start, n)
    return buf.base[rows, :] + counts[start : start + n]

  own = buf.own[c, i]
  nowhere = jnp.broadcast_to(ends(experts, 1) - own, (_SUBLANES, _LANES))
  for first in range(0, k, _SUBLANES):
    some = pl.ds(first, _SUBLANES)
    row = buf.row[some, tokens]
    found = registers.select_register(
      lambda i: ends(i * _SUBLANES),
      row >> 3,
      row & (_SUBLANES - 1),
      registers,
    )
    found = found.astype(jnp.int32) - 1
    last = nowhere.astype(jnp.int32) + buf.earlier[some, tokens]
    found = jnp.where(row < 0, last, found)
    n = min(_SUBLANES, k - first)
    rows_ref[pl.ds(first, n), tokens] = found[:n]
