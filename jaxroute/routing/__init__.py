# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tokens to experts: `route`, and the projection before it."""

from jaxroute.routing import bias_histogram
from jaxroute.routing.api import (
  Implementation,
  check_config,
  check_inputs,
  check_router_weight,
  check_routing,
  check_scores,
  project_and_route,
  route,
)
from jaxroute.routing.projection import project

__all__ = [
  "Implementation",
  "bias_histogram",
  "check_config",
  "check_inputs",
  "check_router_weight",
  "check_routing",
  "check_scores",
  "project",
  "project_and_route",
  "route",
]
