# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts: grouped products, and the SwiGLU layers made of them."""

from jaxroute.experts.api import (
  Implementation,
  dense_swiglu,
  grouped_matmul,
  swiglu,
)
from jaxroute.experts.params import (
  ExpertParams,
  check_params,
  init_expert_params,
)

__all__ = [
  "ExpertParams",
  "Implementation",
  "check_params",
  "dense_swiglu",
  "grouped_matmul",
  "init_expert_params",
  "swiglu",
]
