# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The kernel that puts K numbers into a row of E, interpreted."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels import place_tpu


def _example(t, e, k):
  rng = np.random.default_rng(0)
  idx = np.argsort(rng.random((t, e)), axis=1)[:, :k].astype(np.int32)
  values = rng.normal(size=(t, k)).astype(np.float32)
  expected = np.zeros((t, e), np.float32)
  np.put_along_axis(expected, idx, values, axis=1)
  return idx, values, expected


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_every_shape(shape):
  idx, values, expected = _example(*shape)
  placed = place_tpu.place(
    idx, values, num_experts=shape[1], dtype=jnp.float32, interpret=True
  )
  np.testing.assert_array_equal(placed, expected)


@pytest.mark.parametrize("e", [64, 128])
def test_blocks_dtype_and_what_is_not_finite(e):
  idx, values, expected = _example(1100, e, 2)
  values[7], values[1099, 0] = np.nan, np.inf
  np.put_along_axis(expected, idx, values, axis=1)
  placed = place_tpu.place(
    idx, values, num_experts=e, dtype=jnp.bfloat16, interpret=True
  )
  assert placed.dtype == jnp.bfloat16
  expected = jnp.asarray(expected, jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(placed.astype(jnp.float32), expected)


def test_the_simulator_finds_no_race():
  idx, values, expected = _example(300, 128, 3)
  simulated = functools.partial(
    place_tpu.place, num_experts=128, dtype=jnp.float32
  )
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  placed = jax.jit(functools.partial(simulated, interpret=params))(idx, values)
  assert not interpret_pallas_call.races.races_found
  np.testing.assert_array_equal(placed, expected)
