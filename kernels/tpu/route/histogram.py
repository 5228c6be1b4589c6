# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counts how far experts are from cutoffs, inside the routing kernel.

The meaning is that of `jaxroute.routing.bias_histogram`, bin for bin: sixteen
per expert, eight on either side of zero, each eight times as wide as the one
before. A vector register holds 8 experts x 128 tokens, and its numbers are
counted where they are:

  1. A distance becomes a 1 in one of eight 4-bit fields of a word, by its
     exponent. The words of a block's columns are added, and those below zero
     once more.
  2. The fields of a block, 8 at most, are spread to the bytes of four words,
     which `BLOCKS_PER_FLUSH` blocks add to.
  3. The bytes are summed over the tokens on the lanes and added to the result.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import bits, layout
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import Scratch

_LANES, _SUBLANES = device.LANES, device.SUBLANES
_NAN = np.float32(np.nan)
_INF = np.float32(np.inf)

BINS = types.HISTOGRAM_BINS
_SIDE = BINS // 2

_MAX_BYTE = 255
_MAX_COLUMNS = 8
BLOCKS_PER_FLUSH = _MAX_BYTE // _MAX_COLUMNS
"""Blocks that the bytes have room for: each adds 8 at most."""

_OCTAVES, _FIRST_END = types.HISTOGRAM_OCTAVES, types.HISTOGRAM_FIRST_END
_LOWEST_OCTAVE = _FIRST_END - _OCTAVES
_TOP_OCTAVE = _FIRST_END + _OCTAVES * (_SIDE - 1) - 1
# The scale takes the top octave, and all beyond it, to infinity, of the largest
# exponent there is; what is below the lowest octave is raised to that.
_INF_EXPONENT = 128
_SCALE = np.float32(2.0 ** (_INF_EXPONENT - _TOP_OCTAVE))
_SMALLEST = np.float32(2.0 ** (_LOWEST_OCTAVE + _INF_EXPONENT - _TOP_OCTAVE))

# A float32 has its exponent, plus 127, above 23 other bits.
_EXPONENT_SHIFT, _EXPONENT_BIAS = 23, 127
# A scaled distance has one of these.
_EXPONENTS = range(
  _EXPONENT_BIAS + _LOWEST_OCTAVE + _INF_EXPONENT - _TOP_OCTAVE,
  _EXPONENT_BIAS + _INF_EXPONENT + 1,
)
# `exponent * 341 >> 10` is `(exponent - 1) // 3` for all of them, 232 to 255:
# 77 for the first bin, 78 for the next. Modulo 8 that is the bin's field.
_THIRD, _THIRD_SHIFT = 341, 10
_FIRST_FIELD = _EXPONENTS[0] * _THIRD >> _THIRD_SHIFT

_FIELD_BITS = 4
_LOG2_FIELD_BITS = 2
_FIELD_OFFSETS = _FIELD_BITS * (_SIDE - 1)
_EVEN_FIELDS = np.int32(0x0F0F0F0F)


def field_offset(exponent: jax.Array) -> jax.Array:
  """Computes the lowest bit of the field that counts a distance.

  Args:
    exponent: int32, of a scaled distance as float32 stores it.

  Returns:
    int32, a multiple of 4 below 32.
  """
  # Shifted by two bits fewer, the bin comes times 4.
  shift = _THIRD_SHIFT - _LOG2_FIELD_BITS
  return (exponent * np.int32(_THIRD) >> shift) & _FIELD_OFFSETS


def store_cutoffs(
  plan: Plan, kept: list[jax.Array] | None, scratch: Scratch
) -> None:
  """Replaces bounds by cutoffs, NaN where a token or its group does not count.

  Reads `cutoff` and `valid`. Overwrites `bound_above`.

  Args:
    plan: the static shape of the call.
    kept: from `select.threshold`.
    scratch: buffers.
  """
  cutoff = jnp.where(scratch.valid[...] != 0, scratch.cutoff[...], _NAN)
  for sublane in range(_SUBLANES):
    for segment in range(plan.segments_per_sublane):
      group_cutoff = cutoff
      if kept is not None:
        keep = kept[layout.group_of(plan, sublane, segment)]
        group_cutoff = jnp.where(keep, cutoff, _NAN)
      register = layout.segment_register(sublane, segment)
      rows = layout.dense_slice(plan, register)
      scratch.bound_above[rows, :] = group_cutoff


def count_distances(plan: Plan, register: int, scratch: Scratch) -> None:
  """Counts the distances of a block's tokens from the 8 experts of a register.

  Reads `selection_scores` and the cutoffs in `bound_above`. Adds to
  `bin_counts`.

  Args:
    plan: the static shape of the call.
    register: experts `register`, R + `register`, 2 R + `register`, ...
    scratch: buffers.
  """
  experts = pl.ds(register * _SUBLANES, _SUBLANES)
  segment = register // plan.experts_per_segment
  first = layout.segment_register(0, segment)
  total = below = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
  for column in range(plan.columns):
    cutoff = layout.load_column(plan, scratch.bound_above, first, column)
    distance = cutoff - scratch.selection_scores[column, experts, :]
    scaled = jnp.maximum(jnp.abs(distance * _SCALE), _SMALLEST)
    exponent = lax.bitcast_convert_type(scaled, jnp.int32) >> _EXPONENT_SHIFT
    offset = field_offset(exponent)
    # Neither infinity, of an expert that is masked, nor NaN is counted.
    one = jnp.where(distance < _INF, 1, 0).astype(jnp.int32)
    word = lax.shift_left(one, offset)
    total += word
    below += jnp.where(distance < 0.0, word, 0)
  # Fields of 4 bits -> bytes of two words each.
  words = [
    bits.shift_right(word, shift) & _EVEN_FIELDS
    for word in (below, total - below)
    for shift in (0, _FIELD_BITS)
  ]
  for i, word in enumerate(words):
    scratch.bin_counts[register, i] += word


def reduce_bins(
  plan: Plan, register: int, scratch: Scratch, histogram_ref: Ref
) -> None:
  """Adds the bytes of 8 experts, summed over all lanes, to their counts.

  Reads `bin_counts`. Adds to the output `histogram`.

  Args:
    plan: the static shape of the call.
    register: as in `count_distances`.
    scratch: buffers.
    histogram_ref: `[8 R, BINS]` int32.
  """
  lane = layout.lane_index()
  counts = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
  for i in range(BINS):
    # The bins below zero come in falling order of size.
    is_above, size = divmod(i, _SIDE)
    size = size if is_above else _SIDE - 1 - size
    field = (size + _FIRST_FIELD) % _SIDE
    byte, parity = divmod(field, 2)
    word = scratch.bin_counts[register, 2 * is_above + parity]
    count = bits.shift_right(word, 8 * byte) & _MAX_BYTE
    # The sum of 128 lanes of 255 at most is exact in float32.
    total = jnp.sum(count.astype(jnp.float32), axis=1, keepdims=True)
    counts = jnp.where(lane == i, total, counts)
  experts = pl.ds(register, _SUBLANES, stride=plan.experts_per_sublane)
  histogram_ref[experts, :] += counts.astype(jnp.int32)[:, :BINS]
