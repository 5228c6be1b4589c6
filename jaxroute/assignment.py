# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The balanced assignment problem that routing with a bias solves.

    maximise   sum of scores[i, e] x[i, e]
    subject to K experts per token, L = T K / E tokens per expert, 0 <= x <= 1.

With a multiplier, the expert bias b, on the second constraint the best x takes the
K largest of `scores + b` of every token: that is routing. What it is worth,

    g(b) = sum_i (sum of the K largest of scores[i] + b) - L sum_e b[e],

is above the value of every balanced assignment, whatever b, and equal to the best
one's at the best b. `load - L` is a subgradient of g: a balancing rule descends
on it. Where the bias is added to logits, pass logits for scores. Group limits are
not in the program; they can only lower the optimum.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import routing, types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """An optimum of the program and of its dual.

  Attributes:
    value: of the best balanced assignment: `g(expert_bias)`, and at most g of
      any other bias.
    x: `[T, E]` float64. The assignment, 0 for padding; 0s and 1s where E divides
      T K, and where it does not some tokens are split between experts.
    expert_bias: `[E]` float64, of mean 0. Where several are best, one of them.
  """

  value: float
  x: np.ndarray
  expert_bias: np.ndarray


def solve(
  scores: np.typing.ArrayLike,
  top_k: int,
  token_mask: np.typing.ArrayLike | None = None,
) -> Optimum:
  """The exact optimum, by SciPy's HiGHS in float64 on the host.

  HiGHS gets the variables near their token's cutoff at a bias that alternating
  quantiles find; the others are fixed. The dual of all T E variables then proves
  the result, or more are freed: a million take seconds, not hours.

  Args:
    scores: `[T, E]` floating point, no bias; -inf forbids an expert.
    top_k: K.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    An `Optimum`.

  Raises:
    ValueError: if `scores` has a NaN or +inf, a shape does not fit, no token is
      left, or there is no balanced assignment.
    ImportError: if SciPy is not installed.
    RuntimeError: if HiGHS gives up.

  Example:
    >>> scores = [[0.9, 0.1], [0.8, 0.7]]
    >>> best = solve(scores, top_k=1)
    >>> best.x
    array([[1., 0.],
           [0., 1.]])
    >>> round(best.value, 6)
    1.6
  """
  scores = np.asarray(scores, np.float64)
  real = _check(scores, top_k, token_mask)
  gamma = scores[real]
  bias = _alternate(gamma, top_k)
  count = 32 * gamma.shape[1]
  gap = math.inf
  while True:
    # Most variables are far from their token's cutoff: only the others are free.
    top = np.sort(gamma + bias, axis=1)[:, ::-1]
    after = (
      top[:, top_k] if top_k < top.shape[1] else np.full(len(top), -np.inf)
    )
    middle = np.where(after == -np.inf, top[:, top_k - 1] - 1, after)
    margin = gamma + bias - (middle + top[:, top_k - 1])[:, None] / 2
    finite = np.isfinite(gamma)
    free = finite & (np.abs(margin) <= _smallest(np.abs(margin[finite]), count))
    found = _solve_free(gamma, top_k, free, margin > 0)
    if found is not None:
      value, x, bias = found
      # The dual of all variables proves that those fixed were fixed rightly.
      gap = _dual_value64(gamma, bias, top_k) - value
      if gap <= 1e-9 * max(1.0, np.abs(gamma[finite]).max()) * len(gamma):
        break
    if free.sum() == finite.sum():
      if found is not None:
        raise RuntimeError(f"HiGHS left a duality gap of {gap}.")
      raise ValueError(
        f"`scores` must leave a balanced assignment of {top_k} of"
        f" {len(bias)} experts to {len(gamma)} tokens; its -inf forbid them"
        " all. Allow more experts."
      )
    count *= 4
  everywhere = np.zeros_like(scores)
  everywhere[real] = x
  return Optimum(value=value, x=everywhere, expert_bias=bias - bias.mean())


def _alternate(gamma, top_k):
  """A bias near the best: each cutoff, then each bias, is the best for the other."""
  t, e = gamma.shape
  load, bias = t * top_k / e, np.zeros(e)
  if top_k == e or load < 1 or load > t - 1:
    return bias
  for _ in range(30):
    cutoff = -np.partition(-(gamma + bias), (top_k - 1, top_k), axis=1)
    cutoff = cutoff[:, top_k - 1 : top_k + 1]
    cutoff = np.where(np.isfinite(cutoff), cutoff, 0.0).mean(axis=1)
    rank = math.floor(load)
    price = -np.partition(-(gamma - cutoff[:, None]), (rank - 1, rank), axis=0)
    price = price[rank - 1 : rank + 1]
    bias = -np.where(np.isfinite(price), price, 0.0).mean(axis=0)
  return bias - bias.mean()


def _smallest(values, count):
  """The `count`-th smallest, or the largest if there are fewer."""
  count = min(count, values.size)
  return np.partition(values, count - 1)[count - 1]


def _solve_free(gamma, top_k, free, chosen):
  """The optimum where variables that are not free are as chosen, or None."""
  from scipy import optimize, sparse

  t, e = gamma.shape
  x = np.where(free, 0.0, chosen & np.isfinite(gamma))
  token, expert = np.nonzero(free)
  n = np.arange(token.size)
  constraints = sparse.csr_array(
    (
      np.ones(2 * n.size),
      (np.concatenate([token, t + expert]), np.concatenate([n, n])),
    ),
    shape=(t + e, n.size),
  )
  found = optimize.linprog(
    -gamma[free],
    A_eq=constraints,
    b_eq=np.concatenate([top_k - x.sum(1), t * top_k / e - x.sum(0)]),
    bounds=(0, 1),
    method="highs",
  )
  if found.status == 2:
    return None
  if found.status:
    raise RuntimeError(f"HiGHS found no optimum: {found.message}")
  # Without the sign of its zeros.
  x[free] = found.x + 0.0
  value = float(np.sum(np.where(np.isfinite(gamma), gamma, 0.0) * x))
  return value, x, found.eqlin.marginals[t:]


def _dual_value64(gamma, bias, top_k):
  top = np.sort(gamma + bias, axis=1)[:, -top_k:]
  return float(top.sum() - len(gamma) * top_k * bias.mean())


def dual_value(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """g of the bias: above the value of every balanced assignment.

  Args:
    scores: `[T, E]` float32, no bias, not NaN; -inf forbids an expert.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding, which counts nothing.

  Returns:
    `[]` float32, in units of the scores, summed over the tokens.

  Raises:
    ValueError: if a shape does not fit.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> dual_value(scores, jnp.zeros(2), top_k=1)
    Array(1.5, dtype=float32)
    >>> dual_value(scores, jnp.array([-0.25, 0.0]), top_k=1)
    Array(1.25, dtype=float32)
  """
  _check_shapes(scores, top_k, token_mask)
  if expert_bias.shape != scores.shape[1:]:
    raise ValueError(
      f"`expert_bias` must be [E={scores.shape[1]}], got shape"
      f" {expert_bias.shape}. Pass the row of one layer."
    )
  selection = scores + expert_bias[None, :]
  best = jnp.sum(jax.lax.top_k(selection, top_k)[0], axis=1)
  if token_mask is None:
    count = jnp.float32(scores.shape[0])
  else:
    best = jnp.where(token_mask, best, 0.0)
    count = jnp.sum(token_mask, dtype=jnp.float32)
  return jnp.sum(best) - count * top_k * jnp.mean(expert_bias)


def primal_value(
  scores: jax.Array,
  expert_idx: jax.Array,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """The summed scores of the chosen experts.

  Routes that are not balanced can be worth more than the best balanced ones.

  Args:
    scores: `[T, E]` float32, no bias.
    expert_idx: `[T, K]` int32.
    token_mask: `[T]` bool. False marks padding, which counts nothing.

  Returns:
    `[]` float32.

  Raises:
    ValueError: if a shape does not fit.
  """
  _check_shapes(scores, expert_idx.shape[-1], token_mask)
  chosen = jnp.sum(jnp.take_along_axis(scores, expert_idx, axis=1), axis=1)
  if token_mask is not None:
    chosen = jnp.where(token_mask, chosen, 0.0)
  return jnp.sum(chosen)


def repair(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """A balanced assignment near the routes of a bias, and what is lost by it.

  Rounds of moves from overloaded to underloaded experts, cheapest first. What they
  cost, in `scores + expert_bias`, is what the dual value of the bias is above the
  value of the assignment, so above the optimum at most.

  Args:
    scores: `[T, E]` float32, no bias; -inf forbids an expert.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    x, `[T, E]` float32 in `[0, 1]`: K per token, T K / E per expert, and split
    tokens only where E does not divide T K. And the loss, `[]` float32: inf if the
    moves came to an end before balance, as where scores of -inf leave none.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> x, loss = repair(scores, jnp.zeros(2), top_k=1)
    >>> x
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    >>> float(loss)
    0.25
  """
  config = types.RouterConfig.on_scores(scores.shape[-1], top_k)
  routes = routing.route(scores, expert_bias, config, token_mask)
  t, e = scores.shape
  real = routes.token_mask
  selection = jnp.where(real[:, None], scores + expert_bias[None], -jnp.inf)
  token = jnp.arange(t)
  x = jnp.zeros((t, e)).at[token[:, None], routes.expert_idx].set(1.0)
  x = jnp.where(real[:, None], x, 0.0)
  mean = jnp.sum(real, dtype=jnp.float32) * top_k / e
  slack = 1e-6 * mean

  def imbalance(x):
    load = jnp.sum(x, axis=0)
    return jnp.maximum(load - mean, 0), jnp.maximum(mean - load, 0)

  def goes_on(carry):
    x, _, progress, rounds = carry
    return progress & (rounds < 100) & jnp.any(imbalance(x)[0] > slack)

  def move(carry):
    x, loss, _, rounds = carry
    over, under = imbalance(x)
    leave = (x > 0) & (over > slack)[None]
    enter = (x < 1) & (under > slack)[None]
    kept = jnp.where(leave, selection, jnp.inf)
    offered = jnp.where(enter, selection, -jnp.inf)
    source, target = jnp.argmin(kept, axis=1), jnp.argmax(offered, axis=1)
    cost = jnp.min(kept, axis=1) - jnp.max(offered, axis=1)
    order = jnp.argsort(cost)
    source, target, cost = source[order], target[order], cost[order]
    row = token[order]
    room = jnp.minimum(x[row, source], 1.0 - x[row, target])
    room = jnp.where(jnp.isfinite(cost), room, 0.0)
    amount = jnp.minimum(
      jnp.clip(over[source] - _before(source, room, e), 0, room),
      jnp.clip(under[target] - _before(target, room, e), 0, room),
    )
    x = x.at[row, source].add(-amount).at[row, target].add(amount)
    loss += jnp.sum(jnp.where(amount > 0, amount * cost, 0.0))
    return x, loss, jnp.any(amount > 0), rounds + 1

  start = x, jnp.float32(0), jnp.bool_(True), jnp.int32(0)
  x, loss, _, _ = jax.lax.while_loop(goes_on, move, start)
  balanced = ~jnp.any(imbalance(x)[0] > slack)
  return x, jnp.where(balanced, loss, jnp.inf)


def _before(group, amount, num_groups):
  """The sum of the earlier amounts of the same group, for every element."""
  permutation = jnp.argsort(group, stable=True)
  group, amount = group[permutation], amount[permutation]
  total = jnp.cumsum(amount) - amount
  first = jnp.searchsorted(group, jnp.arange(num_groups))
  earlier = total - total[jnp.minimum(first, group.size - 1)][group]
  return jnp.zeros_like(earlier).at[permutation].set(earlier)


def duality_gap(expert_bias: jax.Array, load: jax.Array) -> jax.Array:
  """`dual_value` less `primal_value` of the routes of a bias, from its load.

  That is `sum_e expert_bias[e] (load[e] - L)`: neither scores nor a difference of
  large sums are needed. It is 0 where the load is balanced, and then the routes
  are the best balanced ones. Where it is not, the sign tells in which direction
  the bias has to move along itself: negative, as overloaded experts mostly have
  a low bias, to grow further; positive, to shrink.

  Args:
    expert_bias: `[..., E]` float32. The bias that the tokens were routed by.
    load: `[..., E]` int32. Their load, without group limits.

  Returns:
    `[...]` float32, in units of the scores, summed over the tokens.

  Example:
    >>> duality_gap(jnp.array([-0.5, 0.5]), jnp.array([6, 2]))
    Array(-2., dtype=float32)
  """
  load = load.astype(jnp.float32)
  violation = load - jnp.mean(load, axis=-1, keepdims=True)
  return jnp.sum(expert_bias * violation, axis=-1)


def regret(
  scores: np.typing.ArrayLike, expert_bias: np.typing.ArrayLike, top_k: int
) -> float:
  """How much a sequence of biases lost against the best fixed one in hindsight.

  `sum_n g_n(expert_bias[n]) - min_b sum_n g_n(b)`, with g_n of batch n. The
  minimum is exact: the sum of the g_n is the g of all tokens together.

  Args:
    scores: `[N, T, E]` floating point: N batches.
    expert_bias: `[N, E]`. The bias that batch n was routed by.
    top_k: K.

  Returns:
    At least 0 but for rounding, in units of the scores.

  Raises:
    ValueError: as `solve` does.
  """
  scores = np.asarray(scores, np.float64)
  bias = np.asarray(expert_bias, np.float64)
  if scores.ndim != 3 or bias.shape != scores.shape[::2]:
    raise ValueError(
      "`scores` must be [N, T, E] and `expert_bias` [N, E], got"
      f" {scores.shape} and {bias.shape}."
    )
  best = solve(scores.reshape(-1, scores.shape[-1]), top_k).value
  duals = [
    _dual_value64(gamma, b, top_k)
    for gamma, b in zip(scores, bias, strict=True)
  ]
  return sum(duals) - best


def _check_shapes(scores, top_k, token_mask):
  if scores.ndim != 2:
    raise ValueError(f"`scores` must be [T, E], got shape {scores.shape}.")
  if not 1 <= top_k <= scores.shape[1]:
    raise ValueError(
      f"`top_k` must be in [1, E={scores.shape[1]}], got {top_k}."
    )
  if token_mask is not None and token_mask.shape != scores.shape[:1]:
    raise ValueError(
      f"`token_mask` must be [T={scores.shape[0]}], got {token_mask.shape}."
    )


def _check(scores, top_k, token_mask):
  """The tokens that count, as bools."""
  if token_mask is None:
    token_mask = np.ones(scores.shape[:1], np.bool_)
  real = np.asarray(token_mask, np.bool_)
  _check_shapes(scores, top_k, real)
  if not real.any():
    raise ValueError(
      "`token_mask` must leave a token, got none: nothing can be balanced."
    )
  if np.isnan(scores[real]).any() or (scores[real] == np.inf).any():
    raise ValueError(
      "`scores` must be finite or -inf, got NaN or +inf. Leave those tokens out"
      " by `token_mask`."
    )
  return real
