# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The operations of `threads.Threads` in plain JAX, for Pallas's interpreter.

It runs no code for one thread. The arrays of all 128 are there, and memory is read
and written whole.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute.kernels.gpu.threads import THREADS, WARP, Ref, Threads


class Twins(Threads):
  """What `Threads` does, in JAX. The docstrings are those of its methods."""

  def index(self) -> jax.Array:
    return jnp.arange(THREADS, dtype=jnp.int32)

  def block_barrier(self) -> None:
    pass

  def warp_barrier(self) -> None:
    pass

  def shuffle_xor(self, x: jax.Array, distance: int) -> jax.Array:
    for bit in range(5):
      if distance >> bit & 1:
        x = jnp.flip(x.reshape(-1, 2, 1 << bit), 1).reshape(THREADS)
    return x

  def ballot(self, flags: jax.Array) -> jax.Array:
    bits = (flags != 0).astype(jnp.int32).reshape(-1, WARP)
    words = jnp.sum(bits << _lanes(), axis=1, dtype=jnp.int32)
    return jnp.repeat(words, WARP)

  def any(self, flags: jax.Array) -> jax.Array:
    return jnp.any(flags != 0).astype(jnp.int32)

  def count_bits(self, x: jax.Array) -> jax.Array:
    return jax.lax.population_count(x)

  def transpose_bits(self, x: jax.Array) -> jax.Array:
    bits = (x.reshape(-1, WARP, 1) >> _lanes()[None]) & 1
    words = bits.swapaxes(1, 2) << _lanes()[None]
    return jnp.sum(words, axis=2, dtype=jnp.int32).reshape(THREADS)

  def gather(self, ref: Ref, index: jax.Array) -> jax.Array:
    values = ref[...][index]
    return values.astype(jnp.int32) if values.dtype == jnp.bool_ else values

  def scatter(
    self, ref: Ref, index: jax.Array, value: jax.Array, keep: jax.Array | None
  ) -> None:
    place = index if keep is None else jnp.where(keep != 0, index, ref.shape[0])
    value = value.astype(ref.dtype)
    ref[...] = ref[...].at[place].set(value, mode="drop")

  def add_to(
    self, ref: Ref, index: jax.Array, value: jax.Array, keep: jax.Array
  ) -> None:
    place = jnp.where(keep != 0, index, ref.shape[0])
    ref[...] = ref[...].at[place].add(value, mode="drop")

  def gather_rows(self, ref: Ref, start: jax.Array, width: int) -> jax.Array:
    index = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return ref[...][index]

  def reciprocal(self, x: jax.Array) -> jax.Array:
    return 1.0 / x

  def scale(self, x: jax.Array, factor: float) -> jax.Array:
    return x * np.float32(factor)

  def divide(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return x / y

  def sqrt(self, x: jax.Array) -> jax.Array:
    return jnp.sqrt(x)

  def log1p(self, x: jax.Array) -> jax.Array:
    return jnp.log1p(x)

  def is_less(self, x: jax.Array, y: jax.Array) -> jax.Array:
    # The sign of a CPU's NaN is 1.
    return (x < y).astype(jnp.int32)


def operations(interpret: bool) -> Threads:
  """The operations of a kernel that is interpreted, or compiled."""
  return Twins() if interpret else Threads()


def _lanes() -> jax.Array:
  return jnp.arange(WARP, dtype=jnp.int32)[None]
