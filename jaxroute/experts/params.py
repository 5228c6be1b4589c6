# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The parameters of the experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParams:
  """Parameters of E SwiGLU experts; of a dense SwiGLU without the E axis.

  Attributes:
    w_gate: `[E, D, F]`. Projection that `silu` is applied to.
    w_up: `[E, D, F]`. Projection it multiplies.
    w_down: `[E, F, D]`. Projection back to the model width.
  """

  w_gate: jax.Array
  w_up: jax.Array
  w_down: jax.Array


def init_expert_params(
  key: jax.Array,
  num_experts: int,
  model_size: int,
  hidden_size: int,
  dtype: Any = jnp.float32,
) -> ExpertParams:
  """Random parameters: normal, of variance 1 / fan-in (LeCun).

  Args:
    key: random key.
    num_experts: E.
    model_size: D.
    hidden_size: F.
    dtype: of the parameters.

  Returns:
    `ExpertParams` with the E axis.
  """
  init = jax.nn.initializers.lecun_normal(batch_axis=(0,))
  up, down = (model_size, hidden_size), (hidden_size, model_size)
  keys = jax.random.split(key, 3)
  return ExpertParams(
    w_gate=init(keys[0], (num_experts, *up), dtype),
    w_up=init(keys[1], (num_experts, *up), dtype),
    w_down=init(keys[2], (num_experts, *down), dtype),
  )
