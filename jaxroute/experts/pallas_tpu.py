# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The products of the experts by the kernels for TPU, on its matrix unit."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import ladder
from jaxroute.experts import products as products_lib
from jaxroute.kernels.tpu import device, grouped


def check_can_run(operands: Any, *, by_name: bool, interpret: Any) -> None:
  """Raises `ladder.Refusal` unless the kernels can multiply this, and here.

  Args:
    operands: of one of the `Products`; a pytree of arrays, the first `[N, D]`.
    by_name: whether the kernels were asked for, and may be on their way to a TPU
      that is not here.
    interpret: whether they are interpreted, on any device.

  Raises:
    ladder.Refusal: with the reason.
  """
  first, *_ = arrays = jax.tree.leaves(operands)
  widths = {size: None for x in arrays for size in x.shape[1:]}
  refused = grouped.unsupported(
    first.shape[0], widths, _kernel_dtype(first.dtype)
  )
  if not by_name and device.multiplies_groups():
    refused = (
      "XLA has grouped products, which the kernels were not timed against"
    )
  ladder.check_can_run(
    refused,
    unavailable=device.unavailable,
    by_name=by_name,
    interpret=interpret,
  )


def products(interpret: Any) -> products_lib.Products:
  """The products by kernels.

  Args:
    interpret: what `pallas_call` takes.

  Returns:
    `Products`, of what `check_can_run` lets pass.
  """

  def matmul(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, **static: Any
  ) -> jax.Array:
    dtype = _kernel_dtype(lhs.dtype)
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    return grouped.matmul(lhs, rhs, group_sizes, interpret=interpret, **static)

  def outer(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array
  ) -> jax.Array:
    dtype = _kernel_dtype(lhs.dtype)
    return grouped.outer(
      lhs.astype(dtype),
      d_out.astype(dtype),
      group_sizes,
      dtype=lhs.dtype,
      interpret=interpret,
    )

  return products_lib.of(matmul, outer)


def _kernel_dtype(dtype: Any) -> Any:
  """What the kernels multiply: float16 as float32, as no TPU has the former."""
  return jnp.float32 if dtype == jnp.float16 else dtype
