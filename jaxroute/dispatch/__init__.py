# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tokens to their experts and back: expert order, `dispatch` and `combine`."""

from jaxroute.dispatch.api import (
  Implementation,
  Permutation,
  expert_capacity,
  sort_by_expert,
)
from jaxroute.dispatch.permute import combine, dispatch

__all__ = [
  "Implementation",
  "Permutation",
  "combine",
  "dispatch",
  "expert_capacity",
  "sort_by_expert",
]
