# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The bins of the routing kernel's histogram are those of `bias_histogram`."""

import jax.numpy as jnp
import numpy as np

from jaxroute.kernels.tpu.route import histogram
from jaxroute.routing import bias_histogram


def test_the_scale_by_hand():
  assert histogram._SCALE == 2.0**124
  assert histogram._SMALLEST == 2.0**105
  assert histogram._EXPONENTS == range(232, 256)
  assert histogram._FIRST_FIELD == 77


def test_the_field_of_an_exponent_is_its_bin_in_turn():
  exponents = np.array(histogram._EXPONENTS)
  offset = histogram.field_offset(jnp.asarray(exponents, jnp.int32))
  bins = (exponents - exponents[0]) // 3
  expected = 4 * ((histogram._FIRST_FIELD + bins) % 8)
  np.testing.assert_array_equal(offset, expected)


def test_the_edges_of_bins_are_those_of_xla():
  edges = bias_histogram.EDGES[9:16]  # Between bins above zero.
  below = np.nextafter(edges, np.float32(0))
  for distance, bins in ((edges, range(1, 8)), (below, range(7))):
    scaled = np.maximum(distance * histogram._SCALE, histogram._SMALLEST)
    exponent = scaled.view(np.int32) >> histogram._EXPONENT_SHIFT
    offset = np.asarray(histogram.field_offset(jnp.asarray(exponent)))
    first = histogram._FIRST_FIELD
    np.testing.assert_array_equal((offset // 4 - first) % 8, list(bins))


def test_a_flush_comes_before_a_byte_is_full():
  assert histogram.BLOCKS_PER_FLUSH * 8 <= 255
