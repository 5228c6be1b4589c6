# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The checks of arguments: what passes them, and the words of their errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxroute import checks, dual

pytestmark = pytest.mark.any_jax


@pytest.mark.parametrize(
  ("x", "shape", "dtype", "words"),
  (
    (np.ones((2, 3)), "[T, E]", "int32", "int32 [T, E=4], got float64 (2, 3)"),
    (
      np.ones((2, 3)),
      "[T, E]",
      "floating point",
      "[T, E=4], got float64 (2, 3)",
    ),
    (np.ones((2, 0)), "[T, F]", "real", "[T, F], got float64 (2, 0)"),
    (jnp.ones(()), "[..., E]", "", "[..., E=4], got float32 1.0"),
    ([1.0], "[T]", "bool", "bool [T], got a list"),
    (jnp.float32, "[T]", "", "[T], got <class"),
    (None, "[T]", "", "[T], got None"),
  ),
)
def test_an_array_that_does_not_fit_is_described(x, shape, dtype, words):
  with pytest.raises(ValueError, match=re.escape(f"`x` must be {words}")):
    checks.check_array("x", x, shape, dtype, "Mend it.", E=4)


def test_what_fits_passes_whether_known_or_traced_or_of_a_symbolic_size():
  def check(x):
    checks.check_array("x", x, "[T, E]", "floating point", "", E=4)
    checks.check_array("x", x, "[..., E]", "bfloat16", "", E=4)
    checks.check_array("x", x, "[T, E]", "", "", T=x.shape[0])
    return x

  check(jnp.ones((0, 4), jnp.bfloat16))
  (t,) = jax.export.symbolic_shape("T")
  jax.export.export(jax.jit(check))(jax.ShapeDtypeStruct((t, 4), jnp.bfloat16))


def test_scalars_become_those_of_python():
  for x in (3, np.int8(3), np.array(3), jnp.int32(3)):
    assert type(checks.as_int("n", x, "")) is int
  for x in (0.5, np.float16(0.5), jnp.bfloat16(0.5), jnp.float32(0.5)):
    value = checks.as_float("x", x, "[0, 1)", "")
    assert type(value) is float and value == 0.5
  assert checks.as_bool("b", np.bool_(True), "") is True


@pytest.mark.parametrize("x", (1.0, 1 - 1e-12, 1e-39, -0.1, 1e39, "0.5", True))
def test_numbers_are_held_to_an_interval_as_float32(x):
  words = re.escape(
    f"`x` must be a number in (0, 1), finite in float32, got {x!r}"
  )
  with pytest.raises(ValueError, match=words):
    checks.as_float("x", x, "(0, 1)", "")


def test_a_rate_may_be_traced_and_a_size_may_not():
  def step(rate):
    rule = dual.smebu(rate, beta=rate, kappa=rate)
    violation = jnp.array([1.0, -1.0])
    return rule.update(violation, rule.init(violation))[0]

  expected = step(0.5)
  np.testing.assert_allclose(jax.jit(step)(0.5), expected, rtol=1e-6)
  injected = optax.inject_hyperparams(dual.sign)(rate=0.5)
  updates, _ = injected.update(expected, injected.init(expected))
  np.testing.assert_array_equal(jnp.abs(updates), 0.5)
  with pytest.raises(ValueError, match=r"`n` must be an int .* got int32 \(\)"):
    jax.jit(lambda n: checks.as_int("n", n, ""))(3)
