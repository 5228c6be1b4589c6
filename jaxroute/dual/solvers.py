# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Methods for the dual of one batch, iteration by iteration; see `dual.solve`.

Two calls with equal arguments return the same solver, which `jax.jit` then
knows. All minimise `g(b) = sum_i (K largest of scores[i] + b) - L sum b` with
`L = T K / E`, or a stand-in for it. A method is a pair of functions, like an
optax transformation, except that it sees the scores and not only the violation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks, metrics, types
from jaxroute.dual.quantile import target_bias


class Problem(NamedTuple):
  """What does not change from iteration to iteration.

  Attributes:
    scores: `[T, E]` float32; -inf forbids an expert.
    scale: `[]` float32. Mean over the tokens of the standard deviation of their
      scores: what a step of 1 means.
  """

  scores: jax.Array
  scale: jax.Array


class Iterate(NamedTuple):
  """A bias, and what it leads to.

  Attributes:
    expert_bias: `[E]` float32.
    routing: of the tokens, by this bias.
    dual_value: `[]` float32. g of it.
  """

  expert_bias: jax.Array
  routing: types.Routing
  dual_value: jax.Array


class Solver(NamedTuple):
  """A method for the dual.

  Attributes:
    init: `(problem, expert_bias) -> state`; `expert_bias` is `[E]` float32.
    step: `(problem, state, iterate) -> (expert_bias, state)`: the next bias.
  """

  init: Callable[[Problem, jax.Array], Any]
  step: Callable[[Problem, Any, Iterate], tuple[jax.Array, Any]]


@functools.cache
def alternating_quantiles() -> Solver:
  """Repeats quantile balancing: exact coordinate minimisation, no step size.

  Returns:
    A `Solver`.

  References:
    Su, 2026, https://kexue.fm/archives/11619.
  """

  def step(problem: Problem, state: Any, at: Iterate) -> tuple[jax.Array, Any]:
    target = target_bias(problem.scores, at.expert_bias, at.routing)
    return target - jnp.mean(target), state

  return Solver(_no_state, step)


@functools.cache
def bip() -> Solver:
  """BIP-based balancing: alternating quantiles with no price below 0.

  It is for the program with at most K experts per token and at most L tokens
  per expert, whose prices of tokens (cutoffs) and experts (minus the bias) are
  at least 0. An expert that at most L tokens want without a bias has none.

  Returns:
    A `Solver`.

  References:
    Sun, 2025, https://arxiv.org/abs/2502.15451.
  """

  def step(problem: Problem, state: Any, at: Iterate) -> tuple[jax.Array, Any]:
    target = target_bias(
      problem.scores, at.expert_bias, at.routing, lowest_cutoff=0.0
    )
    return jnp.minimum(target, 0.0), state

  return Solver(_no_state, step)


def subgradient(rule: optax.GradientTransformation) -> Solver:
  """A balancing rule as a solver: one load per iteration, as in training.

  Args:
    rule: any optax transformation of the violation. Its rate is in units of the
      scores' standard deviation within a token. `dual.sign`,
      `dual.proportional`; `optax.sgd(rate, momentum)`, heavy ball, or with
      `nesterov=True`; `dual.triple_momentum`.

  Returns:
    A `Solver`.

  Raises:
    ValueError: if `rule` is no optax transformation.
  """
  checks.check_transformation("rule", rule)
  return _subgradient(rule)


@functools.cache
def _subgradient(rule: optax.GradientTransformation) -> Solver:
  def init(problem: Problem, expert_bias: jax.Array) -> optax.OptState:
    del problem
    return rule.init(expert_bias)

  def step(problem: Problem, state: Any, at: Iterate) -> tuple[jax.Array, Any]:
    violation = metrics.violation(at.routing.load)
    return _descend(rule, violation, state, at.expert_bias, problem.scale)

  return Solver(init, step)


def sinkhorn(temperature: float) -> Solver:
  """Sinkhorn's scaling of `exp(scores / temperature)` to both sums (S-BASE).

  It scales tokens to sum to K and experts to L, in turn; the bias is
  `temperature` times the logarithm of the experts' scaling. The plan that it
  balances may give a token more than once to an expert, so for K > 1 its limit
  is not the minimum of the dual, whatever the temperature.

  Args:
    temperature: of the entropy, positive, in units of the scores' standard
      deviation within a token.

  Returns:
    A `Solver`.

  Raises:
    ValueError: if `temperature` is not positive.

  References:
    Clark et al., 2022, https://arxiv.org/abs/2202.01169, section 3.1.
  """
  return _sinkhorn(_positive("temperature", temperature))


@functools.cache
def _sinkhorn(temperature: float) -> Solver:
  def step(problem: Problem, state: Any, at: Iterate) -> tuple[jax.Array, Any]:
    unit = temperature * problem.scale
    x = problem.scores / unit
    token = jax.nn.logsumexp(x + at.expert_bias[None] / unit, axis=1)
    # K is left out, because it scales the sums of tokens and of experts alike.
    is_counted = at.routing.token_mask
    count = jnp.sum(is_counted, dtype=jnp.float32)
    share = jnp.where(is_counted, -token, -jnp.inf)
    expert = jax.nn.logsumexp(x + share[:, None], axis=0)
    moved = unit * (jnp.log(count / x.shape[1]) - expert)
    moved = jnp.where(jnp.isfinite(moved), moved, at.expert_bias)
    return moved - jnp.mean(moved), state

  return Solver(_no_state, step)


def sparse_transport(
  rule: optax.GradientTransformation, regularization: float
) -> Solver:
  """Optimal transport with at most K nonzeros per token, by its semi-dual.

  A token spreads a mass of 1 over its K best experts, the more evenly the
  larger the quadratic regularisation: by the projection of their biased scores,
  over the regularisation, onto the simplex. Every expert is due the mass T / E.
  With a large regularisation, balanced masses are balanced loads.

  Args:
    rule: any optax transformation, of the experts' `mass / due - 1`; its rate
      in units of the scores' standard deviation within a token.
    regularization: positive, in the same units.

  Returns:
    A `Solver`.

  Raises:
    ValueError: if `rule` is no optax transformation, or `regularization` is not
      positive.

  References:
    Liu, Puigcerver, Blondel, 2023, Sparsity-constrained optimal transport,
    https://arxiv.org/abs/2209.15466, section 4.
  """
  checks.check_transformation("rule", rule)
  return _sparse_transport(rule, _positive("regularization", regularization))


@functools.cache
def _sparse_transport(
  rule: optax.GradientTransformation, regularization: float
) -> Solver:
  def init(problem: Problem, expert_bias: jax.Array) -> optax.OptState:
    del problem
    return rule.init(expert_bias)

  def step(problem: Problem, state: Any, at: Iterate) -> tuple[jax.Array, Any]:
    routing, num_experts = at.routing, at.expert_bias.shape[0]
    biased = problem.scores + at.expert_bias[None]
    best = jnp.take_along_axis(biased, routing.expert_idx, axis=1)
    # The projection subtracts them from each other, and -inf - -inf is NaN.
    best = jnp.maximum(best, -1e30)
    plan = jax.vmap(_onto_simplex)(best / (regularization * problem.scale))
    plan = jnp.where(routing.token_mask[:, None], plan, 0.0)
    mass = jnp.zeros(num_experts, jnp.float32)
    mass = mass.at[routing.expert_idx].add(plan)
    due = jnp.sum(routing.token_mask, dtype=jnp.float32) / num_experts
    violation = mass / jnp.maximum(due, 1e-9) - 1.0
    return _descend(rule, violation, state, at.expert_bias, problem.scale)

  return Solver(init, step)


def _descend(
  rule: optax.GradientTransformation,
  violation: jax.Array,
  state: Any,
  expert_bias: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, Any]:
  """A step of a rule whose rate is in units of `scale`."""
  updates, state = rule.update(violation, state, expert_bias)
  return expert_bias + scale * cast(jax.Array, updates), state


class BundleState(NamedTuple):
  """State of `bundle`: the cuts `g(b) >= value + slope . (b - bias)`, a centre.

  Attributes:
    slopes: `[M, E]` float32, divided by the number of assignments.
    offsets: `[M]` float32. `value - slope . bias`, divided alike; -inf if
      unused.
    center: `[E]` float32. The best bias of a serious step.
    center_value: `[]` float32. Its dual value, divided alike.
    predicted: `[]` float32. What the cuts promised for the bias just tried.
    stiffness: `[]` float32. Weight of the proximal term.
    count: `[]` int32. Cuts so far.
  """

  slopes: jax.Array
  offsets: jax.Array
  center: jax.Array
  center_value: jax.Array
  predicted: jax.Array
  stiffness: jax.Array
  count: jax.Array


def bundle(size: int = 32) -> Solver:
  """Proximal bundle method: the dual is the maximum of its cutting planes.

  The next bias minimises the last `size` cuts plus a proximal term, by
  projected gradient steps on the weights of the cuts. A step that gains a tenth
  of what the cuts promised is serious: it moves the centre and softens the
  term. Any other step only adds its cut.

  Args:
    size: cuts kept, at least 2.

  Returns:
    A `Solver`.

  Raises:
    ValueError: if `size` is below 2.

  References:
    Lemarechal, Sagastizabal, 1997, Variable metric bundle methods.
  """
  fix = "It is how many cuts are kept."
  return _bundle(checks.as_int("size", size, fix, low=2))


@functools.cache
def _bundle(size: int) -> Solver:
  def init(problem: Problem, expert_bias: jax.Array) -> BundleState:
    del problem
    zero = jnp.float32(0)
    return BundleState(
      slopes=jnp.zeros((size, expert_bias.shape[0]), jnp.float32),
      offsets=jnp.full(size, -jnp.inf, jnp.float32),
      center=expert_bias,
      center_value=jnp.float32(jnp.inf),
      predicted=zero,
      stiffness=zero,
      count=jnp.int32(0),
    )

  def step(
    problem: Problem, state: BundleState, at: Iterate
  ) -> tuple[jax.Array, BundleState]:
    e = at.expert_bias.shape[0]
    assigned = jnp.maximum(metrics.total(at.routing.load), 1.0)
    value = at.dual_value / assigned
    slope = metrics.violation(at.routing.load) / e
    slot = state.count % size
    slopes = state.slopes.at[slot].set(slope)
    offsets = state.offsets.at[slot].set(value - slope @ at.expert_bias)
    is_first = state.count == 0
    promised = state.center_value - state.predicted
    gained = state.center_value - value
    is_serious = is_first | (gained >= 0.1 * promised)
    center = jnp.where(is_serious, at.expert_bias, state.center)
    center_value = jnp.where(is_serious, value, state.center_value)
    # The first step then moves by the scores' scale for a violation of 1.
    stiffness = jnp.where(
      is_first,
      1.0 / (e * problem.scale),
      state.stiffness * jnp.where(is_serious, 0.5, 1.5),
    )
    weights = _weigh_cuts(slopes, offsets, center, stiffness)
    moved = center - weights @ slopes / stiffness
    predicted = jnp.max(offsets + slopes @ moved)
    return moved, BundleState(
      slopes=slopes,
      offsets=offsets,
      center=center,
      center_value=center_value,
      predicted=predicted,
      stiffness=stiffness,
      count=state.count + 1,
    )

  return Solver(init, step)


def _weigh_cuts(
  slopes: jax.Array,
  offsets: jax.Array,
  center: jax.Array,
  stiffness: jax.Array,
) -> jax.Array:
  """`[M]` weights on the simplex: the dual of the proximal step."""
  used = offsets > -jnp.inf
  height = jnp.where(used, offsets + slopes @ center, 0.0)
  gram = slopes @ slopes.T / stiffness
  rate = 1.0 / jnp.maximum(jnp.trace(gram), 1e-30)

  def ascend(
    i: jax.Array, carry: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    """The weights, and where Nesterov's method takes the next gradient."""
    weights, ahead = carry
    moved = ahead + rate * (height - gram @ ahead)
    moved = _onto_simplex(jnp.where(used, moved, -1e30))
    n = jnp.asarray(i, jnp.float32)
    return moved, moved + n / (n + 3.0) * (moved - weights)

  num_used = jnp.sum(used, dtype=jnp.float32)
  start = used.astype(jnp.float32) / jnp.maximum(num_used, 1.0)
  weights, _ = jax.lax.fori_loop(0, 300, ascend, (start, start))
  return weights


def _onto_simplex(x: jax.Array) -> jax.Array:
  """The nearest weights of sum 1 and at least 0."""
  # optax divides by integers here, which strict promotion refuses, and of which
  # 64-bit mode makes float64.
  with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
    return optax.projections.projection_simplex(x)


def _no_state(problem: Problem, expert_bias: jax.Array) -> tuple[()]:
  """`Solver.init` of a method without a state."""
  del problem, expert_bias
  return ()


def _positive(name: str, value: float) -> float:
  fix = "Its unit is the scores' standard deviation within a token."
  return checks.as_float(name, value, "(0, inf)", fix)
