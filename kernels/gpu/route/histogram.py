# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How far the bias of every expert is from the tokens' cutoffs, counted.

The meaning is that of `jaxroute.routing.bias_histogram`, bin for bin. A distance has
five bits: whether it is counted, whether it is below 0, and the three of its bin on
that side. A word has one of them for every expert of a chunk and a row, and after a
transpose for every row of a warp and an expert. Then the rows of a bin are those with
its bits, and ones are counted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels.gpu import threads
from jaxroute.kernels.gpu.mosaic import plgpu
from jaxroute.kernels.gpu.route import select
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.refs import DISTANCE_BITS
from jaxroute.kernels.gpu.route.tile import (
  Tile,
  loop,
  place_of,
  rows_of_first_part,
)
from jaxroute.kernels.gpu.threads import ROW, THREADS, WARP, by_row, full

_SIDE = types.HISTOGRAM_BINS // 2
_OCTAVES, _FIRST_END = types.HISTOGRAM_OCTAVES, types.HISTOGRAM_FIRST_END
_TOP_OCTAVE = _FIRST_END + _OCTAVES * (_SIDE - 1) - 1
# The scale takes the top octave, and all beyond it, to infinity, which has the largest
# exponent there is; what is below the lowest octave is raised to that.
_SCALE = np.float32(2.0 ** (128 - _TOP_OCTAVE))
_SMALLEST = np.float32(2.0 ** (_FIRST_END - _OCTAVES) * _SCALE)
_LOWEST_EXPONENT = 255 - (_OCTAVES * _SIDE - 1)
# For octaves below 24, octave // 3 is 11 octave // 32: the top three of the 8 bits that
# 11 octave has. Here they are below the highest bit of a word.
_OCTAVE_SCALE = 11 << 23
_SIGN = np.int32(-(2**31))
_NIBBLES = np.int32(0x11111111)


def write_distances(
  tile: Tile, cutoff: jax.Array, kept: list[jax.Array]
) -> None:
  """Writes the bits of all distances to `distances`, by expert.

  Reads `selection_scores` and `is_counted`. A barrier of the block has to follow.

  Args:
    tile: of the block.
    cutoff: `[128]`. The cutoff of the token.
    kept: from `select.threshold`.
  """
  plan, buffers = tile.plan, tile.buffers

  def write_chunk(chunk: jax.Array | int, carry: int) -> int:
    x = plgpu.load(buffers.selection_scores.at[chunk], layout=by_row(4))
    is_counted, nibbles = full(0, jnp.int32), [full(0, jnp.int32)] * 4
    for column, score in reversed(list(enumerate(threads.columns(x)))):
      distance = cutoff - score
      # A cutoff of inf or a score of -inf makes it inf or NaN.
      bit = plan.threads.is_less(distance, full(np.inf))
      is_counted = (is_counted << 1) | bit
      nibble = lax.shift_right_logical(_bin_on_top(distance), jnp.int32(28))
      nibbles[column % 4] = (nibbles[column % 4] << 4) | nibble
    planes = is_counted, *(_bits_of(nibbles, bit) for bit in (3, 2, 1, 0))
    for plane, word in enumerate(planes):
      buffers.distances[_slice(plan, plane, chunk)] = word
    return carry

  loop(plan.chunks, write_chunk, 0)
  is_counted = plan.threads.gather(buffers.is_counted, tile.place.token) == 1
  for chunk in range(plan.chunks):
    for plane in range(DISTANCE_BITS):
      place = _slice(plan, plane, chunk)
      word = plgpu.load(buffers.distances.at[place], layout=ROW)
      if plane == 0:
        word = word & select.reachable_bits(plan, chunk, kept)
        word = jnp.where(is_counted, word, 0)
      buffers.distances[place] = plan.threads.transpose_bits(word)


def _bin_on_top(distance: jax.Array) -> jax.Array:
  """The four highest bits are whether it is below 0, and the bin on that side."""
  size = jnp.maximum(jnp.abs(distance) * _SCALE, _SMALLEST)
  exponent = lax.bitcast_convert_type(size, jnp.int32) >> 23
  bin_ = (exponent - _LOWEST_EXPONENT) * _OCTAVE_SCALE
  sign = lax.bitcast_convert_type(distance, jnp.int32) & _SIGN
  return (bin_ & ~_SIGN) | sign


def _bits_of(nibbles: list[jax.Array], bit: int) -> jax.Array:
  """One bit of every nibble, in turn of the four words that these are in."""
  words = (
    (lax.shift_right_logical(nibble, jnp.int32(bit)) & _NIBBLES) << i
    for i, nibble in enumerate(nibbles)
  )
  return functools.reduce(jnp.bitwise_or, words)


def count(tile: Tile) -> None:
  """Adds to `histogram` of the operands, or writes that of the results.

  Reads `distances`.

  Args:
    tile: of the block.
  """
  plan, num_experts = tile.plan, tile.plan.num_experts
  for first in range(0, num_experts, THREADS):
    expert = first + tile.place.row
    is_expert = expert < num_experts
    totals = [full(0, jnp.int32)] * types.HISTOGRAM_BINS
    for planes in _rows(tile, jnp.minimum(expert, num_experts - 1)):
      by_bits = _split(planes[0], planes[1:])
      above, below = by_bits[:_SIDE], by_bits[_SIDE:]
      totals = [
        total + plan.threads.count_bits(rows)
        for total, rows in zip(totals, below[::-1] + above, strict=True)
      ]
    for bin_, total in enumerate(totals):
      index = bin_ * num_experts + expert
      if plan.tiles == 1:
        keep = threads.as_words(is_expert)
        plan.threads.scatter(tile.results.histogram, index, total, keep)
      else:
        keep = threads.as_words(is_expert & (total != 0))
        plan.threads.add_to(tile.operands.histogram, index, total, keep)


def _split(rows: jax.Array, planes: list[jax.Array]) -> list[jax.Array]:
  """The rows of each number that the planes' bits can make, from 0; as bits."""
  if not planes:
    return [rows]
  first, *others = planes
  return _split(rows & ~first, others) + _split(rows & first, others)


def _rows(tile: Tile, expert: jax.Array) -> list[list[jax.Array]]:
  """The rows of a tile by plane, those of an expert's part, `[128]` each, as bits.

  Rows of other parts have the bits of other experts. Those of the expert's own are
  so few that several warps share a word.
  """
  plan = tile.plan
  part, place = place_of(plan, expert)

  def load(plane: int, warp: int) -> jax.Array:
    start = plane * plan.chunks * THREADS + warp * WARP
    rows = plan.threads.gather(tile.buffers.distances, start + place)
    if plan.lanes == 1:
      return rows
    return lax.shift_right_logical(rows, part) & rows_of_first_part(plan)

  warps, shared = THREADS // WARP, min(plan.lanes, THREADS // WARP)
  words = []
  for first in range(0, warps, shared):
    planes = []
    for plane in range(DISTANCE_BITS):
      word = load(plane, first)
      for i in range(1, shared):
        word = word | (load(plane, first + i) << i)
      planes.append(word)
    words.append(planes)
  return words


def _slice(plan: Plan, plane: int, chunk: jax.Array | int) -> Any:
  return pl.ds((plane * plan.chunks + chunk) * THREADS, THREADS)
