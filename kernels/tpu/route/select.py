# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Selection scores to the K experts of every token, in index order.

Scores are compared with the K-th largest of their token, and from then on
experts are bits. A *cell* is the words of bits of one sublane, or one word with
the bits of several sublanes; cells are in index order. Dense, a token has one
element in every word of all its cells.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels import networks
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import bits, layout
from jaxroute.kernels.tpu.route.plan import WORD_BITS, Plan
from jaxroute.kernels.tpu.route.refs import Scratch

_LANES, _SUBLANES = device.LANES, device.SUBLANES
# The bits of even and of odd registers: each shares the two bits of a pair.
_EVEN_BITS = np.int32(0x55555555)
_ODD_BITS = np.int32(-0x55555556)
_INF = np.float32(np.inf)
_NEG_INF = np.float32(-np.inf)
_NAN = np.float32(np.nan)

# Falling lists of `[columns, 128]`.
_List = list[jax.Array]
_Cell = list[jax.Array]
# For every group, `[columns, 128]` bool: the tokens that may use it.
_Kept = list[jax.Array]


def threshold(plan: Plan, scratch: Scratch) -> _Kept | None:
  """Finds the K-th largest selection score of every token, and the next.

  Reads `lists`. Writes `cutoff`, `bound_not_below` and `bound_above`: a token's
  bound is NaN in a group it may not use, so that no comparison with it is true.

  Args:
    plan: the static shape of the call.
    scratch: buffers.

  Returns:
    For each group, `[columns, 128]` bool: whether a token may use it. None if
    it may use all.
  """
  lists = _load_lists(plan, scratch.lists)
  if plan.config.limits_groups:
    candidates, kept = _best_of_kept_groups(plan, lists)
  else:
    candidates, kept = _best(plan, lists), None
  kth, next_score = _two_smallest(plan, candidates)
  _store_cutoff(next_score, scratch)
  _store_bounds(plan, kth, kept, scratch)
  return kept


def _load_lists(plan: Plan, lists_ref: Ref) -> list[list[_List]]:
  """Reads the list of each class, for every segment of every sublane."""
  segments = []
  for sublane in range(_SUBLANES):
    register = 0
    for _ in range(plan.segments_per_sublane):
      classes = []
      for size in plan.list_sizes:
        registers = range(register, register + size)
        classes.append(
          [layout.load_dense(plan, lists_ref, r, sublane) for r in registers]
        )
        register += size
      segments.append(classes)
  return segments


def _best(plan: Plan, segments: list[list[_List]]) -> _List:
  """Finds the K + 1 largest of all experts, unsorted."""
  # Each class is merged over all sublanes, then the classes with one another.
  classes = [
    _merge_all(
      [segment[i] for segment in segments], plan.list_length >> i.bit_count()
    )
    for i in range(2**plan.network_levels)
  ]
  half = len(classes) // 2
  return networks.largest(
    networks.join(classes[:half], plan.list_length),
    networks.join(classes[half:], plan.list_length // 2),
    plan.list_length,
  )


def _best_of_kept_groups(
  plan: Plan, segments: list[list[_List]]
) -> tuple[_List, _Kept]:
  """Finds the K + 1 largest of the kept groups, unsorted, and these groups."""
  lists = [falling for (falling,) in segments]
  per_group = len(lists) // plan.config.num_groups
  groups = [
    _merge_all(lists[first : first + per_group], plan.list_length)
    for first in range(0, len(lists), per_group)
  ]
  kept = _keep_groups(plan, groups)
  # A group that is not kept is taken out as a whole.
  groups = [
    [jnp.where(keep, score, _NEG_INF) for score in group]
    for keep, group in zip(kept, groups, strict=True)
  ]
  half = len(groups) // 2
  candidates = networks.largest(
    _merge_all(groups[:half], plan.list_length),
    _merge_all(groups[half:], plan.list_length),
    plan.list_length,
  )
  return candidates, kept


def _merge_all(lists: list[_List], count: int) -> _List:
  """Merges falling lists, two by two, to that of the `count` largest."""
  merge = functools.partial(networks.merge, count=count)
  while len(lists) > 1:
    pairs = [lists[i : i + 2] for i in range(0, len(lists), 2)]
    lists = [functools.reduce(merge, pair) for pair in pairs]
  return lists[0]


def _keep_groups(plan: Plan, groups: list[_List]) -> _Kept:
  """Finds the `group_top_k` best groups of a token, the first ones on ties."""
  scores = []
  for falling in groups:
    heads = falling[: plan.config.group_score_count]
    score = functools.reduce(jnp.add, heads)
    # inf - inf is NaN: a group with an infinite member is the best there is.
    scores.append(jnp.where(falling[0] == _INF, falling[0], score))
  num_better = [jnp.zeros_like(scores[0], jnp.int32) for _ in scores]
  for second in range(len(scores)):
    for first in range(second):
      first_wins = jnp.where(scores[first] >= scores[second], 1, 0)
      first_wins = first_wins.astype(jnp.int32)
      num_better[second] += first_wins
      num_better[first] += 1 - first_wins
  return [better < plan.config.group_top_k for better in num_better]


def _two_smallest(plan: Plan, candidates: _List) -> tuple[jax.Array, jax.Array]:
  """Finds the K-th largest and the next of the K + 1 largest scores."""
  kth = smallest = jnp.full_like(candidates[0], _INF)
  for score in candidates:
    kth = jnp.minimum(kth, jnp.maximum(smallest, score))
    smallest = jnp.minimum(smallest, score)
  if len(candidates) == plan.list_length:
    return kth, smallest
  # All experts are chosen: there is no next score.
  no_score = jnp.full_like(smallest, _NEG_INF)
  return smallest, no_score


def _store_cutoff(next_score: jax.Array, scratch: Scratch) -> None:
  """Writes `cutoff`: 0 for -0, so that no difference from it is -0."""
  scratch.cutoff[...] = jnp.where(next_score == 0.0, 0.0, next_score)


def _store_bounds(
  plan: Plan, kth: jax.Array, kept: _Kept | None, scratch: Scratch
) -> None:
  """Writes `bound_not_below` and, if groups differ in it, `bound_above`."""
  # Where the groups that are kept have too few experts, -inf is the K-th
  # largest, and all masked experts tie, also those of other groups.
  not_kept = jnp.where(kth == _NEG_INF, _NEG_INF, _NAN)
  for sublane in range(_SUBLANES):
    for segment in range(plan.segments_per_sublane):
      register = layout.segment_register(sublane, segment)
      rows = layout.dense_slice(plan, register)
      if kept is None:
        scratch.bound_not_below[rows, :] = kth
        continue
      keep = kept[layout.group_of(plan, sublane, segment)]
      not_below = jnp.where(keep, kth, not_kept)
      scratch.bound_above[rows, :] = jnp.where(keep, kth, _NAN)
      scratch.bound_not_below[rows, :] = not_below


def compare_column(plan: Plan, column: int, scratch: Scratch) -> None:
  """Sets bits where scores of 128 tokens are not below a bound, and above.

  Reads `selection_scores`, `bound_not_below`, `bound_above`. Writes
  `bits_not_below` and `bits_above`.

  Args:
    plan: the static shape of the call.
    column: of the block, 0 to 7.
    scratch: buffers.
  """
  for word in range(plan.words_per_sublane):
    # Register r owns two bits of the word of its parity: bit r says not below,
    # and the other bit of its pair, r ^ 1, says above. So one select sets both,
    # and masks sort them into the two words wanted.
    even = odd = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
    end = min(plan.experts_per_sublane, (word + 1) * WORD_BITS)
    for register in range(word * WORD_BITS, end):
      both_bits = _compare_register(plan, register, column, scratch)
      if register % 2:
        odd |= both_bits
      else:
        even |= both_bits
    rows = layout.column_slice(plan, word, column)
    scratch.bits_not_below[rows, :] = (even & _EVEN_BITS) | (odd & _ODD_BITS)
    scratch.bits_above[rows, :] = (
      lax.shift_right_logical(even, 1) & _EVEN_BITS
    ) | (lax.shift_left(odd, 1) & _ODD_BITS)


def _compare_register(
  plan: Plan, register: int, column: int, scratch: Scratch
) -> jax.Array:
  """Computes bit r where a score is not below, r and r ^ 1 where above."""
  experts = pl.ds(register * _SUBLANES, _SUBLANES)
  scores = scratch.selection_scores[column, experts, :]
  segment = register // plan.experts_per_segment
  first = layout.segment_register(0, segment)
  not_below = layout.load_column(plan, scratch.bound_not_below, first, column)
  above = not_below
  if plan.config.limits_groups:
    above = layout.load_column(plan, scratch.bound_above, first, column)
  one_bit = bits.bit(register)
  two_bits = one_bit | bits.bit(register ^ 1)
  one_or_none = jnp.where(scores >= not_below, one_bit, np.int32(0))
  return jnp.where(scores > above, two_bits, one_or_none)


def _load_cells(plan: Plan, bits_ref: Ref) -> list[_Cell]:
  """Reads the bits of a buffer by columns, dense."""
  sublanes = [
    [
      layout.load_dense(plan, bits_ref, word, sublane)
      for word in range(plan.words_per_sublane)
    ]
    for sublane in range(_SUBLANES)
  ]
  if plan.sublanes_per_word == 1:
    return sublanes
  cells = []
  for first in range(0, _SUBLANES, plan.sublanes_per_word):
    packed = sublanes[first][0]
    for i in range(1, plan.sublanes_per_word):
      packed |= bits.shift_left(
        sublanes[first + i][0], i * plan.experts_per_sublane
      )
    cells.append([packed])
  return cells


def _store_cells(plan: Plan, bits_ref: Ref, cells: list[_Cell]) -> None:
  """Writes what `_load_cells` reads."""
  experts = plan.experts_per_sublane
  for sublane in range(_SUBLANES):
    cell, i = divmod(sublane, plan.sublanes_per_word)
    for number, word in enumerate(cells[cell]):
      if plan.sublanes_per_word > 1:
        shifted = bits.shift_right(word, i * experts)
        word = shifted & np.int32((1 << experts) - 1)
      bits_ref[layout.across_columns(plan, number, sublane), :] = word


class _TiedWord(NamedTuple):
  """A word of bits, and what is chosen of its scores equal to the K-th largest.

  Attributes:
    not_below: int32, a bit for each score not below the K-th largest.
    above: int32, a bit for each score above it.
    takes_all: bool, whether all the equal ones are chosen.
    takes_part: bool, whether the first of the equal ones are, but not all.
  """

  not_below: jax.Array
  above: jax.Array
  takes_all: jax.Array
  takes_part: jax.Array


def break_ties(plan: Plan, scratch: Scratch) -> list[_Cell]:
  """Leaves K bits per token: of the scores equal to the K-th largest the first.

  Reads `bits_not_below` and `bits_above`. Replaces `bits_not_below` by the
  result.

  Args:
    plan: the static shape of the call.
    scratch: buffers.

  Returns:
    Cells of `[columns, 128]` int32 words.
  """
  not_below = _load_cells(plan, scratch.bits_not_below)
  above = _load_cells(plan, scratch.bits_above)
  above_words = [word for cell in above for word in cell]
  wanted = plan.config.top_k - bits.population(above_words)
  # In index order, words give all their equal scores while these are wanted,
  # then one word gives a part, and the rest give none.
  num_equal = partial_word = partial_count = jnp.zeros_like(wanted)
  words = []
  for cell, cell_above in zip(not_below, above, strict=True):
    for word, word_above in zip(cell, cell_above, strict=True):
      equal = word & ~word_above
      num_equal_through = num_equal + lax.population_count(equal)
      takes_part = (num_equal < wanted) & (wanted < num_equal_through)
      partial_word = jnp.where(takes_part, equal, partial_word)
      partial_count = jnp.where(takes_part, wanted - num_equal, partial_count)
      takes_all = num_equal_through <= wanted
      words.append(_TiedWord(word, word_above, takes_all, takes_part))
      num_equal = num_equal_through
  first_equal = bits.lowest_ones(partial_word, partial_count)
  chosen = [
    jnp.where(
      word.takes_all,
      word.not_below,
      jnp.where(word.takes_part, word.above | first_equal, word.above),
    )
    for word in words
  ]
  size = plan.words_per_sublane
  cells = [chosen[i : i + size] for i in range(0, len(chosen), size)]
  _store_cells(plan, scratch.bits_not_below, cells)
  return cells


def extract_chosen(
  plan: Plan, cells: list[_Cell], scratch: Scratch
) -> list[jax.Array]:
  """Extracts the K experts of every token, in index order.

  Writes `expert_idx`.

  Args:
    plan: the static shape of the call.
    cells: from `break_ties`.
    scratch: buffers.

  Returns:
    K times `[columns, 128]` int32.
  """
  top_k = plan.config.top_k
  # From both ends at once, so that neither half waits for the other.
  low = _extract_set_bits(plan, cells, (top_k + 1) // 2)
  high = _extract_set_bits(plan, cells, top_k // 2, from_top=True)
  chosen = low + high[::-1]
  for i, expert in enumerate(chosen):
    scratch.expert_idx[layout.dense_slice(plan, i), :] = expert
  return chosen


def _extract_set_bits(
  plan: Plan, cells: list[_Cell], count: int, from_top: bool = False
) -> list[jax.Array]:
  """Extracts set bits in index order, or from the last one backwards.

  A cell is a few words. One is emptied bit by bit; `next_start` is the index of
  the lowest bit of the next one that is not empty, or -1 if all others are.
  """
  cell_size = plan.sublanes_per_word * plan.experts_per_sublane
  starts = range(0, len(cells) * cell_size, cell_size)
  ordered = list(zip(starts, cells, strict=True))[:: -1 if from_top else 1]
  current = [jnp.zeros_like(cells[0][0])] * plan.words_per_sublane
  current_start = jnp.zeros_like(current[0])

  # next_starts[i] is the start of the next cell with bits after cell i, and
  # next_start the start of the first.
  next_starts: list[jax.Array] = []
  next_start = jnp.full_like(current_start, -1)
  for cell_start, cell in reversed(ordered):
    next_starts.insert(0, next_start)
    has_bits = bits.union(cell) != 0
    next_start = jnp.where(has_bits, np.int32(cell_start), next_start)

  extracted = []
  for _ in range(count):
    is_empty = bits.union(current) == 0
    current_start = jnp.where(is_empty, next_start, current_start)
    entered_start = jnp.where(is_empty, next_start, np.int32(-1))
    for (cell_start, cell), following in zip(ordered, next_starts, strict=True):
      is_entered = entered_start == np.int32(cell_start)
      current = [
        jnp.where(is_entered, word, current_word)
        for word, current_word in zip(cell, current, strict=True)
      ]
      next_start = jnp.where(is_entered, following, next_start)
    extracted.append(bits.first_bit(current, current_start, from_top))
    current = bits.clear_first_bit(current, from_top)
  return extracted
