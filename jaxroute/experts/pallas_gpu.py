# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts by the kernels for NVIDIA Hopper, on its tensor cores.

Mosaic GPU is not in every jaxlib: what needs it is imported where it is used.
"""

from typing import Any

import jax

from jaxroute import ladder
from jaxroute.experts import products as products_lib
from jaxroute.kernels.gpu import device


def check_can_run(operands: Any, *, by_name: bool, interpret: Any) -> None:
  """Raises `ladder.Refusal` unless the kernels can multiply this, and here.

  Args:
    operands: of one of the `Products`; a pytree of arrays, the first `[N, D]`.
    by_name: whether the kernels were asked for, and may be on their way to a GPU
      that is not here.
    interpret: whether they are interpreted, on any device.

  Raises:
    ladder.Refusal: with the reason.
  """
  ladder.check_can_run(
    device.too_old() or (None if interpret else _other_gpu()),
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=interpret,
  )
  from jaxroute.kernels.gpu import grouped

  first, *_ = arrays = jax.tree.leaves(operands)
  widths = {size: None for x in arrays for size in x.shape[1:]}
  if reason := grouped.unsupported(first.shape[0], widths, first.dtype):
    raise ladder.Refusal(reason)


def products(interpret: Any) -> products_lib.Products:
  """The products by kernels.

  Args:
    interpret: whether Pallas interprets them.

  Returns:
    `Products`, of what `check_can_run` lets pass.
  """

  def matmul(*operands: jax.Array, **static: Any) -> jax.Array:
    from jaxroute.kernels.gpu import grouped, mosaic

    params = mosaic.interpreter(interpret)
    return grouped.matmul(*operands, interpret=params, **static)

  def outer(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
  ) -> jax.Array:
    from jaxroute.kernels.gpu import grouped, mosaic

    params = mosaic.interpreter(interpret)
    return grouped.outer(
      lhs, d_out, group_sizes, dtype=lhs.dtype, interpret=params
    )

  return products_lib.of(matmul, outer)


def _other_gpu() -> str | None:
  """Why the GPU that is known cannot; by name, too: its compiler ends the process."""
  found = device.capability()
  if found is None or found == (9, 0):
    return None
  return f"compute capability 9.0 is needed, got {'.'.join(map(str, found))}"
