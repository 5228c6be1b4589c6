# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""float32 numbers as int32 keys of the same order, and back.

Keys are compared exactly and in one way everywhere; XLA may compute a float
anew, with other bits, wherever it is compared.
"""

import jax
import jax.numpy as jnp

_ALL_BUT_SIGN = 0x7FFFFFFF
_MINUS_ZERO = -(2**31)
"""The bits of -0.0."""

BELOW_ALL = -(2**31)
"""An int32 below the key of every float, -inf included."""


def to_keys(x: jax.Array) -> jax.Array:
  """Keys that are ordered as the floats are; -0 has the key of +0.

  Args:
    x: float32, not NaN.

  Returns:
    int32 of the same shape.

  Example:
    >>> to_keys(jnp.array([-1.0, -0.0, 0.0, 1.0])).argsort()
    Array([0, 1, 2, 3], dtype=int32)
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  bits = jnp.where(bits == _MINUS_ZERO, 0, bits)
  return _flip_negative(bits)


def from_keys(keys: jax.Array) -> jax.Array:
  """The floats of keys.

  Args:
    keys: int32, from `to_keys`.

  Returns:
    float32 of the same shape.
  """
  return jax.lax.bitcast_convert_type(_flip_negative(keys), jnp.float32)


def _flip_negative(bits: jax.Array) -> jax.Array:
  """Turns the order of negative numbers round: floats fall with their bits."""
  return bits ^ ((bits >> 31) & _ALL_BUT_SIGN)
