# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Step sizes by hand, under a rule that shows them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute import dual

pytestmark = pytest.mark.any_jax


@pytest.mark.parametrize(
  "schedule, sizes",
  [
    (dual.inverse_sqrt(0.5), [0.5, 0.5 / math.sqrt(2), 0.5 / math.sqrt(3)]),
    (dual.inverse(0.5), [0.5, 0.25, 0.5 / 3]),
  ],
)
def test_schedules_count_from_one(schedule, sizes):
  rule, violation = dual.sign(schedule), jnp.array([[1.0, 0.0, 0.0, -1.0]])
  state = rule.init(violation)
  for n, size in enumerate(sizes):
    np.testing.assert_allclose(schedule(n), size, rtol=1e-6)
    updates, state = rule.update(violation, state)
    np.testing.assert_allclose(updates, -size * violation, rtol=1e-6)


def test_a_schedule_takes_traced_counts_and_stays_float32():
  for schedule in (dual.inverse(0.5), dual.inverse_sqrt(0.5)):
    rates = schedule(jnp.arange(3))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, [schedule(n) for n in range(3)])


@pytest.mark.parametrize("make", (dual.inverse, dual.inverse_sqrt))
@pytest.mark.parametrize("rate", (-1.0, math.inf, math.nan))
def test_bad_rates_are_named(make, rate):
  with pytest.raises(ValueError, match=f"`rate`.*{rate}"):
    make(rate)
