# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Mixture-of-Experts routing and load balancing in JAX."""

from jaxroute import dispatch, dual, losses, metrics
from jaxroute.metrics import max_vio
from jaxroute.routing import route
from jaxroute.step import (
  accumulate,
  eval_step,
  init_router_state,
  init_train_state,
  train_step,
  TrainState,
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
  "dispatch",
  "dual",
  "eval_step",
  "init_router_state",
  "init_train_state",
  "losses",
  "max_vio",
  "metrics",
  "route",
  "train_step",
  "update",
]
