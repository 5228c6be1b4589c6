# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The balanced assignment as a linear program, for SciPy's HiGHS on the host.

`jaxroute.assignment.solve` states the program and proves its result. Here is
what it takes: a bias near the best, how far it leaves each variable from being
decided otherwise, and the optimum of a few variables while the others are
fixed. All is float64; `gamma` are the scores of the tokens that count.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Vertex(NamedTuple):
  """An optimum in which some variables were fixed.

  Attributes:
    value: of `x`; never above the optimum of all variables.
    x: `[T, E]` float64.
    expert_bias: `[E]` float64. The multipliers of the experts' loads.
  """

  value: float
  x: np.ndarray
  expert_bias: np.ndarray


def alternate(gamma: np.ndarray, top_k: int) -> np.ndarray:
  """A bias near the best: cutoffs and bias in turn, each best for the other."""
  t, e = gamma.shape
  rank, bias = t * top_k // e, np.zeros(e)
  if top_k == e or rank < 1 or t * top_k > (t - 1) * e:
    return bias
  for _ in range(30):
    top = -np.partition(-(gamma + bias), (top_k - 1, top_k), axis=1)
    cutoff = _finite_mean(top[:, top_k - 1 : top_k + 1], axis=1)
    needed = np.partition(cutoff[:, None] - gamma, (rank - 1, rank), axis=0)
    bias = _finite_mean(needed[rank - 1 : rank + 1], axis=0)
  return bias - bias.mean()


def _finite_mean(x: np.ndarray, axis: int) -> np.ndarray:
  """The mean along an axis, with 0 for what is infinite."""
  return np.where(np.isfinite(x), x, 0.0).mean(axis=axis)


def margin(gamma: np.ndarray, bias: np.ndarray, top_k: int) -> np.ndarray:
  """`[T, E]`: how far biased scores are above the middle of the cutoffs.

  The cutoffs of a token are its K-th and (K+1)-th largest: a chosen expert has
  a positive margin, and a variable with a large one of either sign is decided.
  """
  top = np.sort(gamma + bias, axis=1)[:, ::-1]
  last = top[:, top_k - 1]
  following = np.full(len(top), -np.inf)
  if top_k < top.shape[1]:
    following = top[:, top_k]
  # A token that can choose no further expert has all of its chosen ones
  # decided.
  following = np.where(following == -np.inf, last - 1, following)
  # -inf - -inf, of a token that has to choose a forbidden expert, is no margin.
  with np.errstate(invalid="ignore"):
    return gamma + bias - (following + last)[:, None] / 2


def numbers(first: int, total: int) -> Iterator[int]:
  """Numbers of variables to free, each four times the last; in the end all."""
  count = first
  while count < total:
    yield count
    count *= 4
  if total:
    yield total


def nearest(margin: np.ndarray, finite: np.ndarray, count: int) -> np.ndarray:
  """`[T, E]` bool: the `count` finite variables of the smallest margin, and ties."""
  distance = np.abs(margin)
  width = np.partition(distance[finite], count - 1)[count - 1]
  return finite & (distance <= width)


def solve_undecided(
  gamma: np.ndarray, top_k: int, undecided: np.ndarray, chosen: np.ndarray
) -> Vertex | None:
  """The optimum with decided variables as `chosen`; None if there is none."""
  from scipy import optimize, sparse

  t, e = gamma.shape
  x = np.where(undecided, 0.0, chosen)
  token, expert = np.nonzero(undecided)
  column = np.arange(token.size)
  rows = np.concatenate([token, t + expert])
  constraints = sparse.csr_array(
    (np.ones(rows.size), (rows, np.concatenate([column, column]))),
    shape=(t + e, column.size),
  )
  result = optimize.linprog(
    -gamma[undecided],
    A_eq=constraints,
    b_eq=np.concatenate([top_k - x.sum(1), t * top_k / e - x.sum(0)]),
    bounds=(0, 1),
    method="highs",
  )
  if result.status == 2:
    return None
  if result.status:
    raise RuntimeError(f"HiGHS found no optimum: {result.message}")
  # + 0.0 turns -0.0 into 0.0.
  x[undecided] = result.x + 0.0
  value = float(np.sum(np.where(np.isfinite(gamma), gamma, 0.0) * x))
  return Vertex(value, x, result.eqlin.marginals[t:])
