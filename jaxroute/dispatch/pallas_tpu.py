# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order on TPU: ranks by a kernel, then one sort of words."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import ladder
from jaxroute.dispatch import xla
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu import sort as kernel
from jaxroute.parallel import mesh


def sort(
  key: jax.Array,
  num_experts: int,
  capacity: int | None,
  *,
  by_name: bool,
  interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Load, permutation and inverse.

  Args:
    key: `[T, K]` int32 in `[0, E]`; E is no expert.
    num_experts: E.
    capacity: C, or None.
    by_name: whether the kernel was asked for, and may be on its way to a TPU
      that is not here.
    interpret: as in `jaxroute.route`.

  Returns:
    `[E + 1]`, `[N]` and `[N]`, all int32. Dropped assignments are counted at
    index E.

  Raises:
    ladder.Refusal: if the kernel cannot do this, or not here.
  """
  ladder.check_can_run(
    ladder.symbolic_size(key) or kernel.unsupported(*key.shape),
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=interpret,
  )
  call = functools.partial(_sort, num_experts, capacity, interpret)
  return ladder.call_kernel("sort_by_expert", "tpu", call, interpret, key)


def _sort(
  num_experts: int, capacity: int | None, interpret: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Counts rows for the inverse, and still sorts once for the permutation.

  On v6e a scatter that inverts the inverse costs 55 cycles per token, and the
  sort costs 2.
  """
  count = functools.partial(
    kernel.count_assignments, num_experts=num_experts, interpret=interpret
  )
  rows = functools.partial(kernel.assignment_rows, interpret=interpret)
  if capacity is not None:
    zeros = jnp.zeros(num_experts + 1, jnp.int32)
    rank = rows(*mesh.vary_alike((key, zeros)))
    key = jnp.where(rank < capacity, key, num_experts)
  load = count(key)
  inverse = rows(key, jnp.cumsum(load) - load).reshape(-1)
  order = jnp.arange(key.size, dtype=jnp.int32)
  _, permutation = xla.sort_pairs(
    key.reshape(-1), order, num_experts + 1, key.size
  )
  return load, permutation, inverse
