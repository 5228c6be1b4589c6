# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The steps by which the TPU kernel routes a block of up to 1024 tokens.

The block is 8 columns of 128 tokens. Two layouts of a vector register [8, 128]
alternate:

  column  8 experts x 128 tokens of one column. The experts are cut into 8 chunks
          of R = ceil(E / 8); row r holds expert s * R + r on sublane s, so a
          sublane, or a part of its rows, lies within one expert group.
  dense   8 columns x 128 tokens, one number for each of 1024 tokens.

To change layout is to store registers and to load them with a stride. Loads that
are a multiple of 8 rows apart meet in one memory bank, so every such buffer has an
odd pitch.

  1. column: logits are transposed, scored, biased; the selection scores are
     written to `chosen_from`, and every later step reads them from there. A
     selection network keeps the K + 1 largest values of every sublane, no
     indices. Without groups, those that lost one of its first comparisons are
     listed apart, for fewer of them are wanted. The columns take turns in two
     buffers of transposed logits: else all that is transposed would come first,
     with nothing to do beside it.
  2. dense: the 8 sublanes' lists are merged, each kind with its own. Group scores
     are sums of the heads of lists; a group that is not kept is taken out as a
     whole. The last merge leaves the K-th largest value, the threshold, and the
     next, the cutoff.
  3. column: a score sets one bit if it is above the threshold, one if it is not
     below: two 32-bit words per sublane for every 32 rows.
  4. dense: where more than K are not below, as many of the equal ones as are
     wanted are taken from the lowest index on. K bits are left per token, in
     index order; they are pulled out one by one, from both ends at once. Short
     words of several sublanes are packed into one for that.
  5. column: the logits of the chosen experts are gathered.
  6. dense: they are scored again, sorted by score, weighted and normalised. Only
     their order depends on the scores being the same as in step 1.
  7. column: the bits of valid tokens are added to counters of one bit per plane.
     The last block turns the planes into loads.
  8. If asked for, column: the selection scores once more, for their distances from
     the cutoff (`histogram`).

No step branches on the data: ties cost the same as none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, networks, registers
from jaxroute.kernels.tpu.route import histogram
from jaxroute.kernels.tpu.route import plan as plan_lib

# Older versions of jax have it among what is not TPU's alone.
_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal

_LANES, _SUBLANES = device.LANES, device.SUBLANES
_WORD, _PITCH = plan_lib.WORD, plan_lib.PITCH
# An even and an odd row share the two bits of their pair in a word.
_EVEN = np.int32(0x55555555)
_ODD = np.int32(-0x55555556)
# Keeps a sum of tiny scores away from the floats that TPUs flush to zero.
_SCALE = 2.0**40
# Its inverse is a normal float.
_LARGE = np.float32(2.0**125)
_MINUS_LOG2_E = np.float32(-np.log2(np.e))
_NEG_INF = np.float32(-np.inf)
_NAN = np.float32(np.nan)


def project(plan, tokens_ref, parts_refs, buf):
  """The logits of the next block, [E', tokens]."""
  rows = plan.projected_rows
  # As one operand, so that tokens are loaded into the MXU once.
  logits = lax.dot_general(
    jnp.concatenate([ref[...] for ref in parts_refs]),
    tokens_ref[...],
    dimension_numbers=(((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  rest = logits[rows : 2 * rows] + logits[2 * rows :]
  buf.projected[...] = _pin(plan, logits[:rows] + rest)


# Buffers and layouts.


def _iota(axis):
  return lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), axis)


def _dense(ref, row, plan):
  """A row of every column, of a buffer that was stored by columns."""
  return _pin(plan, ref[pl.ds(row, plan.columns, stride=_PITCH), :])


def _column(ref, row, c, plan):
  """8 rows of column c, of a buffer whose rows were stored dense."""
  start = row * plan.column_pitch + c
  return _pin(plan, ref[pl.ds(start, _SUBLANES, stride=plan.column_pitch), :])


def _column_rows(row, c, plan):
  """Where column c of the 8 rows from `row` on is, in a buffer by columns."""
  start = row // _SUBLANES * plan.columns * _PITCH
  return pl.ds(start + c * _PITCH, _SUBLANES)


def _dense_rows(row, plan):
  return pl.ds(row * plan.column_pitch, plan.columns)


def _store_experts(plan, ref, first, tile):
  """Stores experts `first`, ... `[n, 128]` to their chunks."""
  end = min(first + tile.shape[0], plan.num_experts)
  e = first
  while e < end:
    chunk, r = divmod(e, plan.rows)
    n = min(plan.rows - r, end - e)
    ref[pl.ds(chunk * plan.row_pitch + r, n), :] = tile[e - first :][:n]
    e += n


def _experts(plan, ref, r):
  """Row r of all chunks, [8, 128]."""
  return ref[pl.ds(r, _SUBLANES, stride=plan.row_pitch), :]


def spread_bias(plan, bias_ref, buf):
  """The bias of every expert, the same on all lanes; a NaN selects nothing."""
  bias = bias_ref[...].reshape(1, plan.num_experts)
  buf.bias_row[:, : plan.num_experts] = jnp.where(
    jnp.isnan(bias), _NEG_INF, bias
  )
  for first in range(0, plan.num_experts, _LANES):
    row = buf.bias_row[:, first : first + _LANES]
    tile = jnp.broadcast_to(row, (_LANES, _LANES)).T
    _store_experts(plan, buf.bias, first, tile)


# Scores.


def _prepare(plan, logits):
  """Multiplier and soft cap; -inf stays -inf."""
  config = plan.config
  if config.logit_multiplier != 1.0:
    logits = logits * np.float32(config.logit_multiplier)
  if config.logit_soft_cap is not None:
    cap = np.float32(config.logit_soft_cap)
    capped = cap * jnp.tanh(logits / cap)
    logits = jnp.where(logits == _NEG_INF, _NEG_INF, capped)
  return logits


def _score(plan, logits, peak=0.0, inverse_total=1.0):
  """Scores of prepared logits; the softmax of a row needs its two statistics."""
  if plan.config.score_fn == "sigmoid":
    scores = _sigmoid(plan, logits)
  elif plan.config.score_fn == "softmax":
    scores = jnp.exp(logits - peak) * inverse_total
  else:
    # sqrt(softplus(x)); below -15 that is exp(x / 2) to the last bit or so.
    near = jnp.sqrt(
      jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    )
    scores = jnp.where(logits < -15.0, jnp.exp(logits / 2), near)
  return _pin(plan, scores)


def _sigmoid(plan, x):
  if not plan.divides_in_software:
    return jax.nn.sigmoid(x)
  # One Newton step, without the special cases of a division, of which only
  # infinity can come up.
  divisor = jnp.minimum(1.0 + jnp.exp2(x * _MINUS_LOG2_E), _LARGE)
  inverse = _reciprocal(divisor, approx=True)
  return inverse + inverse * (1.0 - divisor * inverse)


def _pin(plan, x):
  """Keeps XLA from computing `x` anew, with other bits, where it is used.

  Interpreted only: Mosaic has no such freedom, and no barrier. It also keeps
  the steps of a kernel apart, which XLA would be long in compiling as one.
  """
  return lax.optimization_barrier(x) if plan.interpret else x


def _bias_scores(plan, logits, scores, bias):
  """Selection scores: never NaN, and -inf wherever the logit is -inf or NaN."""
  selection = scores if bias is None else scores + bias
  if plan.logit_space:
    valid = selection > _NEG_INF
  else:
    valid = logits > _NEG_INF
    if plan.config.score_fn != "sigmoid":
      valid = valid & (selection > _NEG_INF)
  return _pin(plan, jnp.where(valid, selection, _NEG_INF))


def score_column(plan, c, logits_ref, buf):
  """Fills a column of `chosen_from`, and every sublane's list of the best."""
  tokens = pl.ds(c * _LANES, _LANES)
  ref = buf.transposed.at[c % 2]
  if plan.transposed:
    tile = logits_ref[:, tokens].astype(jnp.float32)
    _store_experts(plan, ref, 0, tile)
  else:
    for first in range(0, plan.num_experts, _LANES):
      tile = logits_ref[tokens, first : first + _LANES].astype(jnp.float32)
      _store_experts(plan, ref, first, tile.T)

  def logits(r):
    x = _prepare(plan, _experts(plan, ref, r))
    if (_SUBLANES - 1) * plan.rows + r >= plan.num_experts:
      expert = _iota(0) * plan.rows + r
      x = jnp.where(expert < plan.num_experts, x, _NEG_INF)
    return x

  statistics = ()
  if plan.row_softmax:
    statistics = _softmax_statistics(plan, logits)
    for row, value in zip(
      (buf.peak, buf.inverse_total), statistics, strict=True
    ):
      row[pl.ds(c, 1), :] = value

  def selection(r):
    x = logits(r)
    buf.logits[c, pl.ds(r * _SUBLANES, _SUBLANES), :] = _experts(plan, ref, r)
    scores = x if plan.logit_space else _score(plan, x, *statistics)
    bias = _experts(plan, buf.bias, r) if plan.has_bias else None
    x = _bias_scores(plan, x, scores, bias)
    buf.chosen_from[c, pl.ds(r * _SUBLANES, _SUBLANES), :] = x
    return x

  rows = plan.segment_rows
  start = c * _PITCH
  for segment in range(plan.segments):
    here = range(segment * rows, (segment + 1) * rows)
    values = [selection(r) for r in here]
    for best in networks.best(values, plan.listed, plan.levels):
      for value in best:
        buf.lists[pl.ds(start, _SUBLANES), :] = value
        start += plan.columns * _PITCH


def _softmax_statistics(plan, logits):
  """Row maximum and 1 / row sum over the logits that are not NaN, [1, 128]."""
  rows = [logits(r) for r in range(plan.rows)]
  rows = [jnp.where(x > _NEG_INF, x, _NEG_INF) for x in rows]
  peak = functools.reduce(jnp.maximum, rows)
  peak = jnp.max(peak, axis=0, keepdims=True)
  peak = jnp.where(peak == _NEG_INF, 0.0, peak)
  total = functools.reduce(jnp.add, [jnp.exp(x - peak) for x in rows])
  total = jnp.sum(total, axis=0, keepdims=True)
  return peak, 1.0 / jnp.where(total == 0.0, 1.0, total)


# The threshold and the bits.


def threshold(plan, buf):
  """Writes the K-th largest selection score and the cutoff; the groups kept."""
  listed, kept = plan.listed, None
  parts = _load_lists(plan, buf)
  if plan.grouped:
    lists = [part[0] for part in parts]
    size = len(lists) // plan.config.num_groups
    lists = [
      _merge_all(lists[i : i + size], listed)
      for i in range(0, len(lists), size)
    ]
    kept = _keep_groups(plan, lists)
    lists = [
      [jnp.where(keep, x, _NEG_INF) for x in group]
      for keep, group in zip(kept, lists, strict=True)
    ]
    half = len(lists) // 2
    halves = _merge_all(lists[:half], listed), _merge_all(lists[half:], listed)
  else:
    # Every class of all sublanes, then the classes.
    merged = [
      _merge_all([part[i] for part in parts], listed >> i.bit_count())
      for i in range(2**plan.levels)
    ]
    half = len(merged) // 2
    halves = (
      networks.join(merged[:half], listed),
      networks.join(merged[half:], listed // 2),
    )
  best = networks.largest(*halves, listed)
  # The two smallest of them.
  cutoff = threshold = jnp.full_like(best[0], np.float32(np.inf))
  for x in best:
    threshold = jnp.minimum(threshold, jnp.maximum(cutoff, x))
    cutoff = jnp.minimum(cutoff, x)
  if len(best) < listed:
    cutoff, threshold = jnp.full_like(cutoff, _NEG_INF), cutoff
  # Not -0: the sign of a distance is that of a difference from it.
  buf.cutoff[...] = jnp.where(cutoff == 0.0, 0.0, cutoff)

  # No score is above, or not below, NaN. Where the groups that are kept have too
  # few experts, all masked ones tie, those of other groups included.
  outside = jnp.where(threshold == _NEG_INF, _NEG_INF, _NAN)
  for i in range(_SUBLANES * plan.segments):
    s, segment = divmod(i, plan.segments)
    rows = _dense_rows(segment * _SUBLANES + s, plan)
    not_below = above = threshold
    if kept is not None:
      keep = kept[_group(plan, s, segment)]
      not_below = jnp.where(keep, threshold, outside)
      above = jnp.where(keep, threshold, _NAN)
      buf.above[rows, :] = above
    buf.not_below[rows, :] = not_below
  return kept


def _load_lists(plan, buf):
  """Dense, the lists of every segment of every sublane, class by class."""
  pitch = plan.columns * _PITCH
  parts = []
  for s in range(_SUBLANES):
    rows = iter(range(s, buf.lists.shape[0], pitch))
    for _ in range(plan.segments):
      parts.append(
        [
          [_dense(buf.lists, next(rows), plan) for _ in range(size)]
          for size in plan.list_sizes
        ]
      )
  return parts


def _group(plan, s, segment):
  """The group of a segment of the rows of sublane s."""
  part = s * plan.segments + segment
  return part * plan.config.num_groups // (_SUBLANES * plan.segments)


def _merge_all(lists, k):
  merge = functools.partial(networks.merge, count=k)
  while len(lists) > 1:
    pairs = [lists[i : i + 2] for i in range(0, len(lists), 2)]
    lists = [functools.reduce(merge, pair) for pair in pairs]
  return lists[0]


def _keep_groups(plan, lists):
  """Dense masks of the `group_top_k` best groups, the first ones on ties."""
  config = plan.config
  count = {
    "top1": 1,
    "top2": 2,
    "top_k": config.top_k // config.group_top_k,
  }[config.group_score]
  scores = []
  for best in lists:
    score = functools.reduce(jnp.add, best[:count])
    # inf + -inf: a group with an infinite member is the best there is.
    scores.append(jnp.where(best[0] == np.float32(np.inf), best[0], score))
  worse_than = [jnp.zeros_like(scores[0], jnp.int32) for _ in scores]
  for b in range(len(scores)):
    for a in range(b):
      first = jnp.where(scores[a] >= scores[b], 1, 0).astype(jnp.int32)
      worse_than[b] += first
      worse_than[a] += 1 - first
  return [n < config.group_top_k for n in worse_than]


def compare_column(plan, c, buf):
  """The bits of scores that are not below the threshold, or above it."""
  for w in range(plan.words):
    # Both bits of a row in one word: row r at r and at r ^ 1. Even and odd rows
    # have a word each, which are shuffled into the two words wanted.
    halves = [jnp.zeros((_SUBLANES, _LANES), jnp.int32)] * 2
    for r in range(w * _WORD, min(plan.rows, (w + 1) * _WORD)):
      x = buf.chosen_from[c, pl.ds(r * _SUBLANES, _SUBLANES), :]
      row = r // plan.segment_rows * _SUBLANES
      not_below = _column(buf.not_below, row, c, plan)
      above = not_below
      if plan.grouped:
        above = _column(buf.above, row, c, plan)
      in_bit, both = _bit(r), _bit(r) | _bit(r ^ 1)
      in_or_out = jnp.where(x >= not_below, in_bit, np.int32(0))
      halves[r % 2] |= jnp.where(x > above, both, in_or_out)
    even, odd = halves
    rows = pl.ds((w * plan.columns + c) * _PITCH, _SUBLANES)
    buf.bits_not_below[rows, :] = (even & _EVEN) | (odd & _ODD)
    buf.bits_above[rows, :] = (lax.shift_right_logical(even, 1) & _EVEN) | (
      lax.shift_left(odd, 1) & _ODD
    )


def _bit(r):
  return np.uint32(1 << (r % _WORD)).astype(np.int32)


def _cells(plan, ref):
  """Lists of words, dense: of one sublane, or of several packed into a word."""
  pitch = plan.columns * _PITCH
  sublanes = [
    [_dense(ref, w * pitch + s, plan) for w in range(plan.words)]
    for s in range(_SUBLANES)
  ]
  if plan.packed == 1:
    return sublanes
  cells = []
  for first in range(0, _SUBLANES, plan.packed):
    word = sublanes[first][0]
    for i in range(1, plan.packed):
      word |= lax.shift_left(sublanes[first + i][0], _like(word, i * plan.rows))
    cells.append([word])
  return cells


def _store_cells(plan, ref, cells):
  """The inverse of `_cells`."""
  pitch = plan.columns * _PITCH
  for s in range(_SUBLANES):
    cell, i = divmod(s, plan.packed)
    for w, word in enumerate(cells[cell]):
      if plan.packed > 1:
        shifted = lax.shift_right_logical(word, _like(word, i * plan.rows))
        word = shifted & np.int32((1 << plan.rows) - 1)
      rows = pl.ds(w * pitch + s, plan.columns, stride=_PITCH)
      ref[rows, :] = word


def _like(x, value):
  return jnp.full_like(x, value)


def settle_ties(plan, buf):
  """Cells with K bits per token, which replace the bits not below."""
  not_below = _cells(plan, buf.bits_not_below)
  above = _cells(plan, buf.bits_above)
  wanted = plan.config.top_k - _population(w for cell in above for w in cell)
  # Of the words with equal ones the first are taken whole, then one in part.
  taken = []
  before = part = left = jnp.zeros_like(wanted)
  for cell, cell_above in zip(not_below, above, strict=True):
    for word, word_above in zip(cell, cell_above, strict=True):
      equal = word & ~word_above
      after = before + lax.population_count(equal)
      partly = (before < wanted) & (wanted < after)
      part = jnp.where(partly, equal, part)
      left = jnp.where(partly, wanted - before, left)
      taken.append((word, word_above, after <= wanted, partly))
      before = after
  # How many low bits of it have `left` ones: a search in powers of four.
  low = jnp.zeros_like(left)
  for width in (8, 2):
    longer = [low + i * width for i in (1, 2, 3)]
    few = [lax.population_count(part & _ones(n)) <= left for n in longer]
    for n, ok in zip(longer, few, strict=True):
      low = jnp.where(ok, n, low)
  longer = low + 1
  few = lax.population_count(part & _ones(longer)) <= left
  part = part & _ones(jnp.where(few, longer, low))

  words = [
    jnp.where(whole, word, jnp.where(partly, above | part, above))
    for word, above, whole, partly in taken
  ]
  cells = [words[i : i + plan.words] for i in range(0, len(words), plan.words)]
  _store_cells(plan, buf.bits_not_below, cells)
  return cells


def _population(words):
  return functools.reduce(jnp.add, map(lax.population_count, words))


def _ones(n):
  """Words with the n lowest bits set, n < 32."""
  return lax.shift_left(jnp.ones_like(n), n) - 1


def pull_bits(plan, cells, buf):
  """The K experts of every token, in index order."""
  k = plan.config.top_k
  # From both ends: neither waits for the other.
  low = _pull_bits(plan, cells, (k + 1) // 2, last=False)
  high = _pull_bits(plan, cells, k // 2, last=True)
  chosen = low + high[::-1]
  for i, expert in enumerate(chosen):
    buf.idx[_dense_rows(i, plan), :] = expert
  return chosen


def _pull_bits(plan, cells, count, last):
  """The first, or the last, `count` experts."""
  size = plan.packed * plan.rows
  starts = range(0, len(cells) * size, size)
  order = list(zip(starts, cells, strict=True))
  words = range(plan.words)
  if last:
    order, words = order[::-1], words[::-1]
  # The cell being emptied, and where the next one that is not empty starts, or -1.
  current = [jnp.zeros_like(cells[0][0])] * plan.words
  start = jnp.zeros_like(current[0])
  following, after = [], _like(start, -1)
  for first, cell in order[::-1]:
    following.insert(0, after)
    some = functools.reduce(jnp.bitwise_or, cell) != 0
    after = jnp.where(some, np.int32(first), after)

  pulled = []
  for _ in range(count):
    empty = functools.reduce(jnp.bitwise_or, current) == 0
    start = jnp.where(empty, after, start)
    entered = jnp.where(empty, after, np.int32(-1))
    for (first, cell), then in zip(order, following, strict=True):
      # A cell is entered by its first bit pulled or by a later one.
      here = entered == np.int32(first)
      current = [
        jnp.where(here, a, b) for a, b in zip(cell, current, strict=True)
      ]
      after = jnp.where(here, then, after)
    # The first word that has a bit.
    word, at = current[words[-1]], np.int32(words[-1] * _WORD)
    for w in words[-2::-1]:
      some = current[w] != 0
      word = jnp.where(some, current[w], word)
      at = jnp.where(some, np.int32(w * _WORD), at)
    if last:
      bit = _WORD - 1 - lax.clz(word)
    else:
      bit = lax.population_count((word & -word) - 1)
    pulled.append(start + at + bit)
    none = None
    for w in words:
      word = current[w]
      if last:
        top = _like(word, np.int32(-(2**31)))
        less = word & ~lax.shift_right_logical(top, lax.clz(word))
      else:
        less = word & (word - 1)
      current[w] = less if none is None else jnp.where(none, less, word)
      none = word == 0 if none is None else none & (word == 0)
  return pulled


# The chosen experts.


def _quotient(expert, n):
  """Indices of experts, below 1024, over n."""
  if n & (n - 1) == 0:
    return lax.shift_right_logical(expert, _like(expert, n.bit_length() - 1))
  return (expert * np.int32(2**20 // n + 1)) >> 20


def gather_column(plan, c, buf):
  """The logits of the chosen experts."""
  for first in range(0, plan.chosen_rows, _SUBLANES):
    expert = _column(buf.idx, first, c, plan)
    chunk = _quotient(expert, plan.rows)
    r = expert - chunk * np.int32(plan.rows)
    picked = registers.select_register(
      lambda i: buf.logits[c, pl.ds(i * _SUBLANES, _SUBLANES), :],
      r,
      chunk,
      plan.rows,
    )
    buf.picked[_column_rows(first, c, plan), :] = picked


def weigh(plan, step, chosen, kept, mask_ref, buf):
  """Sorts the chosen experts by score and weighs them."""
  config, pitch = plan.config, plan.columns * _PITCH
  idx, selection, scores, picked = list(chosen), [], [], []
  for k, expert in enumerate(idx):
    row = k // _SUBLANES * pitch + k % _SUBLANES
    picked.append(_dense(buf.picked, row, plan))
    logits = _prepare(plan, picked[-1])
    if plan.row_softmax:
      score = _score(plan, logits, buf.peak[...], buf.inverse_total[...])
    elif config.score_fn == "softmax":
      score = logits  # over the chosen ones, below
    else:
      score = _score(plan, logits)
    bias = _look_up_bias(plan, expert, buf) if plan.has_bias else None
    x = logits if plan.logit_space else score
    x = _bias_scores(plan, logits, x, bias)
    if kept is not None:
      x = jnp.where(_in_kept_group(plan, expert, kept), x, _NEG_INF)
    selection.append(x)
    scores.append(score)

  if plan.row_softmax:
    picked = list(scores)
  sorted_ = [selection, idx, scores] + ([picked] if plan.with_chosen else [])
  for i, j in networks.exchanges(config.top_k):
    later = (selection[i] == selection[j]) & (idx[i] > idx[j])
    swap = (selection[i] < selection[j]) | later
    for x in sorted_:
      x[i], x[j] = jnp.where(swap, x[j], x[i]), jnp.where(swap, x[i], x[j])

  weights = _normalize(plan, scores)
  bad = jnp.isnan(functools.reduce(jnp.add, weights))
  valid = jnp.where(bad, 0, -1).astype(jnp.int32)
  weights = [jnp.where(bad, _NAN, w) for w in weights]
  if plan.has_mask:
    real = mask_ref[...] != 0
    valid = jnp.where(real, valid, 0)
    weights = [jnp.where(real, w, 0.0) for w in weights]
  if plan.tokens % plan.step_tokens:
    shape = (plan.columns, _LANES)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) * _LANES
    token += lax.broadcasted_iota(jnp.int32, shape, 1) + step * plan.block
    valid = jnp.where(token < plan.tokens, valid, 0)
  buf.valid[...] = valid
  for k in range(config.top_k):
    buf.idx[_dense_rows(k, plan), :] = idx[k]
    buf.weights[_dense_rows(k, plan), :] = weights[k]
    if plan.with_chosen:
      buf.chosen[_dense_rows(k, plan), :] = picked[k]


def _look_up_bias(plan, idx, buf):
  """The bias of experts `[columns, 128]`, from 128 lanes at a time."""
  # A gather from one row is not the kind that Mosaic takes.
  wide = jnp.broadcast_to(idx, (max(2, plan.columns), _LANES))
  found = jnp.zeros(wide.shape, jnp.float32)
  for first in range(0, plan.num_experts, _LANES):
    row = jnp.broadcast_to(buf.bias_row[:, first : first + _LANES], wide.shape)
    here = jnp.take_along_axis(
      row, wide & (_LANES - 1), axis=1, mode="promise_in_bounds"
    )
    found = here if first == 0 else jnp.where(wide >= first, here, found)
  return found[: plan.columns]


def _in_kept_group(plan, expert, kept):
  """Whether an expert is in a group that is kept."""
  group = _quotient(expert, plan.config.group_size)
  bits = functools.reduce(
    jnp.bitwise_or,
    [jnp.where(keep, _bit(g), np.int32(0)) for g, keep in enumerate(kept)],
  )
  return lax.shift_right_logical(bits, group) & 1 != 0


def _normalize(plan, scores):
  """Weights of the chosen experts' scores, or logits under a softmax of them."""
  config = plan.config
  if config.score_fn == "softmax" and config.score_after_top_k:
    peak = functools.reduce(jnp.maximum, scores)
    peak = jnp.where(peak == _NEG_INF, 0.0, peak)
    scores = [jnp.exp(x - peak) for x in scores]
    total = functools.reduce(jnp.add, scores)
    total = jnp.where(total == 0.0, 1.0, total)
    scores = [x / total for x in scores]
  if not config.normalize_weights:
    return [x * np.float32(config.scaling_factor) for x in scores]
  total = functools.reduce(jnp.add, scores) * np.float32(_SCALE)
  total += np.float32(config.norm_eps * _SCALE)
  factor = np.float32(config.scaling_factor * _SCALE) / total
  return [x * factor for x in scores]


def write_column(plan, c, buf, idx_ref, weights_ref, cutoff_ref, chosen_ref):
  """Writes what belongs to the tokens of a column, experts by tokens."""
  tokens = pl.ds(c * _LANES, _LANES)
  k, pitch = plan.config.top_k, plan.column_pitch
  for first in range(0, k, _SUBLANES):
    n = min(_SUBLANES, k - first)
    rows = pl.ds(first * pitch + c, n, stride=pitch)
    idx_ref[pl.ds(first, n), tokens] = buf.idx[rows, :]
    weights_ref[pl.ds(first, n), tokens] = buf.weights[rows, :]
    if plan.with_chosen:
      chosen_ref[pl.ds(first, n), tokens] = buf.chosen[rows, :]
  cutoff_ref[:, tokens] = buf.cutoff[pl.ds(c, 1), :]


# The loads.


def count(plan, buf):
  """Adds the bits of the block to the planes, a binary counter per bit."""
  for w in range(plan.words):
    planes = [buf.planes[w, i] for i in range(plan.planes)]
    for c in range(plan.columns):
      rows = pl.ds((w * plan.columns + c) * _PITCH, _SUBLANES)
      valid = buf.valid[pl.ds(c, 1), :]
      carry = buf.bits_not_below[rows, :] & jnp.broadcast_to(
        valid, (_SUBLANES, _LANES)
      )
      for i in range(plan.planes):
        planes[i], carry = planes[i] ^ carry, planes[i] & carry
    for i, plane in enumerate(planes):
      buf.planes[w, i] = plane


def write_load(plan, buf, load_ref):
  """Adds the counters of all lanes, and puts the experts on lanes."""
  # The row whose load goes to a lane, if it has one of its sublane.
  wanted = (_iota(1) - _iota(0) * plan.rows) & (_LANES - 1)
  load = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
  for w in range(plan.words):
    rows = range(w * _WORD, min(plan.rows, (w + 1) * _WORD))
    # Eight planes at a time: four counts in a word, exact sums in float32.
    for first in range(0, plan.planes, 8):
      totals = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
      for r in rows[:8]:
        four = jnp.zeros_like(load)
        for i in range(first, min(plan.planes, first + 8)):
          bits = lax.shift_right_logical(
            buf.planes[w, i], _like(load, r % _WORD)
          )
          four += lax.shift_left(bits & 0x01010101, _like(load, i - first))
        for shift in range(0, _WORD, 8):
          row = r + shift
          if row in rows:
            count = lax.shift_right_logical(four, _like(load, shift)) & 0xFF
            total = jnp.sum(count.astype(jnp.float32), axis=1, keepdims=True)
            totals = jnp.where(wanted == row, total, totals)
      load += lax.shift_left(totals.astype(jnp.int32), _like(load, first))
  for first in range(0, plan.num_experts, _LANES):
    n = min(_LANES, plan.num_experts - first)
    mine = _quotient(first + _iota(1), plan.rows) == _iota(0)
    total = jnp.sum(jnp.where(mine, load, 0), axis=0, keepdims=True)
    load_ref[pl.ds(first, n)] = total[0, :n]


# The distances.


def store_prices(plan, kept, buf):
  """Cutoffs in place of the bounds `above`; NaN where nothing is to be counted."""
  price = jnp.where(buf.valid[...] != 0, buf.cutoff[...], _NAN)
  for s in range(_SUBLANES):
    for segment in range(plan.segments):
      mine = price
      if kept is not None:
        mine = jnp.where(kept[_group(plan, s, segment)], price, _NAN)
      buf.above[_dense_rows(segment * _SUBLANES + s, plan), :] = mine


def count_distances(plan, r, buf):
  """Adds the block's distances of row r to the bytes of their bins."""
  experts = pl.ds(r * _SUBLANES, _SUBLANES)
  row = r // plan.segment_rows * _SUBLANES
  words = histogram.count_row(
    plan.columns,
    lambda c: buf.chosen_from[c, experts, :],
    lambda c: _column(buf.above, row, c, plan),
  )
  for i, word in enumerate(words):
    buf.distances[r, i] += word
