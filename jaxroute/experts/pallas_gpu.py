# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts by the kernels for NVIDIA Hopper, on its tensor cores."""

import functools
from typing import Any

import jax

from jaxroute import ladder
from jaxroute.experts import products as products_lib
from jaxroute.kernels.gpu import device, grouped


def check_can_run(operands: Any, by_name: bool) -> None:
  """Raises NotImplementedError unless the kernels can multiply this, and here.

  Args:
    operands: of one of the `Products`; a pytree of arrays, the first `[N, D]`.
    by_name: whether the kernels were asked for, and may be on their way to a GPU
      that is not here.

  Raises:
    NotImplementedError: with the reason.
  """
  first, *_ = arrays = jax.tree.leaves(operands)
  widths = {size: None for x in arrays for size in x.shape[1:]}
  unsupported = device.too_old() or _other_gpu()
  unsupported = unsupported or grouped.unsupported(
    first.shape[0], widths, first.dtype
  )
  ladder.check_can_run(
    unsupported,
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=False,
  )


def products(interpret: Any = None) -> products_lib.Products:
  """The products by kernels.

  Args:
    interpret: what `plgpu.kernel` takes.

  Returns:
    `Products`, of what `check_can_run` lets pass.
  """

  def outer(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
  ) -> jax.Array:
    return grouped.outer(
      lhs, d_out, group_sizes, dtype=lhs.dtype, interpret=interpret
    )

  matmul = functools.partial(grouped.matmul, interpret=interpret)
  return products_lib.of(matmul, outer)


def _other_gpu() -> str | None:
  """Why the GPU that is known cannot; by name, too: its compiler ends the process."""
  found = device.capability()
  if found is None or found == (9, 0):
    return None
  return f"compute capability 9.0 is needed, got {'.'.join(map(str, found))}"
