# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Published balancing rules as optax transformations.

The dual function of the balanced assignment problem has the subgradient
`load - mean`; `jaxroute.metrics.violation` is that divided by the mean. A rule
maps it to what is added to the bias, exactly as an optimizer maps a gradient to
what is added to a parameter. So every optax transformation is a rule, and
composes with these. They work on any pytree of `[..., E]` arrays, experts last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks
from jaxroute.dual import schedules


def sign(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """The auxiliary-loss-free rule: `bias += rate * sign(mean - load)`.

  Args:
    rate: u, a number of at least 0 or a schedule; 1e-3 is usual for sigmoid
      scores.

  Returns:
    A rule. Each of its steps has size 0 or u. Their sum over experts is not 0:
    chain `center()` after it if that matters.

  Raises:
    ValueError: if `rate` is negative or not finite.

  Example:
    >>> rule = sign(0.25)
    >>> violation = jnp.array([1.0, -0.5, 0.0])
    >>> rule.update(violation, rule.init(violation))[0]
    Array([-0.25,  0.25, -0.  ], dtype=float32)

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, algorithm 1.
  """
  return optax.chain(optax.scale_by_sign(), _descend(rate))


def proportional(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """The dual gradient step: `bias += rate * (mean - load) / mean`.

  All experts share the step size `rate / mean` on the dual, so the update sums
  to zero. It oscillates if `rate / mean` times the largest curvature of the
  dual exceeds 2.

  Args:
    rate: a number of at least 0 or a schedule.

  Returns:
    A rule.

  Raises:
    ValueError: if `rate` is negative or not finite.

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, section 4.3.
  """
  return _descend(rate)


def center() -> optax.GradientTransformation:
  """Subtracts from an update its mean over the experts of each layer.

  Selection does not see a common offset of the bias. Without centring, rules
  such as `sign` let it drift.

  Returns:
    A stateless transformation, to be chained before or after others.

  Example:
    >>> rule = optax.chain(sign(1.0), center())
    >>> violation = jnp.array([3.0, -1.0, -1.0, -1.0])
    >>> rule.update(violation, rule.init(violation))[0]
    Array([-1.5,  0.5,  0.5,  0.5], dtype=float32)
  """

  def subtract_mean(
    updates: optax.Updates, params: optax.Params | None = None
  ) -> optax.Updates:
    del params
    return jax.tree.map(
      lambda u: u - jnp.mean(u, axis=-1, keepdims=True), updates
    )

  return optax.stateless(subtract_mean)


def smebu(
  rate: optax.ScalarOrSchedule = 5e-4, beta: float = 0.5, kappa: float = 2.0
) -> optax.GradientTransformation:
  """Soft-clamped, centred steps with momentum (SMEBU).

  With `v = -violation` and `d = rate * tanh(kappa * v)`:
  `m = beta * m + (1 - beta) * (d - mean(d))`, where the mean is over experts,
  and `bias += m`.

  Args:
    rate: lambda, the largest step; a number of at least 0 or a schedule.
    beta: momentum, in `[0, 1)`.
    kappa: positive; the larger, the smaller the violation that saturates.

  Returns:
    A rule. With `beta = 0` and a large `kappa` it is `sign`, centred.

  Raises:
    ValueError: if an argument is out of range.

  References:
    Trinity Large, https://arxiv.org/abs/2602.17004.
  """
  fix = "0 is without momentum."
  beta = checks.as_float("beta", beta, "[0, 1)", fix, may_be_traced=True)
  fix = "A large one takes the sign."
  kappa = checks.as_float("kappa", kappa, "(0, inf)", fix, may_be_traced=True)

  def clamp(
    updates: optax.Updates, params: optax.Params | None = None
  ) -> optax.Updates:
    del params
    return jax.tree.map(lambda v: jnp.tanh(kappa * v), updates)

  return optax.chain(
    optax.stateless(clamp),
    _descend(rate),
    center(),
    optax.ema(beta, debias=False),
  )


class PidState(NamedTuple):
  """State of `pid`.

  Attributes:
    integral: like the bias, float32. Sum of the violations so far.
    previous: like the bias, float32. The last violation.
  """

  integral: optax.Updates
  previous: optax.Updates


def pid(
  proportional: float, integral: float = 0.0, derivative: float = 0.0
) -> optax.GradientTransformation:
  """PID control of the bias increment.

  `bias -= proportional * v + integral * sum(v) + derivative * (v - v_before)`
  with the violation v; the violation before the first update counts as 0.

  Args:
    proportional: gain of the violation, at least 0. LongCat-Flash's rule with
      speed mu is `pid(mu / E)`.
    integral: gain of the sum of all violations, at least 0.
    derivative: gain of the change of the violation, at least 0.

  Returns:
    A rule.

  Raises:
    ValueError: if a gain is negative or not finite.

  References:
    LongCat-Flash, https://arxiv.org/abs/2509.01322.
  """
  proportional = schedules.check_rate("proportional", proportional)
  integral = schedules.check_rate("integral", integral)
  derivative = schedules.check_rate("derivative", derivative)

  def init(params: optax.Params) -> PidState:
    zeros = optax.tree.zeros_like
    return PidState(integral=zeros(params), previous=zeros(params))

  def increment(v: jax.Array, total: jax.Array, before: jax.Array) -> jax.Array:
    return -(proportional * v + integral * total + derivative * (v - before))

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, PidState]:
    del params
    total = jax.tree.map(jnp.add, state.integral, updates)
    increments = jax.tree.map(increment, updates, total, state.previous)
    return increments, PidState(integral=total, previous=updates)

  return optax.GradientTransformation(init, update)


class TripleMomentumState(NamedTuple):
  """State of `triple_momentum`.

  Attributes:
    offset: like the bias. How far the bias, where the gradient is taken, is
      ahead of the point that the momentum moves.
    velocity: like the bias. The last move of that point.
  """

  offset: optax.Updates
  velocity: optax.Updates


def triple_momentum(
  rate: float, condition: float
) -> optax.GradientTransformation:
  """Triple momentum: the fastest fixed-step method known for its class.

  The class is that of functions with curvatures between `m` and
  `condition * m`; `rate` is the inverse of the largest. With
  `r = 1 - 1 / sqrt(condition)`, a point x makes the moves
  `v = b * v_before - (1 + r) * rate * g`, where `b = r^2 / (2 - r)`. The bias
  is `x + c * v` with `c = r^2 / ((1 + r) (2 - r))`, and g is the gradient
  there.

  Args:
    rate: a number of at least 0; no schedule, as the method is for a fixed step.
    condition: largest curvature over smallest, at least 1.

  Returns:
    A rule.

  Raises:
    ValueError: if an argument is out of range.

  References:
    Van Scoy, Freeman, Lynch, 2018, The fastest known globally convergent
    first-order method for minimizing strongly convex functions, table I.
  """
  rate = schedules.check_rate("rate", rate)
  condition = checks.as_float(
    "condition",
    condition,
    "[1, inf)",
    "It is the largest curvature over the smallest.",
    may_be_traced=True,
  )
  r = 1 - condition**-0.5
  beta = r**2 / (2 - r)
  gamma = r**2 / ((1 + r) * (2 - r))

  def init(params: optax.Params) -> TripleMomentumState:
    zeros = optax.tree.zeros_like
    return TripleMomentumState(offset=zeros(params), velocity=zeros(params))

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, TripleMomentumState]:
    del params
    velocity = jax.tree.map(
      lambda v, g: beta * v - (1 + r) * rate * g, state.velocity, updates
    )
    # The bias lies `gamma * velocity` ahead of the point.
    moves = jax.tree.map(lambda v, o: v + gamma * v - o, velocity, state.offset)
    offset = jax.tree.map(lambda v: gamma * v, velocity)
    return moves, TripleMomentumState(offset=offset, velocity=velocity)

  return optax.GradientTransformation(init, update)


def _descend(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Multiplies by minus the rate, a checked number or a schedule."""
  if not callable(rate):
    rate = schedules.check_rate("rate", rate)
  return optax.scale_by_learning_rate(rate)
