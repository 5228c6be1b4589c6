# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counts how far experts are from the tokens' cutoffs, inside the routing kernel.

The meaning is that of `jaxroute.histogram`, bin for bin: sixteen per expert, eight
on either side of zero, each eight times as wide as the one before. A vector
register holds 8 experts x 128 tokens, and its numbers are counted where they are:

  1. A distance becomes a 1 in one of eight 4-bit fields of a word, by its exponent.
     The words of a block's columns are added, and those below zero once more.
  2. The fields of a block, 8 at most, are spread to the bytes of four words, which
     `FLUSH` blocks add to.
  3. The bytes are summed over the tokens on the lanes and added to the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels.tpu import device

_LANES, _SUBLANES = device.LANES, device.SUBLANES

BINS = 16
_SIDE = BINS // 2
WORDS = 4
"""Words of four bytes that hold the bins of an expert for the tokens of a lane."""

FLUSH = 255 // 8
"""Blocks of at most 8 columns that the bytes have room for."""

# The first bin ends at 2^-16 and a bin is three octaves. Times this, what is in
# the last octave or beyond it is infinite, of exponent 255.
_SCALE = np.float32(2.0**124)
_FIRST_OCTAVE = np.float32(2.0**105)
# The 24 octaves have exponents from 232 on; exponent * 341 >> 10 is 77 in the
# first three, 78 in the next: bin and field differ by 77 modulo 8.
_THIRD, _SHIFT, _FIRST_FIELD = 341, 10, 77


def count_row(
  columns: int,
  selection: Callable[[int], jax.Array],
  price: Callable[[int], jax.Array],
) -> list[jax.Array]:
  """Counts the distances of 8 experts from the tokens of one block.

  Args:
    columns: of 128 tokens in the block, 8 at most.
    selection: of a column, `[8, 128]` float32: selection scores, not NaN.
    price: of a column, `[8, 128]` float32: the cutoffs, not -0; NaN where a token,
      or its expert group, does not count.

  Returns:
    `WORDS` times `[8, 128]` int32: what to add to the bytes.
  """
  total = below = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
  for c in range(columns):
    distance = price(c) - selection(c)
    size = jnp.maximum(jnp.abs(distance * _SCALE), _FIRST_OCTAVE)
    exponent = lax.bitcast_convert_type(size, jnp.int32) >> 23
    field = (exponent * np.int32(_THIRD) >> (_SHIFT - 2)) & 28
    # Neither infinity, of an expert that is masked, nor NaN.
    counted = jnp.where(distance < np.float32(np.inf), 1, 0).astype(jnp.int32)
    word = lax.shift_left(counted, field)
    total += word
    below += jnp.where(distance < 0.0, word, 0)
  nibble = np.int32(0x0F0F0F0F)
  return [
    lax.shift_right_logical(word, jnp.full_like(word, shift)) & nibble
    for word in (below, total - below)
    for shift in (0, 4)
  ]


def add_up(bytes_ref: Any, r: int, rows: int, out_ref: Any) -> None:
  """Adds row r of the bytes, over all lanes, to the counts of its 8 experts.

  Args:
    bytes_ref: `[rows, WORDS, 8, 128]` int32.
    r: the row: of experts r, rows + r, 2 rows + r, ...
    rows: experts per sublane.
    out_ref: `[8 rows, BINS]` int32.
  """
  lane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 1)
  counts = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
  for b in range(BINS):
    side, size = divmod(b, _SIDE)
    size = size if side else _SIDE - 1 - size
    byte, parity = divmod((size + _FIRST_FIELD) % _SIDE, 2)
    word = bytes_ref[r, 2 * side + parity]
    count = lax.shift_right_logical(word, jnp.full_like(word, 8 * byte)) & 255
    # Exact in float32: 128 lanes of 255 at most.
    total = jnp.sum(count.astype(jnp.float32), axis=1, keepdims=True)
    counts = jnp.where(lane == b, total, counts)
  experts = pl.ds(r, _SUBLANES, stride=rows)
  out_ref[experts, :] += counts.astype(jnp.int32)[:, :BINS]
