# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Mixture-of-Experts routing and load balancing in JAX."""

from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  layer,
  losses,
  metrics,
  parallel,
  routing,
)
from jaxroute.metrics import max_vio
from jaxroute.remat import save_routing
from jaxroute.routing import route
from jaxroute.step import accumulate, init_router_state, update
from jaxroute.train import (
  TrainState,
  eval_step,
  init_train_state,
  train_step,
)
from jaxroute.types import (
  Counts,
  MoEOutput,
  Partition,
  RouterConfig,
  RouterState,
  Routing,
)

__version__ = "0.1.0"

__all__ = [
  "Counts",
  "MoEOutput",
  "Partition",
  "RouterConfig",
  "RouterState",
  "Routing",
  "TrainState",
  "__version__",
  "accumulate",
  "assignment",
  "dispatch",
  "dual",
  "eval_step",
  "experts",
  "init_router_state",
  "init_train_state",
  "layer",
  "losses",
  "max_vio",
  "metrics",
  "parallel",
  "route",
  "routing",
  "save_routing",
  "train_step",
  "update",
]
