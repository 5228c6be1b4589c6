# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on TPU: scores, choice, weights and loads in one pass."""

from jaxroute.kernels.tpu.route.call import Outputs, project_and_route, route
from jaxroute.kernels.tpu.route.plan import unsupported
from jaxroute.kernels.tpu.route.projection import (
  unsupported as unsupported_projection,
)

__all__ = [
  "Outputs",
  "project_and_route",
  "route",
  "unsupported",
  "unsupported_projection",
]
