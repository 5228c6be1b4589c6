# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Balancing rules: optax transformations of the load violation; and solvers."""

from jaxroute.dual import solvers
from jaxroute.dual.quantile import quantile, quantile_bias
from jaxroute.dual.rules import (
  PidState,
  TripleMomentumState,
  center,
  pid,
  proportional,
  sign,
  smebu,
  triple_momentum,
)
from jaxroute.dual.schedules import inverse, inverse_sqrt
from jaxroute.dual.solve import Solution, solve

__all__ = [
  "PidState",
  "Solution",
  "TripleMomentumState",
  "center",
  "inverse",
  "inverse_sqrt",
  "pid",
  "proportional",
  "quantile",
  "quantile_bias",
  "sign",
  "smebu",
  "solve",
  "solvers",
  "triple_momentum",
]
