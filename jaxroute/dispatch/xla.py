# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order in plain XLA: a counting sort on CPU, sorts of words elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The comparison of pairs within longer blocks does not fuse on a CPU.
_BLOCK_KEYS = 32


def sort(
  key: jax.Array, num_experts: int, capacity: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Load, permutation and inverse; arguments and results as in `pallas_tpu.sort`."""
  key = key.reshape(-1)
  load = jnp.zeros(num_experts + 1, jnp.int32).at[key].add(1)
  if not isinstance(key.shape[0], int):
    # The blocks of a symbolic number of keys cannot be summed up by halves.
    return load, *_packed_sort(key, load, capacity)
  permutation, inverse = jax.lax.platform_dependent(
    key,
    load,
    cpu=functools.partial(_counting_sort, capacity=capacity),
    default=functools.partial(_packed_sort, capacity=capacity),
  )
  return load, permutation, inverse


def _packed_sort(
  key: jax.Array, load: jax.Array, capacity: int | None
) -> tuple[jax.Array, jax.Array]:
  """The stable sorting permutation of `key` `[N]`, and its inverse.

  On accelerators a sort of single words beats one of pairs by 4 to 1, and a
  scatter by far more.
  """
  n, last = key.shape[0], load.shape[0] - 1
  order = jnp.arange(n, dtype=jnp.int32)
  key, permutation = sort_pairs(key, order, last + 1, n)
  if capacity is not None:
    is_first = jnp.diff(key, prepend=-1) != 0
    rank = order - jax.lax.cummax(jnp.where(is_first, order, 0))
    key = jnp.where(rank < capacity, key, last)
    _, permutation = sort_pairs(key, permutation, last + 1, n)
  _, inverse = sort_pairs(permutation, order, n, n)
  return permutation, inverse


def sort_pairs(
  major: jax.Array, minor: jax.Array, majors: int, minors: int
) -> tuple[jax.Array, jax.Array]:
  """Sorts distinct pairs from `[0, majors) x [0, minors)`, as words if they fit.

  Whether a symbolic number fits is not known.

  Args:
    major: `[N]` int32. What is sorted by first.
    minor: `[N]` int32.
    majors: what `major` is below; static.
    minors: what `minor` is below; static.

  Returns:
    The two, `[N]` int32, in order.
  """
  numbers = majors, minors
  major_bits, bits = (
    max(n - 1, 0).bit_length() if isinstance(n, int) else 32 for n in numbers
  )
  if major_bits + bits > 32:
    major, minor = jax.lax.sort((major, minor), num_keys=2, is_stable=False)
    return major, minor
  word = (major.astype(jnp.uint32) << bits) | minor.astype(jnp.uint32)
  word = jax.lax.sort(word, is_stable=False)
  minor = word & np.uint32((1 << bits) - 1)
  return (word >> bits).astype(jnp.int32), minor.astype(jnp.int32)


def _counting_sort(
  key: jax.Array, load: jax.Array, capacity: int | None
) -> tuple[jax.Array, jax.Array]:
  """As `_packed_sort`, by counting.

  The row of an assignment is the end of its expert's bucket minus the number of
  assignments to that expert from this one on. These are counted by a running
  sum over blocks of keys, and within a block pair by pair.
  """
  n = key.shape[0]
  pad = -n % _BLOCK_KEYS
  last = load.shape[0] - 1
  start = jnp.cumsum(load) - load
  blocks = jnp.pad(key, (0, pad), constant_values=last).reshape(-1, _BLOCK_KEYS)
  block_number = jnp.arange(blocks.shape[0])[:, None]
  counts = jnp.zeros((blocks.shape[0], load.shape[0]), jnp.int32)
  counts = counts.at[block_number, blocks].add(1, mode="promise_in_bounds")
  ends = jax.lax.associative_scan(jnp.add, counts)
  ends = ends + start[None, :]
  equal = blocks[:, :, None] == blocks[:, None, :]
  not_before = jnp.tril(jnp.ones((1, _BLOCK_KEYS, _BLOCK_KEYS), jnp.bool_))
  behind = jnp.sum(equal & not_before, axis=1, dtype=jnp.int32)
  end = ends.at[block_number, blocks].get(mode="promise_in_bounds")
  inverse = (end - behind).reshape(-1)[:n]
  if capacity is not None:
    key = jnp.where(inverse - start[key] < capacity, key, last)
    load = jnp.zeros_like(load).at[key].add(1)
    return _counting_sort(key, load, None)
  permutation = (
    jnp.zeros_like(inverse)
    .at[inverse]
    .set(
      jnp.arange(n, dtype=jnp.int32),
      unique_indices=True,
      mode="promise_in_bounds",
    )
  )
  return permutation, inverse
