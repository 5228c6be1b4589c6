# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The parameters of the experts."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import checks
from jaxroute.types import ExpertParams


def check_params(
  name: str,
  params: ExpertParams,
  width: int,
  num_experts: int | None = None,
  *,
  dtype: str = "floating point",
  is_dense: bool = False,
) -> None:
  """Raises ValueError unless parameters fit together and to their tokens.

  Args:
    name: of the argument.
    params: what was passed.
    width: D, of the tokens.
    num_experts: E, or None for that of the parameters.
    dtype: what theirs has to be, by name.
    is_dense: whether they are those of a dense SwiGLU, without the E axis.
  """
  fix = "Pass an `ExpertParams` of one shape and dtype that fit the tokens."
  checks.check_instance(name, params, ExpertParams, fix)
  sizes = {"D": width} | ({} if num_experts is None else {"E": num_experts})
  for field, letters in (
    ("w_gate", "D, F"),
    ("w_up", "D, F"),
    ("w_down", "F, D"),
  ):
    w, shape = (
      getattr(params, field),
      f"[{letters}]" if is_dense else f"[E, {letters}]",
    )
    checks.check_array(f"{name}.{field}", w, shape, dtype, fix, **sizes)
    sizes |= {"F": params.w_gate.shape[-1], "E": params.w_gate.shape[0]}


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

  Raises:
    ValueError: if `key` is no random key, a size is below 1 or `dtype` is not
      floating point.
  """
  checks.check_key("key", key)
  fix = "Pass that of the model."
  num_experts = checks.as_int("num_experts", num_experts, fix)
  model_size = checks.as_int("model_size", model_size, fix)
  hidden_size = checks.as_int("hidden_size", hidden_size, fix)
  dtype = checks.as_float_dtype("dtype", dtype)
  init = jax.nn.initializers.lecun_normal(batch_axis=(0,))
  up, down = (model_size, hidden_size), (hidden_size, model_size)
  keys = jax.random.split(key, 3)
  return ExpertParams(
    w_gate=init(keys[0], (num_experts, *up), dtype),
    w_up=init(keys[1], (num_experts, *up), dtype),
    w_down=init(keys[2], (num_experts, *down), dtype),
  )
