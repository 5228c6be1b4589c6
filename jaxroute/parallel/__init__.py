# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""All that knows the mesh: which one is in force, and what lies on it, how."""

from jaxroute.parallel import all_gather, mesh
from jaxroute.parallel.placement import shardings

__all__ = ["all_gather", "mesh", "shardings"]
