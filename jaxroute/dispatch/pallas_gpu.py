# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order on GPU, from the ranks that the routing kernel counted.

Mosaic GPU is not in every jaxlib: what needs it is imported where it is used.
"""

import functools
from typing import Any

import jax

from jaxroute import ladder
from jaxroute.kernels.gpu import device
from jaxroute.parallel import mesh


def sort(
  expert_idx: jax.Array,
  num_experts: int,
  token_mask: jax.Array | None,
  capacity: int | None,
  rank: jax.Array | None,
  load: jax.Array | None,
  *,
  by_name: bool,
  interpret: Any,
) -> tuple[jax.Array, ...]:
  """Group sizes, permutation and inverse; see `jaxroute.dispatch.sort_by_expert`.

  Args:
    expert_idx: `[T, K]` int32.
    num_experts: E.
    token_mask: `[T]` bool, or None.
    capacity: C, or None.
    rank: `[T, K]` int32, or None.
    load: `[E]` int32, or None.
    by_name: whether the kernel was asked for, and may be on its way to a GPU that is
      not here.
    interpret: as in `jaxroute.route`.

  Returns:
    `[E]`, `[N]` and `[N]`, all int32.

  Raises:
    ladder.Refusal: if the kernel cannot do this, or not here.
  """
  ladder.check_can_run(
    device.too_old()
    or ladder.symbolic_size(expert_idx)
    or _unsupported(rank, load),
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=interpret,
  )
  from jaxroute.kernels.gpu import order

  if reason := order.unsupported(num_experts):
    raise ladder.Refusal(reason)
  call = functools.partial(_sort, capacity, bool(interpret))
  # One by one in a batch, as a kernel with results by index is written for one.
  call = jax.custom_batching.sequential_vmap(call)
  operands = mesh.vary_alike((expert_idx, rank, token_mask, load))
  return ladder.call_kernel(
    "sort_by_expert", "cuda", call, interpret, *operands
  )


def _unsupported(rank: jax.Array | None, load: jax.Array | None) -> str | None:
  if rank is None or load is None:
    return (
      "it needs the `rank` and `load` of `jaxroute.route(..., with_rank=True)`"
    )
  return None


def _sort(
  capacity: int | None,
  interpret: bool,
  expert_idx: jax.Array,
  rank: jax.Array,
  token_mask: jax.Array | None,
  load: jax.Array,
) -> tuple[jax.Array, ...]:
  from jaxroute.kernels.gpu import order

  top_k = expert_idx.shape[1]
  expert_idx, rank = expert_idx.reshape(-1), rank.reshape(-1)
  return order.order(
    expert_idx,
    rank,
    load,
    token_mask,
    top_k=top_k,
    capacity=capacity,
    interpret=interpret,
  )
