# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on GPU."""

from jaxroute.kernels.gpu.route.call import Outputs, route
from jaxroute.kernels.gpu.route.lanes import unsupported

__all__ = ["Outputs", "route", "unsupported"]
