# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checksums: which changes they see, and that no mesh changes them."""

import re

import checksum
import jax
import jax.numpy as jnp
import numpy as np
import pytest

RNG = np.random.default_rng(0)
ARRAYS = {
  "float32": RNG.normal(size=(8, 12)).astype(np.float32),
  "bfloat16": jnp.asarray(RNG.normal(size=(4, 6)), jnp.bfloat16),
  "float16": RNG.normal(size=5).astype(np.float16),
  "int32": RNG.integers(-9, 9, (2, 3, 4)).astype(np.int32),
  "int8": RNG.integers(-9, 9, 7).astype(np.int8),
  "bool": np.array([True, False, False]),
  "complex64": np.array([1 + 2j, 3j], np.complex64),
  "key": jax.random.key(3),
  "scalar": jnp.float32(2.5),
}


def _changed(x):
  """The array with one bit flipped, with two elements swapped, zeroed."""
  data = np.array(jax.random.key_data(x) if x.dtype.name[:3] == "key" else x)
  flat = data.reshape(-1)
  if data.dtype == bool:
    yield np.logical_not(data)
  else:
    flipped = flat.copy()
    flipped.view(np.uint8)[-1] ^= 1
    yield flipped.reshape(data.shape)
  zeroed = flat.copy()
  zeroed[: len(flat) // 2 + 1] = 0
  yield zeroed.reshape(data.shape)
  if len(flat) > 1:
    swapped = flat.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    yield swapped.reshape(data.shape)


@pytest.mark.parametrize("name", list(ARRAYS))
def test_changed_bits_change_it(name):
  x = ARRAYS[name]
  (found,) = checksum.checksums([x]).values()
  dtype, shape = jax.eval_shape(lambda: x).dtype, list(x.shape)
  assert re.fullmatch(re.escape(f"{dtype}{shape} ") + "[0-9a-f]{8}", found)
  # Of a key, the data are compared alone, since the impl is in the dtype.
  base = jax.random.key_data(x) if name == "key" else x
  (before,) = checksum.checksums([base]).values()
  for changed in _changed(x):
    (after,) = checksum.checksums([jnp.asarray(changed)]).values()
    assert after[:-9] == before[:-9]
    assert after != before


def test_it_is_the_sum_of_the_hashes_by_hand():
  def mix(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16

  golden, total = 0x9E3779B9, 0
  array = np.array([[1, 2, 3], [4, 5, 6]], np.uint16)
  for (i, j), value in np.ndenumerate(array):
    word = mix(int(value) ^ golden)
    word = mix((word + i * golden) % 2**32)
    total += mix((word + j * golden) % 2**32)
  found = checksum.checksums({"a": array})
  assert found == {"['a']": f"uint16[2, 3] {total % 2**32:08x}"}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_no_mesh_changes_it_and_nothing_is_gathered(kind):
  x = ARRAYS["float32"]
  expected = checksum.checksums([x])
  axis_types = (getattr(jax.sharding.AxisType, kind),) * 2
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=axis_types)
  with jax.set_mesh(mesh):
    for spec in (jax.P("a", "b"), jax.P("b"), jax.P(None, "a")):
      placed = jax.device_put(x, jax.NamedSharding(mesh, spec))
      assert checksum.checksums([placed]) == expected
      program = checksum._sums.lower([placed]).compile().as_text()
      moves = re.findall(r"= (\S+) (all-[a-z]+|collective-permute)\(", program)
      assert moves
      assert set(moves) <= {("u32[]", "all-reduce")}
