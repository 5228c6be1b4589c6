# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Mixture-of-Experts routing and load balancing in JAX."""

from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  histogram,
  layer,
  losses,
  metrics,
  sharding,
)
from jaxroute.metrics import max_vio
from jaxroute.remat import save_routing
from jaxroute.routing import route
from jaxroute.step import (
  TrainState,
  accumulate,
  eval_step,
  init_router_state,
  init_train_state,
  train_step,
  update,
)
from jaxroute.types import (
  MoEOutput,
  Partition,
  RouterConfig,
  RouterState,
  Routing,
)

__all__ = [
  "MoEOutput",
  "Partition",
  "RouterConfig",
  "RouterState",
  "Routing",
  "TrainState",
  "accumulate",
  "assignment",
  "dispatch",
  "dual",
  "eval_step",
  "experts",
  "histogram",
  "init_router_state",
  "init_train_state",
  "layer",
  "losses",
  "max_vio",
  "metrics",
  "route",
  "save_routing",
  "sharding",
  "train_step",
  "update",
]
