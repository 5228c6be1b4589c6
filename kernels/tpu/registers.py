# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Parts of kernels that are written out register by register."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def unroll(count: int, body: Callable[[Any], None], interpret: bool) -> None:
  """Calls `body` with 0 to `count` - 1: one after the other, without a loop.

  Args:
    count: how many calls.
    body: works on references; of a number, or a scalar if interpreted.
    interpret: whether to loop all the same: a CPU is long in compiling what is
      written out, or is part of what surrounds it.
  """
  if interpret:
    barred = lax.optimization_barrier(jnp.int32(count))
    lax.fori_loop(jnp.int32(0), barred, lambda i, _: body(i), None)
  else:
    for i in range(count):
      body(i)


def select_register(
  load: Callable[[int], jax.Array],
  number: jax.Array,
  sublane: jax.Array,
  count: int,
  first: int = 0,
) -> jax.Array:
  """An element of one of many registers, for every element of a register.

  Args:
    load: from the number of a register, of 8 sublanes and 128 lanes, to it.
    number: `[8, 128]` int32, the register's number less `first`.
    sublane: `[8, 128]` int32, 0 to 7; the lane is the element's own.
    count: how many registers there are.
    first: the number of the first.

  Returns:
    `[8, 128]`.
  """
  if count == 1:
    return jnp.take_along_axis(
      load(first), sublane, axis=0, mode="promise_in_bounds"
    )
  # Depth first: breadth first, the compiler runs out of registers.
  half = 1 << ((count - 1).bit_length() - 1)
  low = select_register(load, number, sublane, half, first)
  high = select_register(load, number, sublane, count - half, first + half)
  return jnp.where(number & half != 0, high, low)
