# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What kernels do register by register: unrolled loops and a gather."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Ref: TypeAlias = Any
"""In a kernel a reference, or None for what a call does not have.

In the call it is what the reference is made from: an array, a block
specification or the shape of a buffer.
"""


def unroll(count: int, body: Callable[[Any], None], interpret: bool) -> None:
  """Calls `body(0)` to `body(count - 1)` in order, as straight-line code.

  Args:
    count: how many calls.
    body: a function of the number of the call: an int, or a traced int32 scalar
      if interpreted. It works on references and returns nothing.
    interpret: whether to emit a loop after all, because a CPU takes long to
      compile straight-line code.
  """
  if not interpret:
    for i in range(count):
      body(i)
    return
  # The barrier hides the count from XLA: a loop that is known to run once would
  # be inlined, which takes as long to compile.
  hidden_count = lax.optimization_barrier(jnp.int32(count))
  lax.fori_loop(jnp.int32(0), hidden_count, lambda i, _: body(i), None)


def select_register(
  load: Callable[[int], jax.Array],
  number: jax.Array,
  sublane: jax.Array,
  count: int,
  first: int = 0,
) -> jax.Array:
  """Gathers every element from a register and a sublane of its own.

  Args:
    load: returns the register of a number, `[8, 128]`.
    number: `[8, 128]` int32. The number of the register that each element comes
      from, counted from `first`.
    sublane: `[8, 128]` int32, 0 to 7. The sublane that it comes from; the lane
      is its own.
    count: how many registers there are.
    first: the number of the first of them.

  Returns:
    `[8, 128]`, `load(first + number)[sublane, lane]` at every element.
  """
  if count == 1:
    return jnp.take_along_axis(
      load(first), sublane, axis=0, mode="promise_in_bounds"
    )
  # The low half is selected whole before the high half is loaded. If all
  # registers were gathered from first, the compiler would run out of them.
  half = 1 << ((count - 1).bit_length() - 1)
  low = select_register(load, number, sublane, half, first)
  high = select_register(load, number, sublane, count - half, first + half)
  return jnp.where(number & half != 0, high, low)
