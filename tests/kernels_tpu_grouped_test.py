# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The grouped products for TPU, interpreted, against the oracle.

Operands are small integers, whose sums are exact in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxroute.kernels.tpu import grouped

# Group sizes, N, D and F: empty groups, several in one block of 256 rows, ends
# between blocks and within, rows past the groups, and none of them.
LAYOUTS = {
  "ragged": ((0, 300, 0, 1, 2, 210, 0, 70), 800, 128, 384),
  "full": ((256, 64, 192), 512, 256, 128),
  "one": ((300,), 300, 128, 128),
  "empty": ((0, 0), 130, 128, 128),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def _integers(seed, *shape):
  values = np.random.default_rng(seed).integers(-3, 4, size=shape)
  return values.astype(np.float32)


def _dtype(layout):
  return jnp.float32 if layout == "full" else jnp.bfloat16


@layouts
def test_matmul(layout):
  group_sizes, n, d, f = LAYOUTS[layout]
  lhs, rhs = _integers(0, n, d), _integers(1, len(group_sizes), d, f)
  expected = oracle.grouped_matmul(lhs, rhs, np.asarray(group_sizes))
  lhs[sum(group_sizes) :] = np.nan
  transpose_rhs = layout in ("ragged", "one")
  actual = grouped.matmul(
    jnp.asarray(lhs, _dtype(layout)),
    jnp.asarray(rhs.mT if transpose_rhs else rhs, _dtype(layout)),
    jnp.asarray(group_sizes, jnp.int32),
    dtype=jnp.float32,
    transpose_rhs=transpose_rhs,
    interpret=True,
  )
  np.testing.assert_array_equal(actual, expected)


@layouts
def test_outer(layout):
  group_sizes, n, d, f = LAYOUTS[layout]
  lhs, rhs = _integers(0, n, d), _integers(1, n, f)
  ends = np.cumsum(group_sizes)
  parts = list(zip(ends - np.asarray(group_sizes), ends, strict=True))
  expected = np.stack([lhs[a:b].T @ rhs[a:b] for a, b in parts])
  lhs[sum(group_sizes) :] = rhs[sum(group_sizes) :] = np.nan
  bad = len(group_sizes) - 1  # What is not finite stays in its group.
  lhs[slice(*parts[bad])] = np.inf
  actual = grouped.outer(
    jnp.asarray(lhs, _dtype(layout)),
    jnp.asarray(rhs, _dtype(layout)),
    jnp.asarray(group_sizes, jnp.int32),
    dtype=jnp.float32,
    interpret=True,
  )
  np.testing.assert_array_equal(actual[:bad], expected[:bad])
  if group_sizes[bad]:
    assert not np.any(np.isfinite(actual[bad]))
  else:
    np.testing.assert_array_equal(actual[bad], 0)


def test_every_row_of_a_group_is_in_one_visit():
  rng = np.random.default_rng(0)
  for num_groups, least in ((1, 0), (3, 1), (40, 0), (40, 1)):
    sizes = rng.integers(0, 300, num_groups) * rng.integers(0, 2, num_groups)
    n = max(int(sizes.sum()), 1) + int(rng.integers(0, 2)) * 131
    visits = grouped._visits(jnp.asarray(sizes, jnp.int32), n, 128, least)
    owners = np.full(n, -1)
    for group, block, begin, end in zip(*map(np.asarray, visits), strict=True):
      assert 0 <= begin <= end <= 128
      rows = slice(block * 128 + begin, block * 128 + end)
      assert np.all(owners[rows] == -1)
      owners[rows] = group
    expected = np.repeat(np.arange(num_groups), sizes)
    np.testing.assert_array_equal(owners[: len(expected)], expected)
    assert np.all(owners[len(expected) :] == -1)
    # A block, and what a group adds up to, is left once and not come back to.
    assert np.all(np.diff(visits.block) >= 0)
    assert np.all(np.diff(visits.group) >= 0)
    if least:
      assert set(np.asarray(visits.group)) == set(range(num_groups))


def test_tiles_fit_the_width_and_are_as_many_as_cores():
  assert grouped._tile(1024, 2048) == 1024
  assert grouped._tile(7168, 2048) == 1792
  assert grouped._tile(1408, 1024) == 768
  assert grouped._tile(2048, 2048, cores=2) == 1024
  assert grouped._tile(128, 2048, cores=2) == 128


def test_what_it_cannot_multiply_is_said():
  def reason(n=128, widths=(128, 1408), dtype=jnp.bfloat16):
    return grouped.unsupported(n, widths, dtype)

  assert reason() is None
  assert reason(n=131, dtype=jnp.float32) is None
  assert "float16" in reason(dtype=jnp.float16)
  assert "got 120" in reason(n=120)
  assert "got 96" in reason(widths=(128, 96))
  assert "up to 16384, got 32768" in reason(widths=[32768], dtype=jnp.float32)
  (n,) = jax.export.symbolic_shape("N")
  assert "got N" in reason(n=n)
