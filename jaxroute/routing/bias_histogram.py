# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How far the bias of every expert is from the tokens' cutoffs, counted, in XLA.

Token i chooses expert e while `cutoff[i] - (score[i, e] + expert_bias[e])` is
negative. That distance says how far the bias of e alone would have to move to
change the choice of token i, and its quantile with T K / E tokens below is how
far the bias has to move for balance. Sixteen bins per expert, eight on either
side, each eight times as wide as the one before, hold distances of all sizes:
where the bias is nearly right they are fine, whatever the score function.

Counts of devices and micro-batches add up.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import checks, types
from jaxroute.parallel import mesh

BINS = types.HISTOGRAM_BINS
"""Bins per expert, by distance: negative ones, of tokens that chose it, first."""

_SIDE = BINS // 2
_OCTAVES, _FIRST_END = types.HISTOGRAM_OCTAVES, types.HISTOGRAM_FIRST_END

_UPPER = 2.0 ** (_FIRST_END + _OCTAVES * np.arange(_SIDE))
EDGES = np.concatenate([-_UPPER[::-1], [0.0], _UPPER]).astype(np.float32)
"""`[BINS + 1]`: bin i holds the distances from `EDGES[i]` to `EDGES[i + 1]`.

A distance on an edge belongs to the bin that is farther from 0, and 0 itself to the one
above. The first and the last bin also hold what is beyond them.
"""

_LARGEST = float(np.finfo(np.float32).max)

# Rows that are summed in 4-bit fields before these could overflow (8 * 1 < 16),
# and words of these that are summed in 8-bit fields (16 * 8 < 256).
_NIBBLES, _BYTES = 8, 16


def count(
  selection: jax.Array,
  expert_idx: jax.Array,
  cutoff: jax.Array,
  token_mask: jax.Array,
) -> jax.Array:
  """Counts distances; see the module.

  Args:
    selection: `[T, E]` float32, not NaN. Selection scores; -inf where an expert
      cannot be chosen, which is not counted.
    expert_idx: `[T, K]` int32. The K largest of them.
    cutoff: `[T]` float32. The largest of the others.
    token_mask: `[T]` bool. The tokens to count.

  Returns:
    `[E, BINS]` int32.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  fix = "Pass those of one batch."
  checks.check_array("selection", selection, "[T, E]", "float32", fix)
  t = selection.shape[0]
  checks.check_array("expert_idx", expert_idx, "[T, K]", "integer", fix, T=t)
  checks.check_array("cutoff", cutoff, "[T]", "float32", fix, T=t)
  checks.check_array("token_mask", token_mask, "[T]", "bool", fix, T=t)
  expert_idx = checks.as_expert_idx(expert_idx, selection.shape[1])
  operands = selection, expert_idx, cutoff, token_mask
  return mesh.map_over_tokens(
    _count, operands, are_per_token=[True] * 4, outputs_per_token=False
  )


def _count(
  selection: jax.Array,
  expert_idx: jax.Array,
  cutoff: jax.Array,
  token_mask: jax.Array,
) -> jax.Array:
  # An infinite cutoff is nobody's distance, and so that of padding.
  cutoff = jnp.where(token_mask, cutoff, jnp.inf)
  # Only chosen experts have a distance below 0: few, which a CPU gathers fast.
  below = jax.lax.platform_dependent(
    selection,
    expert_idx,
    cutoff,
    cpu=_count_chosen,
    default=_count_below,
  )
  above = _count_side(_distance(selection, cutoff))
  return jnp.concatenate([below, above]).T


def _count_chosen(
  selection: jax.Array, expert_idx: jax.Array, cutoff: jax.Array
) -> jax.Array:
  """`[8, E]` counts of the distances below 0, from the chosen experts alone."""
  chosen = jnp.take_along_axis(
    selection, expert_idx, axis=1, mode="promise_in_bounds"
  )
  distance = _distance(chosen, cutoff)
  zeros, row, expert_idx, ones = mesh.vary_alike(
    (
      jnp.zeros((_SIDE, selection.shape[1]), jnp.int32),
      _SIDE - 1 - _bin(-distance),
      expert_idx,
      (distance < 0).astype(jnp.int32),
    )
  )
  return zeros.at[row, expert_idx].add(ones, mode="promise_in_bounds")


def _count_below(
  selection: jax.Array, expert_idx: jax.Array, cutoff: jax.Array
) -> jax.Array:
  """`[8, E]` counts of the distances below 0, from those of all experts."""
  del expert_idx
  distance = jnp.maximum(_distance(selection, cutoff), -_LARGEST)
  return _count_side(-distance)[::-1]


def _distance(selection: jax.Array, cutoff: jax.Array) -> jax.Array:
  """`cutoff - selection`; +inf, which is not counted, where it is not a number."""
  cutoff = cutoff[:, None]
  counted = (selection > -jnp.inf) & (cutoff < jnp.inf)
  return jnp.where(
    counted, cutoff - jnp.where(counted, selection, 0.0), jnp.inf
  )


def _count_side(distance: jax.Array) -> jax.Array:
  """`[8, E]` counts of the finite distances of at least +0.

  Eight 4-bit counters fit a word, so that one pass over `[T, E]` adds a word
  per number instead of comparing it with every edge.
  """
  bits = jax.lax.bitcast_convert_type(distance, jnp.int32)
  counted = (bits >= 0) & (bits < 0x7F800000)
  words = jnp.where(counted, jnp.int32(1) << (4 * _bin(distance)), 0)
  t, e = words.shape
  blocks = -(-t // (_NIBBLES * _BYTES))
  words = jnp.pad(words, ((0, blocks * _NIBBLES * _BYTES - t), (0, 0)))
  words = words.reshape(blocks, _BYTES, _NIBBLES, e)
  words = jnp.sum(words, axis=2, dtype=jnp.int32)
  fields = jnp.stack([words, words >> 4], axis=0) & 0x0F0F0F0F
  fields = jnp.sum(fields, axis=2, dtype=jnp.int32)
  # Byte i of the even fields is bin 2 i, of the odd ones 2 i + 1.
  counts = [
    jnp.sum((fields >> (8 * i)) & 0xFF, axis=1, dtype=jnp.int32)
    for i in range(_SIDE // 2)
  ]
  return jnp.stack(counts).reshape(_SIDE, e)


def _bin(distance: jax.Array) -> jax.Array:
  """0 to 7 by the exponent of a float32 that is not negative."""
  bits = jax.lax.bitcast_convert_type(distance, jnp.int32)
  octave = (bits >> 23) - (127 + _FIRST_END - _OCTAVES)
  octave = jnp.clip(octave, 0, _OCTAVES * _SIDE - 1)
  # The shift is octave // 3 for octaves below 30.
  return (octave * 11) >> 5
