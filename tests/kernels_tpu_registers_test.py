# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What kernels write out register by register, against NumPy's indexing."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.kernels import unrolled


@pytest.mark.parametrize("count", (1, 2, 3, 5, 8, 20))
def test_pick_takes_every_element_from_its_register(count):
  rng = np.random.default_rng(count)
  registers = rng.normal(size=(count, 8, 128)).astype(np.float32)
  number = rng.integers(0, count, (8, 128), dtype=np.int32)
  sublane = rng.integers(0, 8, (8, 128), dtype=np.int32)
  picked = unrolled.pick(
    lambda i: jnp.asarray(registers[i]),
    jnp.asarray(number),
    jnp.asarray(sublane),
    count,
  )
  expected = registers[number, sublane, np.arange(128)]
  np.testing.assert_array_equal(picked, expected)


def test_each_counts_from_zero():
  calls = []
  unrolled.each(3, calls.append, interpret=False)
  assert calls == [0, 1, 2]
