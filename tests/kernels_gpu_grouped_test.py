# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The grouped products for Hopper, interpreted, against the oracle.

Operands are small integers, whose sums are exact in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxroute.kernels.gpu import device, grouped

pytestmark = pytest.mark.skipif(
  device.too_old() is not None, reason=str(device.too_old())
)

# Group sizes and N: empty groups, several in one pack of 8 rows, tiles that end
# at the last row, rows past the groups, and none of them.
LAYOUTS = {
  "ragged": ((0, 131, 0, 1, 2, 60, 0, 70), 304),
  "full": ((128, 64, 136), 328),
  "empty": ((0, 0), 136),
}
CASES = [
  pytest.param("ragged", 128, 320, grouped.Tiling(128, 256, 2), id="wide"),
  pytest.param("full", 320, 192, grouped.Tiling(256, 128, 4, 1), id="tall"),
  pytest.param("ragged", 192, 128, None, id="ragged"),
  pytest.param("empty", 128, 128, None, id="empty"),
]


@pytest.fixture(autouse=True)
def _no_races(capfd):
  yield
  printed = capfd.readouterr()
  assert "RACE" not in printed.out + printed.err


def _integers(seed, *shape):
  values = np.random.default_rng(seed).integers(-3, 4, size=shape)
  return values.astype(np.float32)


def _outer(lhs, rhs, group_sizes):
  ends = np.cumsum(group_sizes)
  parts = zip(ends - np.asarray(group_sizes), ends, strict=True)
  return np.stack([lhs[a:b].T @ rhs[a:b] for a, b in parts])


def _interpret(detect_races=True):
  return plgpu.InterpretGPUParams(detect_races=detect_races)


@pytest.mark.parametrize("layout, d, f, tiling", CASES)
def test_matmul(layout, d, f, tiling):
  group_sizes, n = LAYOUTS[layout]
  lhs, rhs = _integers(0, n, d), _integers(1, len(group_sizes), d, f)
  expected = oracle.grouped_matmul(lhs, rhs, np.asarray(group_sizes))
  lhs[sum(group_sizes) :] = np.nan
  # The dtypes and the transposition take turns over the cases.
  dtype = jnp.bfloat16 if layout == "ragged" else jnp.float16
  transpose_rhs = (layout == "ragged") == (d < f)
  actual = grouped.matmul(
    jnp.asarray(lhs, dtype),
    jnp.asarray(rhs.mT if transpose_rhs else rhs, dtype),
    jnp.asarray(group_sizes, jnp.int32),
    dtype=dtype if layout == "full" else jnp.float32,
    transpose_rhs=transpose_rhs,
    tiling=tiling,
    # The interpreter counts copies, not groups of them: it sees races where a
    # group has none.
    interpret=_interpret(tiling is None or tiling.m == 128),
  )
  np.testing.assert_array_equal(
    np.asarray(actual, np.float32),
    np.asarray(jnp.asarray(expected, actual.dtype), np.float32),
  )


@pytest.mark.parametrize("layout, d, f, tiling", CASES)
def test_outer(layout, d, f, tiling):
  group_sizes, n = LAYOUTS[layout]
  lhs, rhs = _integers(0, n, d), _integers(1, n, f)
  expected = _outer(lhs, rhs, group_sizes)
  lhs[sum(group_sizes) :] = rhs[sum(group_sizes) :] = np.nan
  dtype = jnp.bfloat16 if layout == "ragged" else jnp.float16
  actual = grouped.outer(
    jnp.asarray(lhs, dtype),
    jnp.asarray(rhs, dtype),
    jnp.asarray(group_sizes, jnp.int32),
    dtype=dtype if layout == "full" else jnp.float32,
    tiling=tiling,
    interpret=_interpret(),
  )
  np.testing.assert_array_equal(
    np.asarray(actual, np.float32),
    np.asarray(jnp.asarray(expected, actual.dtype), np.float32),
  )


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("operand, bad", [(0, np.nan), (1, np.inf)])
def test_what_is_not_finite_stays_in_its_group(operand, bad):
  group_sizes, n, d, f = (61, 7, 68), 136, 128, 128
  pair = [_integers(0, n, d), _integers(1, n, f)]
  expected = _outer(*pair, group_sizes)
  pair[operand][61:68] = bad  # the group between
  actual = grouped.outer(
    *(jnp.asarray(x, jnp.bfloat16) for x in pair),
    jnp.asarray(group_sizes, jnp.int32),
    dtype=jnp.float32,
    interpret=_interpret(),
  )
  np.testing.assert_array_equal(actual[0], expected[0])
  np.testing.assert_array_equal(actual[2], expected[2])
  assert not jnp.any(jnp.isfinite(actual[1]))


def test_tiles_are_large_where_they_fit():
  assert grouped.matmul_tiling(2048) == grouped.Tiling(128, 256)
  assert grouped.matmul_tiling(1408) == grouped.Tiling(128, 256)
  assert grouped.matmul_tiling(320) == grouped.Tiling(128, 128)
  assert grouped.outer_tiling(2048, 1408) == grouped.Tiling(256, 128)
  assert grouped.outer_tiling(1408, 2048) == grouped.Tiling(128, 256)
  assert grouped.outer_tiling(320, 320) == grouped.Tiling(128, 128)


def test_what_it_cannot_multiply_is_said():
  def reason(n=128, widths=(128, 1408), dtype=jnp.bfloat16):
    return grouped.unsupported(n, widths, dtype)

  assert reason() is None
  assert reason(dtype=jnp.float16) is None
  assert "float32" in reason(dtype=jnp.float32)
  assert "got 120" in reason(n=120)
  assert "got 130" in reason(n=130)
  assert "got 96" in reason(widths=(128, 96))
  (n,) = jax.export.symbolic_shape("N")
  assert "got N" in reason(n=n)
