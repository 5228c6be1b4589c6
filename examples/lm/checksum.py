# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checksums of arrays that do not depend on how the arrays are sharded.

The checksum of an array is the sum, modulo 2^32, of a hash of each element's
bits and place in the array. Every device sums what it holds, so that a scalar
is all that devices exchange.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)


def checksums(tree: Any) -> dict[str, str]:
  """The checksum of every array of a tree.

  Args:
    tree: a pytree of arrays of any dtype, on any devices.

  Returns:
    The path of every leaf to its dtype, shape and checksum, as text.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  # The sums are whole in every process; of arrays that are, too, in each its own.
  sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)} {value:08x}"
    for (path, leaf), value in zip(leaves, sums, strict=True)
  }


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_sum(x) for x in arrays]


def _sum(x: jax.Array) -> jax.Array:
  """`[]` uint32: the checksum of an array."""
  mixed = _mix(_words(x) ^ _GOLDEN)
  # The place is hashed axis by axis, since one index could exceed 2^32.
  for axis in range(mixed.ndim):
    place = jax.lax.broadcasted_iota(np.uint32, mixed.shape, axis)
    mixed = _mix(mixed + place * _GOLDEN)
  return jnp.sum(mixed, dtype=np.uint32)


def _words(x: jax.Array) -> jax.Array:
  """The bits of an array as uint32, of wide elements on one more axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.iscomplexobj(x):
    x = jnp.stack([x.real, x.imag])
  if x.dtype == bool:
    x = x.astype(np.uint8)
  word = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
  return jax.lax.bitcast_convert_type(x, word).astype(np.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 under which every bit depends on every other.

  It is the last step of MurmurHash3 (Appleby, 2011, public domain).
  """
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))
