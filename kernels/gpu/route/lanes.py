# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How many threads share a token, and what none can do."""

from typing import Any

from jaxroute import types
from jaxroute.kernels.gpu.route import refs
from jaxroute.kernels.gpu.route.plan import MAX_SHARED_BYTES, Plan
from jaxroute.kernels.gpu.threads import THREADS

_MAX_EXPERTS, _MAX_TOP_K, _MAX_GROUPS = 1024, 16, 32
# Two blocks for almost every multiprocessor of an H100; fewer leave much of it idle.
_ENOUGH_BLOCKS = 256
# With more experts a thread, shared memory has room for two or three blocks at once.
_FEW_EXPERTS = 96


def unsupported(config: types.RouterConfig, dtype: Any) -> str | None:
  """Why the kernel cannot do what a router wants, or None if it can.

  Args:
    config: what to compute.
    dtype: of the logits: float32, bfloat16 or float16.

  Returns:
    The reason, for an error message.
  """
  if config.num_experts > _MAX_EXPERTS:
    return (
      f"`num_experts` may be at most {_MAX_EXPERTS}, got {config.num_experts}"
    )
  if config.top_k > _MAX_TOP_K:
    return f"`top_k` may be at most {_MAX_TOP_K}, got {config.top_k}"
  if config.limits_groups and config.num_groups > _MAX_GROUPS:
    return f"there may be at most {_MAX_GROUPS} groups, got {config.num_groups}"
  if config.logit_soft_cap is not None:
    # Mosaic's tanh is another than XLA's, and its last bits would change routes.
    return "`logit_soft_cap` is not supported"
  if not possible(config, dtype):
    return (
      f"{config.num_groups} groups of {config.group_size} experts do not fit into"
      " shared memory"
    )
  return None


def choose(config: types.RouterConfig, tokens: int, dtype: Any) -> int:
  """Threads for a token: as few as keep all multiprocessors busy.

  More threads a token cost instructions, for their lists have to be merged. Fewer
  need more shared memory, so that fewer blocks run at once, and take longer if there
  are few tokens. `benchmarks/gpu_model.py` estimates the time of each number. On one
  H100, of 65,536 tokens and 256 experts, a prototype with 1, 2, 4 and 8 took 61, 43,
  38 and 50 microseconds; of 4,096 tokens, with 4 and 8, 5.3 and 5.1.

  Args:
    config: one that is not `unsupported`.
    tokens: T.
    dtype: of the logits.

  Returns:
    1, 2, 4 or 8.
  """
  candidates = possible(config, dtype)
  for lanes in candidates:
    blocks = tokens * lanes // THREADS
    if config.num_experts // lanes <= _FEW_EXPERTS and blocks >= _ENOUGH_BLOCKS:
      return lanes
  return candidates[-1]


def possible(config: types.RouterConfig, dtype: Any) -> list[int]:
  """Lists the numbers of threads that can share a token, the least first.

  Args:
    config: what to compute.
    dtype: of the logits.

  Returns:
    Some of 1, 2, 4 and 8: where every group lies within a part of the experts, shared
    memory is enough, and experts are padded no more than they have to be.
  """
  plans = [
    Plan(
      config=config,
      tokens=1,
      dtype=dtype,
      has_bias=True,
      has_mask=True,
      with_chosen=True,
      with_rank=True,
      lanes=lanes,
      interpret=False,
    )
    for lanes in (1, 2, 4, 8)
  ]
  plans = [
    plan
    for plan in plans
    if _has_whole_groups(plan) and refs.shared_bytes(plan) <= MAX_SHARED_BYTES
  ]
  least = min((plan.padded_experts for plan in plans), default=0)
  return [plan.lanes for plan in plans if plan.padded_experts == least]


def _has_whole_groups(plan: Plan) -> bool:
  """Whether every group lies within a part of the experts."""
  if not plan.config.limits_groups or plan.lanes == 1:
    return True
  is_even = plan.config.num_groups % plan.lanes == 0
  return is_even and plan.padded_experts == plan.num_experts
