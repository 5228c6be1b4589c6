# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The bits by which the GPU routing kernel counts its histogram."""

import gpu_mesh
import jax.numpy as jnp
import numpy as np
import oracle

from jaxroute.kernels.gpu.route import histogram
from jaxroute.routing import bias_histogram

pytestmark = gpu_mesh.needs_kernels


def test_the_scale_by_hand():
  # The bins above zero end at 2^-16, 2^-13, ..., 2^2; the top octave begins at 2^4.
  assert histogram._SCALE == 2.0**124
  assert histogram._SMALLEST == 2.0**105
  assert histogram._LOWEST_EXPONENT == 232


def test_the_bin_of_a_distance_is_on_top():
  edges = bias_histogram.EDGES
  near = [edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, -9)]
  far = [0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, -np.inf, 16.0, -16.0]
  distance = np.concatenate([*near, np.float32(far)]).astype(np.float32)
  top = np.asarray(histogram._bin_on_top(jnp.asarray(distance))) >> 28 & 0xF
  size = sum(np.abs(distance) >= edge for edge in oracle.UPPER_EDGES[:-1])
  np.testing.assert_array_equal(top, np.where(distance < 0, 8, 0) + size)


def test_the_bits_of_nibbles_are_in_order_of_the_experts():
  rng = np.random.default_rng(0)
  for width in (8, 16, 32):
    codes = rng.integers(0, 16, size=(width, 128))
    words = np.zeros((4, 128), np.uint32)
    for expert in reversed(range(width)):
      words[expert % 4] = words[expert % 4] << 4 | codes[expert]
    nibbles = [jnp.asarray(word.view(np.int32)) for word in words]
    for bit in range(4):
      word = np.asarray(histogram._bits_of(nibbles, bit)).view(np.uint32)
      for expert in range(width):
        expected = codes[expert] >> bit & 1
        np.testing.assert_array_equal(word >> expert & 1, expected)


def test_rows_are_split_by_their_bits():
  # Three rows: of bits 10, 01 and 11; a fourth is not counted.
  counted, high, low = (jnp.full(128, b) for b in (0b0111, 0b1101, 0b1110))
  found = [int(rows[0]) for rows in histogram._split(counted, [high, low])]
  assert found == [0, 0b0010, 0b0001, 0b0100]
