# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What rematerialisation should keep of the routing.

A layer under `jax.checkpoint` routes a second time in the backward pass. That
costs the selection and the sorting once more, and a matmul that sums in another
order there can change a close choice: the gradient is then not that of the
forward pass. `save_routing` keeps the routes, 20 bytes per assignment.
"""

from typing import Any

import jax
from jax import ad_checkpoint

from jaxroute import checks

_PREFIX = "jaxroute."
_KEPT = (
  "chosen_logits",
  "expert_idx",
  "group_sizes",
  "inverse_permutation",
  "load",
  "permutation",
  "weights",
)

_policy = jax.checkpoint_policies.save_only_these_names(
  *(_PREFIX + name for name in _KEPT)
)


def save_routing(prim: Any, *args: Any, **params: Any) -> Any:
  """Policy of `jax.checkpoint` that keeps routes, their logits and permutations.

  Join it to another by `jax.checkpoint_policies.save_from_both_policies`.

  Args:
    prim: a primitive. `jax.checkpoint` calls a policy with it and the rest.
    *args: what the primitive is applied to.
    **params: its parameters.

  Returns:
    Whether to keep the result of the primitive.
  """
  return _policy(prim, *args, **params)


def checkpoint_name(kept: str, x: jax.Array) -> jax.Array:
  """Names what `save_routing` keeps.

  Args:
    kept: what it is called in a `Routing` or a `Permutation`.
    x: an array.

  Returns:
    `x`, to be used in its place.

  Raises:
    ValueError: if `save_routing` keeps nothing of that name.
  """
  checks.check_choice("kept", kept, _KEPT, "Add it to those that are kept.")
  return ad_checkpoint.checkpoint_name(x, _PREFIX + kept)
