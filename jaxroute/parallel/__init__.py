# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""All that knows the mesh: which one is in force, and what lies on it, how."""

from jaxroute.parallel import all_gather, all_to_all, mesh, shards
from jaxroute.parallel.placement import shardings

__all__ = ["all_gather", "all_to_all", "mesh", "shardings", "shards"]
