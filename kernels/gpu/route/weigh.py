# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The chosen experts: their order, weights, and the results of a token.

A warp works on its own tokens. `slots` of its threads, side by side, are for the K
experts of one of them, and in a round it has as many tokens as that leaves room for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxroute import types
from jaxroute.kernels.gpu import threads
from jaxroute.kernels.gpu.route import score
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.score import NEG_INF
from jaxroute.kernels.gpu.route.select import UNREACHABLE
from jaxroute.kernels.gpu.route.tile import Tile, divide, over_lanes
from jaxroute.kernels.gpu.threads import THREADS, WARP, full

# Rounds whose logits are looked up before the first is weighed.
_ROUNDS_AT_ONCE = 2


@dataclasses.dataclass(frozen=True)
class Slot:
  """What a thread does in a round, `[128]`.

  Attributes:
    index: int32, of its slot in `Buffers.chosen`, and one that is there in any case.
    token: int32, of the tile; one that is there in any case.
    number: int32, of the slot, in `[0, slots)`.
    is_used: bool. Whether there is such a token and such a choice.
  """

  index: jax.Array
  token: jax.Array
  number: jax.Array
  is_used: jax.Array


def slot_of(tile: Tile, round_: jax.Array | int) -> Slot:
  """What a thread does in a round."""
  plan, place = tile.plan, tile.place
  pair = round_ * WARP + place.lane
  token = divide(pair, plan.slots)
  number = place.lane & (plan.slots - 1)
  is_used = number < plan.config.top_k
  is_spare = token >= plan.warp_tokens
  if plan.has_spare_lanes:
    is_used = is_used & ~is_spare
    token = jnp.minimum(token, plan.warp_tokens - 1)
  token = place.warp * plan.warp_tokens + token
  index = token * plan.slots + number
  if plan.has_spare_lanes:
    # A spare lane must not read what another writes in this round.
    first = plan.tile_tokens * plan.slots
    index = jnp.where(is_spare, first + place.row, index)
  return Slot(index, token, number, is_used)


@dataclasses.dataclass(frozen=True)
class _Choice:
  """One of the K experts of a token, `[128]`.

  Attributes:
    slot: of the thread.
    token: int32, of all.
    expert: int32.
    logit: of the dtype of the logits.
    is_reachable: bool. Whether the expert was not chosen for want of others.
  """

  slot: Slot
  token: jax.Array
  expert: jax.Array
  logit: jax.Array
  is_reachable: jax.Array


def weigh(tile: Tile) -> None:
  """Orders and weighs the chosen experts, and finds the tokens that count.

  Reads `chosen`, `expert_bias` and `softmax_sums`. Writes `is_counted`, and to `chosen`
  the place of each expert among the K; and `expert_idx`, `weights`, `chosen` and
  `token_mask` of the results.

  Args:
    tile: of the block.
  """
  rounds = tile.plan.rounds
  if rounds <= _ROUNDS_AT_ONCE:
    # No round waits for the memory of the one before.
    fetched = [_fetch(tile, round_) for round_ in range(rounds)]
    for round_ in range(rounds):
      _run_round(tile, _look_up(tile, round_, *fetched[round_]))
    return

  def run_round(
    round_: jax.Array, fetched: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    # The next logits arrive while these are weighed.
    following = _fetch(tile, jnp.minimum(round_ + 1, rounds - 1))
    _run_round(tile, _look_up(tile, round_, *fetched))
    return following

  lax.fori_loop(0, rounds, run_round, _fetch(tile, 0))


def _fetch(tile: Tile, round_: jax.Array | int) -> tuple[jax.Array, jax.Array]:
  """What `chosen` holds for a thread in a round, and the logit of that expert."""
  plan = tile.plan
  slot = slot_of(tile, round_)
  word = plan.threads.gather(tile.buffers.chosen, slot.index)
  word = jnp.where(slot.is_used, word, 0)
  token = tile.first_token + slot.token
  index = token * plan.padded_experts + _expert(plan, word)
  return word, plan.threads.gather(tile.operands.logits, index)


def _look_up(
  tile: Tile, round_: jax.Array | int, word: jax.Array, logit: jax.Array
) -> _Choice:
  """What a thread works on in a round, of what it has fetched."""
  slot = slot_of(tile, round_)
  is_reachable = slot.is_used
  if tile.plan.groups:
    is_reachable = is_reachable & (word < UNREACHABLE)
  return _Choice(
    slot=slot,
    token=tile.first_token + slot.token,
    expert=_expert(tile.plan, word),
    logit=logit,
    is_reachable=is_reachable,
  )


def _expert(plan: Plan, word: jax.Array) -> jax.Array:
  """The expert of a word of `chosen`, without what `UNREACHABLE` adds to it."""
  return word & (UNREACHABLE - 1) if plan.groups else word


def _run_round(tile: Tile, choice: _Choice) -> None:
  """Writes the results of the tokens of a round."""
  plan, slot, token = tile.plan, choice.slot, choice.token
  results, buffers = tile.results, tile.buffers
  selection, weight = _weigh_round(tile, choice)
  number = _rank_in_token(plan, slot, selection)
  # One NaN spreads to all weights of its token.
  is_nan = threads.as_words(slot.is_used & (weight != weight))
  first_lane = tile.place.lane & ~(plan.slots - 1)
  own_lanes = ((1 << plan.slots) - 1) << first_lane
  is_counted = plan.threads.ballot(is_nan) & own_lanes == 0
  weight = jnp.where(is_counted, weight, jnp.nan)
  if plan.has_mask:
    in_range = jnp.minimum(token, plan.tokens - 1)
    is_real = plan.threads.gather(tile.operands.token_mask, in_range) != 0
    weight = jnp.where(is_real, weight, 0.0)
    is_counted = is_counted & is_real
  is_used, is_first = slot.is_used, slot.is_used & (slot.number == 0)
  counted = threads.as_words(is_counted)
  kept = counted
  if plan.shares_tokens:
    is_own = tile.is_own(token)
    is_used, kept = is_used & is_own, jnp.where(is_own, counted, -1)
  keep = threads.as_words(is_first)
  plan.threads.scatter(buffers.is_counted, slot.token, kept, keep)
  keep = threads.as_words(is_first & is_used)
  plan.threads.scatter(results.token_mask, token, counted, keep)
  place, keep = token * plan.config.top_k + number, threads.as_words(is_used)
  plan.threads.scatter(results.expert_idx, place, choice.expert, keep)
  plan.threads.scatter(results.weights, place, weight, keep)
  if plan.with_chosen:
    plan.threads.scatter(results.chosen, place, choice.logit, keep)
  if plan.with_rank:
    packed, keep = (
      choice.expert + (number << 16),
      threads.as_words(slot.is_used),
    )
    plan.threads.scatter(buffers.chosen, slot.index, packed, keep)


def write_cutoff(tile: Tile, cutoff: jax.Array) -> None:
  """Writes the cutoff of every token, `[128]`."""
  token = tile.first_token + tile.place.token
  keep = tile.place.part == 0
  if tile.plan.shares_tokens:
    keep = keep & tile.is_own(token)
  tile.threads.scatter(
    tile.results.cutoff, token, cutoff, threads.as_words(keep)
  )


def _rank_in_token(plan: Plan, slot: Slot, selection: jax.Array) -> jax.Array:
  """The place of an expert among the K of its token, the best first; int32."""
  # Ints in the order of the scores: an int that is one more beats its equals.
  bits = lax.bitcast_convert_type(selection, jnp.int32)
  key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
  rank = full(0, jnp.int32)
  for distance in range(1, plan.slots):
    # Slots are in order of the experts, and the lower of two equals comes first.
    top_bit = 1 << (distance.bit_length() - 1)
    is_upper = threads.as_words(slot.number & top_bit != 0)
    other = plan.threads.shuffle_xor(key, distance)
    rank = rank + threads.as_words(other > key - is_upper)
  return rank


def _weigh_round(tile: Tile, choice: _Choice) -> tuple[jax.Array, jax.Array]:
  """Selection scores and weights `[128]` of the choices of a round."""
  plan, config, buffers = tile.plan, tile.plan.config, tile.buffers
  logits = score.prepare(plan, choice.logit.astype(jnp.float32))
  peak = total = None
  if plan.needs_softmax_sums:
    row = choice.slot.token * plan.lanes
    peak = plan.threads.gather(buffers.softmax_sums, row)
    total = plan.threads.gather(buffers.softmax_sums, row + THREADS)
  scores = logits
  if config.score_fn != "softmax" or (
    config.needs_row_softmax and not config.selects_on_logits
  ):
    scores = score.apply_score_fn(plan, logits, peak, total)
  bias = None
  if plan.has_bias:
    index = score.bias_index(plan, choice.expert)
    bias = plan.threads.gather(buffers.expert_bias, index)
  selection = score.add_bias(
    plan, logits, logits if config.selects_on_logits else scores, bias
  )
  selection = jnp.where(choice.is_reachable, selection, NEG_INF)
  weight = _weights(plan, choice.slot, logits, scores, peak, total)
  return selection, weight


def _weights(
  plan: Plan,
  slot: Slot,
  logits: jax.Array,
  scores: jax.Array,
  peak: jax.Array | None,
  total: jax.Array | None,
) -> jax.Array:
  """Weights of scores of any size, as `jaxroute.scores.weights` makes them."""
  config = plan.config
  if config.score_fn == "softmax":
    if not config.weighs_all_logits:
      # The softmax of the chosen logits.
      peak = jnp.where(slot.is_used & (logits == logits), logits, NEG_INF)
      peak = over_lanes(plan, peak, jnp.maximum, plan.slots)
      peak = jnp.where(peak == NEG_INF, 0.0, peak)
    assert peak is not None
    exponent = logits - peak
    factor = 1.0 + _rounded_off(logits, peak)
    if not config.weighs_all_logits:
      exponentials = jnp.where(logits == logits, jnp.exp(exponent), 0.0)
      total = _sum_over_slots(plan, slot, exponentials)
      total = jnp.where(total == 0.0, 1.0, total)
  else:
    start, slope = map(np.float32, types.SCORE_TAILS[config.score_fn])
    is_far = logits < start
    exponent = jnp.where(is_far, slope * logits, 0.0)
    factor, total = jnp.where(is_far, 1.0, scores), None
  if not config.normalize_weights:
    weight = factor * jnp.exp(exponent)
    if total is not None:
      weight = plan.threads.divide(weight, total)
  else:
    weight = _normalized(plan, slot, exponent, factor, total)
  scaling = np.float32(config.scaling_factor)
  return weight if config.scaling_factor == 1.0 else weight * scaling


def _normalized(
  plan: Plan,
  slot: Slot,
  exponent: jax.Array,
  factor: jax.Array,
  divisor: jax.Array | None,
) -> jax.Array:
  """Shares of the sum + `norm_eps`, of scores `factor * exp(exponent) / divisor`."""
  config = plan.config
  eps_factor, eps_exponent = map(np.float32, config.split_norm_eps)
  shift = jnp.where(slot.is_used, exponent, NEG_INF)
  shift = over_lanes(plan, shift, jnp.maximum, plan.slots)
  shift = jnp.maximum(shift, eps_exponent)
  shares = factor * jnp.exp(exponent - shift)
  total = _sum_over_slots(plan, slot, shares)
  if config.norm_eps:
    eps = eps_factor * jnp.exp(eps_exponent - shift)
    total = total + (eps if divisor is None else eps * divisor)
  else:
    total = jnp.where(total == 0.0, 1.0, total)
  return plan.threads.divide(shares, total)


def _sum_over_slots(plan: Plan, slot: Slot, x: jax.Array) -> jax.Array:
  x = jnp.where(slot.is_used, x, 0.0)
  return over_lanes(plan, x, jnp.add, plan.slots)


def _rounded_off(x: jax.Array, y: jax.Array) -> jax.Array:
  """What the rounding of `x - y` took off; 0 if that is -inf."""
  difference = x - y
  y_taken = difference - x
  lost = (x - (difference - y_taken)) - (y + y_taken)
  return jnp.where(difference > NEG_INF, lost, 0.0)
