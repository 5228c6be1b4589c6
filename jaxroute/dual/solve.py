# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The dual of one batch, solved to a tolerance that a balanced assignment proves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxroute import assignment, routing, types
from jaxroute.dual import solvers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
  """What `solve` found in N iterations at most.

  Attributes:
    expert_bias: `[E]` float32, of mean 0. The best bias seen.
    dual_value: `[]` float32. g of it: at least the optimum.
    primal_value: `[]` float32. The value of a balanced assignment: at most the
      optimum. -inf if none was found.
    dual_values: `[N]` float32. g of the bias of every iteration, the first that of
      the start; NaN after the last.
    iterations: `[]` int32. Iterations done.
    converged: `[]` bool. Whether the gap of `expert_bias` is within the tolerance.
  """

  expert_bias: jax.Array
  dual_value: jax.Array
  primal_value: jax.Array
  dual_values: jax.Array
  iterations: jax.Array
  converged: jax.Array

  @property
  def gap(self) -> jax.Array:
    """`[N]` float32: the relative duality gap of every iteration, NaN after.

    That is `(g - primal_value) / |primal_value|`, at least how far g is above the
    optimum.
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

  It sees the batch: to route the same batch by the result leaks later tokens into
  the routes of earlier ones. It is for analysis, for a start, and for routers that
  may look ahead. Jitted; `jaxroute.assignment.solve` gives the exact optimum, on
  the host.

  After 1, 2, 4, 8 ... iterations, and after the last, the best bias is rounded to a
  balanced assignment (`jaxroute.assignment.repair`), which costs about as much as
  ten iterations and bounds the optimum from below.

  Args:
    scores: `[T, E]` float32, no bias; -inf forbids an expert. Where the bias is
      added to logits, pass those.
    top_k: K; static.
    solver: from `jaxroute.dual.solvers`; static. None for `bundle()`, which needs
      no rate and stops nowhere short of the optimum; `alternating_quantiles()` is
      faster to a gap of 1e-3.
    token_mask: `[T]` bool. False marks padding.
    expert_bias: `[E]` float32. Where to start; None for 0.
    tolerance: relative duality gap to stop at; 0 goes on until it rounds to 0.
    max_iterations: N; static.

  Returns:
    A `Solution`. Look at `converged`: a solver that stops short, scores with NaN
    or no balanced assignment leave it False, and what is NaN stays NaN.

  Raises:
    ValueError: if a shape or dtype does not fit, or an argument is out of range.

  Example:
    >>> scores = jnp.array([[0.75, 0.25], [0.75, 0.5]])
    >>> solution = solve(scores, top_k=1)
    >>> bool(solution.converged), float(solution.dual_value)
    (True, 1.25)
  """
  if max_iterations < 1:
    raise ValueError(
      f"`max_iterations` must be at least 1, got {max_iterations}."
    )
  if not isinstance(tolerance, jax.Array) and not 0 <= tolerance < 1:
    raise ValueError(f"`tolerance` must be in [0, 1), got {tolerance}.")
  solver = solver or solvers.bundle()
  if expert_bias is None:
    expert_bias = jnp.zeros(scores.shape[-1:], jnp.float32)
  return _solve(
    scores, expert_bias, token_mask, tolerance, top_k, solver, max_iterations
  )


@functools.partial(
  jax.jit, static_argnames=("top_k", "solver", "max_iterations")
)
def _solve(
  scores, expert_bias, token_mask, tolerance, top_k, solver, max_iterations
):
  config = types.RouterConfig.on_scores(scores.shape[-1], top_k)
  routing.check_inputs(scores, expert_bias, config, token_mask)
  # Routing passes a NaN by; here it has to show.
  is_nan = jnp.isnan(scores)
  if token_mask is not None:
    is_nan &= token_mask[:, None]
  broken = jnp.any(is_nan)
  scores = jnp.where(jnp.isnan(scores), 0.0, scores)
  problem = solvers.Problem(scores, _scale(scores, token_mask))

  def iterate(carry):
    bias, state, best, best_value, primal, values, n, _ = carry
    routes = routing.route(scores, bias, config, token_mask)
    value = _dual_value(scores, bias, routes)
    better = value < best_value
    best = jnp.where(better, bias, best)
    best_value = jnp.where(better, value, best_value)
    values = values.at[n].set(value)
    n += 1
    due = ((n & (n - 1)) == 0) | (n == max_iterations)
    primal = jax.lax.cond(
      due,
      lambda: jnp.maximum(primal, best_value - loss_of_balance(best)),
      lambda: primal,
    )
    done = due & (_relative(best_value, primal) <= tolerance)
    bias, state = solver.step(problem, state, bias, routes, value)
    return bias, state, best, best_value, primal, values, n, done

  def loss_of_balance(bias):
    return assignment.repair(scores, bias, top_k, token_mask)[1]

  def goes_on(carry):
    *_, n, done = carry
    return ~done & (n < max_iterations)

  start = (
    expert_bias,
    solver.init(problem, expert_bias),
    expert_bias,
    jnp.float32(jnp.inf),
    jnp.float32(-jnp.inf),
    jnp.full(max_iterations, jnp.nan, jnp.float32),
    jnp.int32(0),
    jnp.bool_(False),
  )
  _, _, best, best_value, primal, values, n, done = jax.lax.while_loop(
    goes_on, iterate, start
  )

  def unless_broken(x):
    return jnp.where(broken, jnp.nan, x)

  return Solution(
    expert_bias=unless_broken(best - jnp.mean(best)),
    dual_value=unless_broken(best_value),
    primal_value=unless_broken(primal),
    dual_values=unless_broken(values),
    iterations=n,
    converged=done & ~broken,
  )


def _dual_value(scores, bias, routes):
  """g of the bias that the routes are of."""
  chosen = jnp.take_along_axis(
    scores + bias[None], routes.expert_idx, axis=1, mode="promise_in_bounds"
  )
  chosen = jnp.where(routes.token_mask[:, None], chosen, 0.0)
  count = jnp.sum(routes.token_mask, dtype=jnp.float32)
  top_k = routes.expert_idx.shape[1]
  return jnp.sum(jnp.sum(chosen, axis=1)) - count * top_k * jnp.mean(bias)


def _scale(scores, token_mask):
  """Mean over tokens of the standard deviation of their finite scores."""
  finite = jnp.isfinite(scores)
  if token_mask is not None:
    finite &= token_mask[:, None]
  deviation = jnp.std(scores, axis=1, where=finite)
  counted = jnp.any(finite, axis=1)
  scale = jnp.mean(deviation, where=counted)
  return jnp.where(scale > 0, scale, 1.0)


def _relative(dual_value, primal_value):
  return (dual_value - primal_value) / jnp.maximum(jnp.abs(primal_value), 1e-30)
