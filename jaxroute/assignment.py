# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The balanced assignment problem that routing with a bias solves.

    maximise   sum of scores[i, e] x[i, e]
    subject to K experts per token, L = T K / E tokens per expert, 0 <= x <= 1.

With a multiplier, the expert bias b, on the second constraint the best x takes
the K largest of `scores + b` of every token: that is routing. Its value is the
dual function

    g(b) = sum_i (sum of the K largest of scores[i] + b) - L sum_e b[e].

It is at least the value of every balanced assignment, whatever b, and equal to
the best one's at the best b. `load - L` is a subgradient of g: a balancing rule
descends on it. Where the bias is added to logits, pass logits for scores. Group
limits are not in the program; they can only lower the optimum.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import checks, linear_program, metrics
from jaxroute.rounding import round_to_balanced

__all__ = [
  "Optimum",
  "complementary_slackness",
  "dual_value",
  "dual_value_of_choice",
  "duality_gap",
  "primal_value",
  "regret",
  "round_to_balanced",
  "solve",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """An optimum of the program and of its dual.

  Attributes:
    value: of the best balanced assignment: `g(expert_bias)`, and at most g of
      any other bias.
    x: `[T, E]` float64. The assignment, 0 for padding; 0s and 1s where E
      divides T K, and where it does not some tokens are split between experts.
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

  HiGHS gets the undecided variables, those near their token's cutoff at a bias
  that alternating quantiles find; the others are fixed. The dual of all T E
  variables then proves the result, or more variables are freed: a million take
  seconds, not hours.

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
  scores = _on_host("scores", scores, "[T, E]")
  top_k = _checked_top_k(top_k, scores)
  counted = _counted(scores, token_mask)
  gamma = scores[counted]
  # HiGHS takes what is below 1e-7 for 0, and fails of 1e20. A power of 2 rounds
  # nothing; near the largest float the next one up is none.
  largest = np.abs(gamma[np.isfinite(gamma)]).max(initial=0.0)
  scale = 2.0 ** min(math.frexp(largest)[1], 1023) if largest else 1.0
  vertex = _solve_until_proven(gamma / scale, top_k)
  x = np.zeros_like(scores)
  x[counted] = vertex.x
  bias = vertex.expert_bias - vertex.expert_bias.mean()
  return Optimum(value=vertex.value * scale, x=x, expert_bias=bias * scale)


def _solve_until_proven(gamma: np.ndarray, top_k: int) -> linear_program.Vertex:
  """Solves on the undecided variables, and on more until proven."""
  t, e = gamma.shape
  finite = np.isfinite(gamma)
  tolerance = 1e-9 * np.abs(gamma[finite]).max(initial=1.0) * t
  bias, gap, vertex = linear_program.alternate(gamma, top_k), math.inf, None
  for count in linear_program.numbers(32 * e, int(finite.sum())):
    margin = linear_program.margin(gamma, bias, top_k)
    undecided = linear_program.nearest(margin, finite, count)
    vertex = linear_program.solve_undecided(
      gamma, top_k, undecided, finite & (margin > 0)
    )
    if vertex is None:
      continue
    bias = vertex.expert_bias
    # The dual of all variables proves that those fixed were fixed rightly.
    gap = _host_dual_value(gamma, bias, top_k) - vertex.value
    if gap <= tolerance:
      return vertex
  if vertex is not None:
    raise RuntimeError(f"HiGHS left a duality gap of {gap}.")
  raise ValueError(
    f"`scores` must leave a balanced assignment of {top_k} of {e} experts to"
    f" {t} tokens; its -inf forbid them all. Allow more experts."
  )


def dual_value(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """g of the bias: at least the value of every balanced assignment.

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
  fix = "Flatten batch and sequence into T, and pass the row of one layer."
  checks.check_array("scores", scores, "[T, E]", "floating point", fix)
  dtype, e = "floating point", scores.shape[1]
  checks.check_array("expert_bias", expert_bias, "[E]", dtype, fix, E=e)
  top_k = _checked_top_k(top_k, scores)
  checks.check_mask(token_mask, scores.shape[0])
  if token_mask is None:
    token_mask = jnp.ones(scores.shape[:1], jnp.bool_)
  expert_bias = expert_bias.astype(jnp.float32)
  biased = scores.astype(jnp.float32) + expert_bias[None]
  best, _ = jax.lax.top_k(biased, top_k)
  return dual_value_of_choice(best, expert_bias, token_mask)


def dual_value_of_choice(
  selected: Any, expert_bias: Any, token_mask: Any
) -> Any:
  """g of the bias, from the biased scores that it makes every token choose.

  Args:
    selected: `[T, K]` floating point, JAX's or NumPy's. The K largest of each
      row of `scores + expert_bias`, in any order.
    expert_bias: `[E]` of the same dtype.
    token_mask: `[T]` bool. False marks padding, which counts nothing.

  Returns:
    `[]` of the same library and dtype, but float32 for fewer bits.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  fix = "Pass the K largest biased scores, and the bias of one layer."
  checks.check_array("selected", selected, "[T, K]", "floating point", fix)
  checks.check_array("expert_bias", expert_bias, "[E]", "floating point", fix)
  fix, t = "True marks real tokens.", selected.shape[0]
  checks.check_array("token_mask", token_mask, "[T]", "bool", fix, T=t)
  xp = selected.__array_namespace__()
  if selected.dtype.itemsize < 4:
    selected, expert_bias = (
      x.astype(jnp.float32) for x in (selected, expert_bias)
    )
  chosen = xp.where(token_mask[:, None], selected, 0.0)
  num_tokens = xp.sum(token_mask, dtype=selected.dtype)
  num_assigned = num_tokens * selected.shape[1]
  return xp.sum(xp.sum(chosen, axis=1)) - num_assigned * xp.mean(expert_bias)


def _host_dual_value(gamma: np.ndarray, bias: np.ndarray, top_k: int) -> float:
  """`dual_value` in float64, on the host."""
  best = np.sort(gamma + bias, axis=1)[:, -top_k:]
  return float(dual_value_of_choice(best, bias, np.ones(len(gamma), np.bool_)))


def primal_value(
  scores: jax.Array,
  expert_idx: jax.Array,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """The summed scores of the chosen experts.

  Routes that are not balanced can be worth more than the best balanced ones.

  Args:
    scores: `[T, E]` float32, no bias.
    expert_idx: `[T, K]` int32. One outside `[0, E)` adds nothing.
    token_mask: `[T]` bool. False marks padding, which counts nothing.

  Returns:
    `[]` float32.

  Raises:
    ValueError: if a shape does not fit.
  """
  fix = "Flatten batch and sequence into T, and pass `Routing.expert_idx`."
  checks.check_array("scores", scores, "[T, E]", "floating point", fix)
  t = scores.shape[0]
  checks.check_array("expert_idx", expert_idx, "[T, K]", "integer", fix, T=t)
  checks.check_mask(token_mask, t)
  expert_idx = checks.as_expert_idx(expert_idx, scores.shape[1])
  chosen = jnp.take_along_axis(scores, expert_idx, axis=1)
  is_expert = (expert_idx >= 0) & (expert_idx < scores.shape[1])
  chosen = jnp.where(is_expert, chosen.astype(jnp.float32), 0.0)
  chosen = jnp.sum(chosen, axis=1)
  if token_mask is not None:
    chosen = jnp.where(token_mask, chosen, 0.0)
  return jnp.sum(chosen)


def duality_gap(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """The duality gap of a bias: never negative, and 0 proves the bias optimal.

  That is the dual value of the bias minus the value of balanced routes near it,
  those of `round_to_balanced`; the optimum lies between the two. The gap is
  what the moves to balance cost, so it is not a difference of large sums. The
  moves are cheap, not the cheapest possible: at the best bias a small gap can
  remain.

  Args:
    scores: `[T, E]` float32, no bias, not NaN; -inf forbids an expert.
    expert_bias: `[E]` float32.
    top_k: K; static.
    token_mask: `[T]` bool. False marks padding.

  Returns:
    `[]` float32, in units of the scores, summed over the tokens; inf if no
    balanced routes were found, as where scores of -inf leave none.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> duality_gap(scores, jnp.zeros(2), top_k=1)
    Array(0.25, dtype=float32)
    >>> duality_gap(scores, jnp.array([-0.25, 0.0]), top_k=1)
    Array(0., dtype=float32)
  """
  _, loss = round_to_balanced(scores, expert_bias, top_k, token_mask)
  return loss


def complementary_slackness(
  expert_bias: jax.Array, load: jax.Array
) -> jax.Array:
  """The complementary-slackness residual of a bias: `sum_e b[e] (load[e] - L)`.

  That is the dual value minus the value of the routes themselves, which are not
  balanced, and it needs neither scores nor a difference of large sums. It is 0
  where the load is balanced, and then the routes are the best balanced ones. It
  is no gap and has either sign: negative if the bias should grow further along
  itself, as overloaded experts mostly have a low one; positive if it should
  shrink.

  Args:
    expert_bias: `[..., E]` float32. The bias that the tokens were routed by.
    load: `[..., E]` int32. Their load, without group limits.

  Returns:
    `[...]` float32, in units of the scores, summed over the tokens.

  Raises:
    ValueError: if a shape or dtype does not fit.

  Example:
    >>> complementary_slackness(jnp.array([-0.5, 0.5]), jnp.array([6, 2]))
    Array(-2., dtype=float32)
  """
  fix = "Pass those of the same tokens."
  checks.check_array("load", load, "[..., E]", "int32 or int64", fix)
  dtype, e = "floating point", load.shape[-1]
  checks.check_array("expert_bias", expert_bias, "[..., E]", dtype, fix, E=e)
  # `violation` is exact where float32 does not hold the counts.
  mean = metrics.total(load) / e
  return mean * jnp.sum(expert_bias * metrics.violation(load), axis=-1)


def regret(
  scores: np.typing.ArrayLike, expert_bias: np.typing.ArrayLike, top_k: int
) -> float:
  """How much a sequence of biases lost against the best fixed one in hindsight.

  `sum_n g_n(expert_bias[n]) - min_b sum_n g_n(b)`, with g_n the dual function
  of batch n. The minimum is exact: the sum of the g_n is the g of all tokens
  together.

  Args:
    scores: `[N, T, E]` floating point: N batches.
    expert_bias: `[N, E]`. The bias that batch n was routed by.
    top_k: K.

  Returns:
    At least 0 except for rounding, in units of the scores.

  Raises:
    ValueError: as `solve` does.
  """
  scores = _on_host("scores", scores, "[N, T, E]")
  bias = _on_host("expert_bias", expert_bias, "[N, E]")
  top_k = _checked_top_k(top_k, scores)
  if bias.shape != scores.shape[::2]:
    raise ValueError(
      "`scores` must be [N, T, E] and `expert_bias` [N, E], got"
      f" {scores.shape} and {bias.shape}."
    )
  best = solve(scores.reshape(-1, scores.shape[-1]), top_k).value
  duals = [
    _host_dual_value(gamma, b, top_k)
    for gamma, b in zip(scores, bias, strict=True)
  ]
  return sum(duals) - best


def _on_host(name: str, x: np.typing.ArrayLike, shape: str) -> np.ndarray:
  """A NumPy array of float64, checked."""
  fix = "Flatten batch and sequence into T; call it outside `jax.jit`."
  try:
    found = np.asarray(x)
  except (TypeError, ValueError):  # it is ragged, or traced
    found = type(x)
  checks.check_array(name, found, shape, "real", fix)
  return np.asarray(found, np.float64)


def _checked_top_k(top_k: int, scores: jax.Array | np.ndarray) -> int:
  fix = "Pass the K of the router of these scores."
  return checks.as_int("top_k", top_k, fix, E=scores.shape[-1])


def _counted(
  scores: np.ndarray, token_mask: np.typing.ArrayLike | None
) -> np.ndarray:
  """`[T]` bool: the tokens that count."""
  if token_mask is None:
    token_mask = np.ones(scores.shape[:1], np.bool_)
  counted = np.asarray(token_mask)
  checks.check_mask(counted, scores.shape[0])
  if not counted.any():
    raise ValueError(
      "`token_mask` must leave a token, got none: nothing can be balanced. True"
      " marks real tokens."
    )
  if np.isnan(scores[counted]).any() or (scores[counted] == np.inf).any():
    raise ValueError(
      "`scores` must be finite or -inf, got NaN or +inf. Leave those tokens out"
      " by `token_mask`."
    )
  return counted
