# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""All that knows the mesh: which one is in force, and the experts on it."""

from jaxroute.parallel import all_gather, all_to_all, mesh, shards

__all__ = ["all_gather", "all_to_all", "mesh", "shards"]
