# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Balancing rules: optax transformations of the load violation."""

from jaxroute.dual.rules import PidState, center, pid, proportional, sign, smebu
from jaxroute.dual.schedules import inverse, inverse_sqrt

__all__ = [
  "PidState",
  "center",
  "inverse",
  "inverse_sqrt",
  "pid",
  "proportional",
  "sign",
  "smebu",
]
