# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rounds the routes of a bias to a balanced assignment, on the device.

The primal heuristic of `jaxroute.assignment`: it starts from the routes, which
are optimal for the bias but not balanced, and moves tokens from overloaded to
underloaded experts until they are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxroute import routing, types
from jaxroute.parallel import mesh

# Loads within this share of the mean count as balanced.
_TOLERANCE = 1e-6


class _Progress(NamedTuple):
  """What a round of moves starts from.

  Attributes:
    x: `[T, E]` float32. The assignment so far.
    loss: `[]` float32. What its moves cost.
    moved: `[]` bool. Whether the last round moved anything.
    rounds: `[]` int32. Rounds done.
  """

  x: jax.Array
  loss: jax.Array
  moved: jax.Array
  rounds: jax.Array


class _Moves(NamedTuple):
  """One move per token from an expert to another, the cheapest first.

  Attributes:
    token: `[T]` int32.
    source: `[T]` int32. The expert that the token leaves.
    target: `[T]` int32. The expert that it enters.
    cost: `[T]` float32. What a whole token loses in selection score, at least
      0; inf where the token has no move.
  """

  token: jax.Array
  source: jax.Array
  target: jax.Array
  cost: jax.Array


def round_to_balanced(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Rounds the routes of a bias to a balanced assignment near them.

  In every round each token may move from an overloaded to an underloaded
  expert, and the cheapest moves are made. What they cost in
  `scores + expert_bias` is the dual value of the bias minus the value of the
  assignment, so the bias is at most that far above the optimum.

  Args:
    scores: `[T, E]` float32, no bias, not NaN; -inf forbids an expert.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    x, `[T, E]` float32 in `[0, 1]`: K per token, T K / E per expert, and split
    tokens only where E does not divide T K. And the loss, `[]` float32: at
    least 0, and inf if scores of -inf leave no balanced assignment within
    reach.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> x, loss = round_to_balanced(scores, jnp.zeros(2), top_k=1)
    >>> x
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    >>> float(loss)
    0.25
  """
  config = routing.check_scores(scores, expert_bias, top_k, token_mask)
  return _round(scores, expert_bias, token_mask, config=config)


@functools.partial(jax.jit, static_argnames="config")
def _round(
  scores: jax.Array,
  expert_bias: jax.Array,
  token_mask: jax.Array | None,
  *,
  config: types.RouterConfig,
) -> tuple[jax.Array, jax.Array]:
  """See `round_to_balanced`, which checks the arguments."""
  e, top_k = config.num_experts, config.top_k
  scores = mesh.whole(scores.astype(jnp.float32))
  expert_bias = mesh.whole(expert_bias)
  if token_mask is not None:
    token_mask = mesh.whole(token_mask)
  if not scores.size:
    return scores, jnp.float32(0)
  routes = routing.route(scores, expert_bias, config, token_mask)
  counted = routes.token_mask[:, None]
  selection = jnp.where(counted, scores + expert_bias[None], -jnp.inf)
  token = jnp.arange(scores.shape[0])[:, None]
  chosen = jnp.zeros(scores.shape, jnp.bool_)
  chosen = chosen.at[token, routes.expert_idx].set(True) & counted
  num_assigned = jnp.sum(counted, dtype=jnp.float32) * top_k
  mean = num_assigned / e
  # A round that cuts a move short balances an expert for good: at most E do.
  # Any other empties or fills a share of every token that can move: at most 2 K
  # do.
  max_rounds = 2 * (e + top_k)

  def goes_on(progress: _Progress) -> jax.Array:
    over, _ = _imbalance(progress.x, mean)
    return progress.moved & (progress.rounds < max_rounds) & jnp.any(over > 0)

  def move(progress: _Progress) -> _Progress:
    over, under = _imbalance(progress.x, mean)
    # A token leaves chosen experts and enters others, with no larger selection
    # scores: no move costs less than 0, and the loss is a sum of such costs.
    moves = _cheapest_moves(
      selection,
      can_leave=chosen & (progress.x > 0) & (over > 0)[None],
      can_enter=~chosen & (progress.x < 1) & (under > 0)[None],
    )
    amount = _share_out(moves, progress.x, over, under)
    cost = amount * jnp.where(amount > 0, moves.cost, 0.0)
    x = progress.x.at[moves.token, moves.source].add(-amount)
    return _Progress(
      x=x.at[moves.token, moves.target].add(amount),
      loss=progress.loss + jnp.sum(cost),
      moved=jnp.any(amount > 0),
      rounds=progress.rounds + 1,
    )

  start = _Progress(
    x=chosen.astype(jnp.float32),
    loss=jnp.float32(0),
    moved=jnp.bool_(True),
    rounds=jnp.int32(0),
  )
  start, _ = mesh.vary_alike((start, scores))
  end = jax.lax.while_loop(goes_on, move, start)
  over, _ = _imbalance(end.x, mean)
  is_allowed = ~jnp.any((end.x > 0) & (selection == -jnp.inf))
  is_balanced = ~jnp.any(over > 0) & is_allowed
  return end.x, jnp.where(is_balanced, end.loss, jnp.inf)


def _imbalance(x: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[E]` float32 each: how far loads are above and below the mean, or 0."""
  excess = jnp.sum(x, axis=0) - mean
  excess = jnp.where(jnp.abs(excess) > _TOLERANCE * mean, excess, 0.0)
  return jnp.maximum(excess, 0.0), jnp.maximum(-excess, 0.0)


def _cheapest_moves(
  selection: jax.Array, can_leave: jax.Array, can_enter: jax.Array
) -> _Moves:
  """The cheapest move of every token between experts that allow it."""
  kept = jnp.where(can_leave, selection, jnp.inf)
  offered = jnp.where(can_enter, selection, -jnp.inf)
  lost, gained = jnp.min(kept, axis=1), jnp.max(offered, axis=1)
  can_move = jnp.isfinite(lost) & jnp.isfinite(gained)
  # `route` may have compared scores that XLA computed with other last bits.
  cost = jnp.maximum(lost - jnp.where(can_move, gained, 0.0), 0.0)
  cost = jnp.where(can_move, cost, jnp.inf)
  order = jnp.argsort(cost)
  return _Moves(
    token=order,
    source=jnp.argmin(kept, axis=1)[order],
    target=jnp.argmax(offered, axis=1)[order],
    cost=cost[order],
  )


def _share_out(
  moves: _Moves, x: jax.Array, over: jax.Array, under: jax.Array
) -> jax.Array:
  """`[T]` float32: how much of each move is made, the earlier ones first.

  No expert gets from overloaded to underloaded or back: a source gives `over`
  at most, and a target takes `under`.
  """
  held = x[moves.token, moves.source]
  space = 1.0 - x[moves.token, moves.target]
  wanted = jnp.where(moves.cost < jnp.inf, jnp.minimum(held, space), 0.0)
  left_over = over[moves.source] - _sum_before(moves.source, wanted, over.size)
  left_under = under[moves.target] - _sum_before(
    moves.target, wanted, under.size
  )
  return jnp.clip(jnp.minimum(left_over, left_under), 0.0, wanted)


def _sum_before(
  group: jax.Array, amount: jax.Array, num_groups: int
) -> jax.Array:
  """The sum of the earlier amounts of the same group, for every element."""
  permutation = jnp.argsort(group, stable=True)
  group, amount = group[permutation], amount[permutation]
  total = jnp.cumsum(amount) - amount
  first = jnp.searchsorted(group, jnp.arange(num_groups))
  before = total - total[jnp.minimum(first, group.size - 1)][group]
  return jnp.zeros_like(before).at[permutation].set(before)
