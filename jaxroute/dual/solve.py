# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Solves the dual of one batch to a tolerance that balanced routes prove."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import assignment, checks, routing, types
from jaxroute.dual import solvers
from jaxroute.parallel import mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
  """What `solve` found in N iterations at most.

  Attributes:
    expert_bias: `[E]` float32, of mean 0. The best bias seen.
    dual_value: `[]` float32. g of it: at least the optimum.
    primal_value: `[]` float32. The value of a balanced assignment: at most the
      optimum. -inf if none was found.
    dual_values: `[N]` float32. g of the bias of every iteration, from the
      initial bias on; inf for iterations that were not done.
    iterations: `[]` int32. Iterations done.
    converged: `[]` bool. Whether the gap of `expert_bias` is within the
      tolerance.
  """

  expert_bias: jax.Array
  dual_value: jax.Array
  primal_value: jax.Array
  dual_values: jax.Array
  iterations: jax.Array
  converged: jax.Array

  @property
  def gap(self) -> jax.Array:
    """`[N]` float32: the relative duality gap of every iteration, inf after.

    That is `(g - primal_value) / |primal_value|`, which is at least the
    distance of g from the optimum, relative to it; inf where no balanced
    assignment was found.
    """
    return _relative(self.dual_values, self.primal_value)


def solve(
  scores: jax.Array,
  top_k: int,
  solver: solvers.Solver | None = None,
  *,
  token_mask: jax.Array | None = None,
  expert_bias: jax.Array | None = None,
  tolerance: float = 1e-4,
  max_iterations: int = 100,
) -> Solution:
  """A bias for one batch whose routes are as good as balanced ones can be.

  It sees the batch: to route the same batch by the result leaks later tokens
  into the routes of earlier ones. Use it for analysis, to initialise a bias,
  and for routers that may look ahead. Jitted; `jaxroute.assignment.solve` gives
  the exact optimum, on the host.

  After 1, 2, 4, 8 ... iterations, and after the last, the best bias is rounded
  to a balanced assignment (`jaxroute.assignment.round_to_balanced`). That costs
  about as much as ten iterations and bounds the optimum from below.

  Args:
    scores: `[T, E]` float32, no bias; -inf forbids an expert. Where the bias is
      added to logits, pass those.
    top_k: K; static.
    solver: from `jaxroute.dual.solvers`; static. None for `bundle()`, which
      needs no rate and stops nowhere short of the optimum;
      `alternating_quantiles()` is faster to a gap of 1e-3.
    token_mask: `[T]` bool. False marks padding.
    expert_bias: `[E]` float32. Where to start; None for 0.
    tolerance: relative duality gap to stop at; 0 goes on until it rounds to 0.
    max_iterations: N; static.

  Returns:
    A `Solution`. Look at `converged`: a solver that stops short, scores with
    NaN or no balanced assignment leave it False, and what is NaN stays NaN.

  Raises:
    ValueError: if a shape or dtype does not fit, or an argument is out of
      range.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> solution = solve(scores, top_k=1)
    >>> bool(solution.converged), float(solution.dual_value)
    (True, 1.25)
  """
  if expert_bias is None:
    expert_bias = jnp.zeros(np.shape(scores)[-1:], jnp.float32)
  config = routing.check_scores(scores, expert_bias, top_k, token_mask)
  fix = "It is how often the tokens are routed. The default is 100."
  max_iterations = checks.as_int("max_iterations", max_iterations, fix)
  fix = "It is a relative gap; 0 goes on until that rounds to 0."
  tolerance = checks.as_float(
    "tolerance", tolerance, "[0, 1)", fix, may_be_traced=True
  )
  if solver is None:
    solver = solvers.bundle()
  fix = "Pass what a function of `jaxroute.dual.solvers` returns."
  checks.check_instance("solver", solver, solvers.Solver, fix)
  return _solve_guarded(
    scores, expert_bias, token_mask, tolerance, config, solver, max_iterations
  )


class _Progress(NamedTuple):
  """What one iteration hands to the next.

  Attributes:
    bias: `[E]` float32. The bias to try.
    solver_state: of the solver.
    best_bias: `[E]` float32. The bias with the smallest dual value so far.
    best_value: `[]` float32. That dual value.
    primal_value: `[]` float32. The best balanced assignment so far; -inf if
      none.
    dual_values: `[N]` float32. As in `Solution`.
    iteration: `[]` int32. Iterations done.
    converged: `[]` bool. Whether the last check proved the tolerance.
  """

  bias: jax.Array
  solver_state: Any
  best_bias: jax.Array
  best_value: jax.Array
  primal_value: jax.Array
  dual_values: jax.Array
  iteration: jax.Array
  converged: jax.Array


@functools.partial(
  jax.jit, static_argnames=("config", "solver", "max_iterations")
)
def _solve_guarded(
  scores: jax.Array,
  expert_bias: jax.Array,
  token_mask: jax.Array | None,
  tolerance: jax.typing.ArrayLike,
  config: types.RouterConfig,
  solver: solvers.Solver,
  max_iterations: int,
) -> Solution:
  """`_solve`, and NaN for every number if a counted token has a NaN score."""
  scores = mesh.whole(scores.astype(jnp.float32))
  if token_mask is None:
    token_mask = jnp.ones(scores.shape[:1], jnp.bool_)
  expert_bias, token_mask = map(mesh.whole, (expert_bias, token_mask))
  is_nan = jnp.isnan(scores)
  is_broken = jnp.any(is_nan & token_mask[:, None])
  # Routing lets no NaN win, so it would be hidden: solve without, and mark the
  # result.
  solution = _solve(
    jnp.where(is_nan, 0.0, scores),
    expert_bias,
    token_mask,
    tolerance,
    config,
    solver,
    max_iterations,
  )
  return jax.tree.map(lambda x: _unless(is_broken, x), solution)


def _unless(is_broken: jax.Array, x: jax.Array) -> jax.Array:
  """`x`, or if broken NaN for a float and False for a bool; a count stays."""
  if x.dtype == jnp.bool_:
    return x & ~is_broken
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.where(is_broken, jnp.nan, x)
  return x


def _solve(
  scores: jax.Array,
  expert_bias: jax.Array,
  token_mask: jax.Array,
  tolerance: jax.typing.ArrayLike,
  config: types.RouterConfig,
  solver: solvers.Solver,
  max_iterations: int,
) -> Solution:
  """Routes, and takes a step of the solver, until proven or out of steps."""
  problem = solvers.Problem(scores, _scale(scores, token_mask))

  def value_of_balanced(bias: jax.Array, dual_value: jax.Array) -> jax.Array:
    return dual_value - assignment.duality_gap(
      scores, bias, config.top_k, token_mask
    )

  def iterate(p: _Progress) -> _Progress:
    routes = routing.route(scores, p.bias, config, token_mask)
    value = _dual_value(scores, p.bias, routes)
    is_better = value < p.best_value
    best_bias = jnp.where(is_better, p.bias, p.best_bias)
    best_value = jnp.where(is_better, value, p.best_value)
    iteration = p.iteration + 1
    is_check = _is_power_of_two(iteration) | (iteration == max_iterations)
    primal_value = jax.lax.cond(
      is_check,
      lambda: jnp.maximum(
        p.primal_value, value_of_balanced(best_bias, best_value)
      ),
      lambda: p.primal_value,
    )
    is_close = _relative(best_value, primal_value) <= tolerance
    bias, solver_state = solver.step(
      problem, p.solver_state, solvers.Iterate(p.bias, routes, value)
    )
    return _Progress(
      bias=bias,
      solver_state=solver_state,
      best_bias=best_bias,
      best_value=best_value,
      primal_value=primal_value,
      dual_values=p.dual_values.at[p.iteration].set(value),
      iteration=iteration,
      converged=is_check & is_close,
    )

  def goes_on(p: _Progress) -> jax.Array:
    return ~p.converged & (p.iteration < max_iterations)

  start = _Progress(
    bias=expert_bias,
    solver_state=solver.init(problem, expert_bias),
    best_bias=expert_bias,
    best_value=jnp.float32(jnp.inf),
    primal_value=jnp.float32(-jnp.inf),
    dual_values=jnp.full(max_iterations, jnp.inf, jnp.float32),
    iteration=jnp.int32(0),
    converged=jnp.bool_(False),
  )
  start, _ = mesh.vary_alike((start, scores))
  end = jax.lax.while_loop(goes_on, iterate, start)
  return Solution(
    expert_bias=end.best_bias - jnp.mean(end.best_bias),
    dual_value=end.best_value,
    primal_value=end.primal_value,
    dual_values=end.dual_values,
    iterations=end.iteration,
    converged=end.converged,
  )


def _is_power_of_two(n: jax.Array) -> jax.Array:
  """Whether a positive int32 has one bit set."""
  return (n & (n - 1)) == 0


def _dual_value(
  scores: jax.Array, bias: jax.Array, routes: types.Routing
) -> jax.Array:
  """g of the bias, from its routes: the K largest are known from them."""
  selected = jnp.take_along_axis(
    scores + bias[None], routes.expert_idx, axis=1, mode="promise_in_bounds"
  )
  return assignment.dual_value_of_choice(selected, bias, routes.token_mask)


def _scale(scores: jax.Array, token_mask: jax.Array) -> jax.Array:
  """Mean over tokens of the standard deviation of their finite scores."""
  is_finite = jnp.isfinite(scores) & token_mask[:, None]
  counted = jnp.any(is_finite, axis=1)
  # A token without a finite score takes part with zeros: of none of them the
  # deviation would be 0 / 0.
  deviation = jnp.std(
    jnp.where(is_finite, scores, 0.0),
    axis=1,
    where=is_finite | ~counted[:, None],
  )
  num_counted = jnp.sum(counted, dtype=jnp.float32)
  scale = jnp.sum(deviation) / jnp.maximum(num_counted, 1.0)
  return jnp.where(scale > 0, scale, 1.0)


def _relative(dual_value: jax.Array, primal_value: jax.Array) -> jax.Array:
  """The relative gap; inf if there is no primal value, NaN if one is NaN."""
  size = jnp.abs(primal_value)
  size = jnp.where(size < jnp.inf, jnp.maximum(size, 1e-30), 1.0)
  return (dual_value - primal_value) / size
