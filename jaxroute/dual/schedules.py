# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Step sizes of the dual descent that shrink with the number of updates n.

A constant step ends in a limit cycle about as wide as the step; a shrinking one
lets the bias settle.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks


def check_rate(name: str, rate: float | jax.Array) -> Any:
  """A rate as a Python float, or as it is if it is traced.

  Args:
    name: of the argument.
    rate: a number of at least 0, also NumPy's or JAX's.

  Returns:
    `rate`.

  Raises:
    ValueError: if it is negative, or not finite in float32.
  """
  fix = "A negative rate drives loads apart; 0 freezes the bias."
  return checks.as_float(name, rate, "[0, inf)", fix, may_be_traced=True)


def inverse_sqrt(rate: float) -> optax.Schedule:
  """`rate / sqrt(n)` at the n-th update, n = 1, 2, ...

  Args:
    rate: u, the size of the first step; at least 0.

  Returns:
    An `optax.Schedule` of the zero-based update count.

  Raises:
    ValueError: if `rate` is negative or not finite.

  Example:
    >>> float(inverse_sqrt(0.5)(3))
    0.25
  """
  rate = check_rate("rate", rate)

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    return rate / jnp.sqrt(jnp.asarray(count, jnp.float32) + 1.0)

  return schedule


def inverse(rate: float) -> optax.Schedule:
  """`rate / n` at the n-th update, n = 1, 2, ...

  N updates move the bias by about `rate * ln N` in all: if the rate is too
  small, it stalls before balance.

  Args:
    rate: u, the size of the first step; at least 0.

  Returns:
    An `optax.Schedule` of the zero-based update count.

  Raises:
    ValueError: if `rate` is negative or not finite.

  Example:
    >>> float(inverse(0.5)(4))
    0.10000000149011612
  """
  rate = check_rate("rate", rate)

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    return rate / (jnp.asarray(count, jnp.float32) + 1.0)

  return schedule
