# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Keys have the order of the floats, and come back as they were."""

import jax.numpy as jnp
import numpy as np

from jaxroute.routing import float_keys

# In rising order: infinities, normal and subnormal numbers, and zero.
RISING = np.array(
  [-np.inf, -3e38, -1.5, -1.0, -1e-38, -1e-45, 0.0]
  + [1e-45, 1e-38, 1.0, 1.5, 3e38, np.inf],
  np.float32,
)


def test_keys_rise_with_the_floats():
  keys = np.asarray(float_keys.to_keys(jnp.asarray(RISING)))
  assert keys.dtype == np.int32
  assert (np.diff(keys.astype(np.int64)) > 0).all()
  assert keys[0] > float_keys.BELOW_ALL


def test_keys_come_back_bit_for_bit():
  back = float_keys.from_keys(float_keys.to_keys(jnp.asarray(RISING)))
  np.testing.assert_array_equal(
    np.asarray(back).view(np.int32), RISING.view(np.int32)
  )


def test_both_zeros_have_one_key():
  keys = float_keys.to_keys(jnp.array([-0.0, 0.0]))
  np.testing.assert_array_equal(keys, [0, 0])
