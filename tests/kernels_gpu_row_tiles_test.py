# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The rows of the tiles of grouped products."""

import jax.numpy as jnp
import numpy as np

from jaxroute.kernels.gpu import row_tiles


def test_every_row_is_in_one_tile_of_its_group():
  rng = np.random.default_rng(0)
  for num_groups in (1, 3, 40):
    for m in (128, 256):
      sizes = rng.integers(0, 300, num_groups) * rng.integers(0, 2, num_groups)
      n = int(sizes.sum()) + int(rng.integers(0, 2)) * 131
      tiles = row_tiles.row_tiles_of(jnp.asarray(sizes, jnp.int32), n, m)
      count = int(tiles.count[0])
      assert count <= len(tiles.group)
      owners = np.full(n, -1)
      for group, start, begin, end in zip(
        *(np.asarray(x)[:count] for x in tiles[:4]), strict=True
      ):
        assert start % 8 == 0
        assert 0 <= begin < end <= m
        assert np.all(owners[start + begin : start + end] == -1)
        owners[start + begin : start + end] = group
      expected = np.repeat(np.arange(num_groups), sizes)
      np.testing.assert_array_equal(owners[: len(expected)], expected)
      assert np.all(owners[len(expected) :] == num_groups)
