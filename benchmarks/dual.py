# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Solvers of the balanced assignment's dual: iterations and time to a gap.

Gaps are to the exact optimum. One process runs all, so a busy machine slows all
alike. For scores of a real router, train one first:

  python examples/lm/train.py --num_experts=64 --top_k=8 --expert_size=32 \\
    --steps=300 --save_scores --out=runs/scores
  python benchmarks/dual.py --scores=runs/scores/scores.npz
"""

import multiprocessing
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from absl import app, flags

from jaxroute import assignment, dual
from jaxroute.dual import solvers

_SCORES = flags.DEFINE_string(
  "scores",
  "",
  "A scores.npz of examples/lm/train.py; its last layer is an instance.",
)
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Tokens of every instance.")
_ITERATIONS = flags.DEFINE_integer(
  "iterations", 200, "Iterations of every solver."
)
_HIGHS_SECONDS = flags.DEFINE_float(
  "highs_seconds",
  120.0,
  "When to stop HiGHS on the whole program; 0 leaves it out.",
)

# Rates and temperatures are in units of the scores' standard deviation.
SOLVERS = {
  "alternating quantiles": solvers.alternating_quantiles(),
  "BIP": solvers.bip(),
  "sign, 0.3 / sqrt(n)": solvers.subgradient(dual.sign(dual.inverse_sqrt(0.3))),
  "proportional, 0.2": solvers.subgradient(dual.proportional(0.2)),
  "heavy ball, 0.2, 0.5": solvers.subgradient(optax.sgd(0.2, 0.5)),
  "Nesterov, 0.1, 0.5": solvers.subgradient(optax.sgd(0.1, 0.5, nesterov=True)),
  "triple momentum, 0.1, 4": solvers.subgradient(
    dual.triple_momentum(0.1, 4.0)
  ),
  "Sinkhorn, 0.1": solvers.sinkhorn(0.1),
  "sparse transport, 10": solvers.sparse_transport(optax.sgd(0.2, 0.5), 10.0),
  "proximal bundle, 32 cuts": solvers.bundle(),
}

TARGETS = (1e-3, 1e-4, 1e-6)


def instances(tokens: int) -> dict[str, tuple[np.ndarray, int]]:
  """The instances by title: scores `[T, E]` and K."""
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(tokens, 64))
  skewed = noise + np.linspace(0, 2, 64)
  # Tokens of one kind want the same experts, as in a corpus.
  kinds = rng.normal(size=(32, 64))[rng.integers(0, 32, tokens)]
  softmax = np.exp(1.5 * kinds + 0.5 * noise)
  found = {
    "sigmoid, skewed": (1 / (1 + np.exp(-skewed)), 8),
    "softmax, 32 kinds of tokens": (softmax / softmax.sum(1, keepdims=True), 6),
  }
  if _SCORES.value:
    with np.load(_SCORES.value) as file:
      scores, top_k = file["scores"][-1][:tokens], int(file["top_k"])
    found[f"router of {_SCORES.value}"] = scores, top_k
  return {
    title: (scores.astype(np.float32), top_k)
    for title, (scores, top_k) in found.items()
  }


def seconds_of(call: Callable[[], object]) -> float:
  """The shortest of three calls, after one that compiles."""
  jax.block_until_ready(call())
  times = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return min(times)


def solve_by_highs(scores: np.ndarray, top_k: int) -> None:
  """Solves the whole program, with T E variables, by SciPy's HiGHS."""
  t, e = scores.shape
  n = np.arange(t * e)
  constraints = scipy.sparse.csr_array(
    (np.ones(2 * n.size), (np.concatenate([n // e, t + n % e]), np.tile(n, 2)))
  )
  bounds = np.concatenate([np.full(t, top_k), np.full(e, t * top_k / e)])
  found = scipy.optimize.linprog(
    -scores.ravel().astype(np.float64),
    A_eq=constraints,
    b_eq=bounds,
    bounds=(0, 1),
    method="highs",
  )
  assert found.status == 0, found.message


def highs_seconds(scores: np.ndarray, top_k: int, limit: float) -> str:
  """The time of HiGHS, in a process to kill: it may exceed its own limit."""
  process = multiprocessing.get_context("fork").Process(
    target=solve_by_highs, args=(scores, top_k)
  )
  start = time.perf_counter()
  process.start()
  process.join(limit)
  seconds = time.perf_counter() - start
  if process.is_alive():
    process.kill()
    process.join()
    return f"stopped after {seconds:.0f} s"
  return f"{seconds:.2f} s"


def print_instance(title: str, scores: np.ndarray, top_k: int) -> None:
  """Solves one instance by every solver and prints the table."""
  t, e = scores.shape
  start = time.perf_counter()
  best = assignment.solve(scores, top_k).value
  exact = time.perf_counter() - start
  print(f"\n{title}: T={t}, E={e}, K={top_k}")
  if _HIGHS_SECONDS.value:
    took = highs_seconds(scores, top_k, _HIGHS_SECONDS.value)
    print(f"  HiGHS, all {t * e:,} variables: {took}")
  print(f"  assignment.solve, HiGHS on the undecided: {exact:.2f} s")
  targets = " ".join(f"{x:>7.0e}" for x in TARGETS)
  print(f"  {'':37s} {'steps to':>23s} {'seconds to':>23s}")
  print(
    f"  {'solver':28s} {'ms/step':>8s} {targets} {targets} {'best gap':>9s}"
    "  proven to 1e-04"
  )
  for name, solver in SOLVERS.items():

    def solve(
      tolerance: jax.typing.ArrayLike, solver: solvers.Solver = solver
    ) -> dual.Solution:
      return dual.solve(
        scores,
        top_k,
        solver,
        tolerance=tolerance,
        max_iterations=_ITERATIONS.value,
      )

    # A gap that rounds to 0 ends it early; the values after are inf.
    to_the_end = solve(0.0)
    seconds = seconds_of(lambda solve=solve: solve(0.0))
    gap = np.asarray(to_the_end.dual_values, np.float64) / best - 1
    step = seconds / int(to_the_end.iterations)
    proven = solve(1e-4)
    cells = [f"{step * 1e3:8.2f}"]
    steps = [np.flatnonzero(gap <= x) for x in TARGETS]
    cells += [f"{s[0] if s.size else '-':>7}" for s in steps]
    cells += [f"{f'{s[0] * step:.3f}' if s.size else '-':>7}" for s in steps]
    # A sum in float32 is no nearer than 1e-7.
    cells.append(f"{max(gap.min(), 1e-7):9.1e}")
    if proven.converged:
      took = seconds_of(lambda solve=solve: solve(1e-4))
      cells.append(f" {int(proven.iterations)} steps, {took:.3f} s")
    else:
      cells.append(" no")
    print(f"  {name:28s} " + " ".join(cells))


def main(argv: list[str]) -> None:
  del argv
  print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
  for title, (scores, top_k) in instances(_TOKENS.value).items():
    print_instance(title, scores, top_k)


if __name__ == "__main__":
  app.run(main)
