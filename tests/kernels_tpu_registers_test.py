# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Unrolled loops, and the gather of registers against NumPy's indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.kernels.tpu import registers


@pytest.mark.parametrize("count", (1, 2, 3, 5, 8, 20))
def test_every_element_is_from_its_register(count):
  rng = np.random.default_rng(count)
  values = rng.normal(size=(count, 8, 128)).astype(np.float32)
  number = rng.integers(0, count, (8, 128), dtype=np.int32)
  sublane = rng.integers(0, 8, (8, 128), dtype=np.int32)
  gathered = registers.select_register(
    lambda i: jnp.asarray(values[i]),
    jnp.asarray(number),
    jnp.asarray(sublane),
    count,
  )
  expected = values[number, sublane, np.arange(128)]
  np.testing.assert_array_equal(gathered, expected)


def test_unroll_counts_from_zero():
  calls = []
  registers.unroll(3, calls.append, interpret=False)
  assert calls == [0, 1, 2]


def test_unroll_emits_a_loop_if_interpreted():
  calls = []
  registers.unroll(3, calls.append, interpret=True)
  (call,) = calls  # It is traced once.
  assert isinstance(call, jax.core.Tracer)
