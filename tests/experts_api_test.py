# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped products and SwiGLU experts against dense einsums."""

import itertools

import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from experts_cases import IMPLEMENTATIONS, D, E, F, each
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute import experts

pytestmark = pytest.mark.optimized

_matmul = jax.jit(experts.grouped_matmul, static_argnames="implementation")
_swiglu = jax.jit(experts.swiglu, static_argnames="implementation")


@pytest.mark.any_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_pattern_of_empty_groups(implementation):
  n = 150  # more than all the groups own
  lhs, rhs = experts_cases.normal(0, n, D), experts_cases.normal(1, E, D, F)
  for empty in itertools.product((0, 1), repeat=E):
    group_sizes = np.array([5, 70, 1, 64]) * empty
    out = _matmul(
      lhs, rhs, experts_cases.sizes(*group_sizes), implementation=implementation
    )
    expected = oracle.grouped_matmul(
      np.asarray(lhs), np.asarray(rhs), group_sizes
    )
    experts_cases.assert_close(out, jnp.asarray(expected))


# Around the tile sizes, the largest twice; the last group ends at the last row.
LAYOUTS = (
  (0, 1200, 0, 0),
  (513, 512, 175, 0),
  (1, 511, 64, 624),
  (1023, 0, 65, 112),
  (63, 65, 1, 1071),
  (300, 300, 300, 299),
  (0, 0, 0, 0),
)


@pytest.mark.any_jax
@each
def test_groups_longer_and_shorter_than_a_tile(implementation):
  n = 1200
  lhs, params = experts_cases.normal(0, n, D), experts_cases.params()
  for group_sizes in LAYOUTS:
    owner, sizes = (
      experts_cases.owner(group_sizes, n),
      experts_cases.sizes(*group_sizes),
    )
    out = _matmul(lhs, params.w_up, sizes, implementation=implementation)
    experts_cases.assert_close(
      out, experts_cases.einsum_matmul(lhs, params.w_up, owner)
    )
    out = _swiglu(lhs, params, sizes, implementation=implementation)
    experts_cases.assert_close(
      out, experts_cases.einsum_swiglu(lhs, params, owner)
    )


@pytest.mark.parametrize("implementation", ("tiled", "batched"))
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 175), min_size=E, max_size=E))
def test_any_group_sizes(implementation, group_sizes):
  lhs, rhs = experts_cases.normal(0, 700, D), experts_cases.normal(1, E, D, F)
  sizes = experts_cases.sizes(*group_sizes)
  out = _matmul(lhs, rhs, sizes, implementation=implementation)
  experts_cases.assert_close(
    out,
    experts_cases.einsum_matmul(
      lhs, rhs, experts_cases.owner(group_sizes, 700)
    ),
  )


@pytest.mark.any_jax
@each
@pytest.mark.parametrize("n", (0, 1, 63, 65))
def test_few_rows(implementation, n):
  lhs, params = experts_cases.normal(0, n, D), experts_cases.params()
  sizes, owner = (
    experts_cases.sizes(0, n, 0, 0),
    experts_cases.owner((0, n, 0, 0), n),
  )

  def ours(lhs, params, sizes):
    return experts.swiglu(lhs, params, sizes, implementation=implementation)

  assert ours(lhs, params, sizes).shape == (n, D)
  actual, expected = (
    experts_cases.gradients(ours),
    experts_cases.gradients(experts_cases.einsum_swiglu),
  )
  experts_cases.assert_close(
    actual(lhs, params, sizes), expected(lhs, params, owner)
  )


GRADIENT_LAYOUTS = ((700, 0, 64, 436), (1, 2, 3, 4), (0, 0, 0, 0))


@each
def test_matmul_gradients(implementation):
  lhs, rhs = experts_cases.normal(0, 1200, D), experts_cases.normal(1, E, D, F)

  def ours(lhs, rhs, sizes):
    return experts.grouped_matmul(
      lhs, rhs, sizes, implementation=implementation
    )

  actual, by_einsum, by_ragged_dot = map(
    experts_cases.gradients,
    (ours, experts_cases.einsum_matmul, jax.lax.ragged_dot),
  )
  for group_sizes in GRADIENT_LAYOUTS:
    sizes, owner = (
      experts_cases.sizes(*group_sizes),
      experts_cases.owner(group_sizes, 1200),
    )
    experts_cases.assert_close(
      actual(lhs, rhs, sizes), by_einsum(lhs, rhs, owner)
    )
    experts_cases.assert_close(
      actual(lhs, rhs, sizes), by_ragged_dot(lhs, rhs, sizes)
    )


@each
def test_swiglu_gradients(implementation):
  x, params = experts_cases.normal(0, 1200, D), experts_cases.params()

  def ours(x, params, sizes):
    return experts.swiglu(x, params, sizes, implementation=implementation)

  actual, expected = (
    experts_cases.gradients(ours),
    experts_cases.gradients(experts_cases.einsum_swiglu),
  )
  for group_sizes in GRADIENT_LAYOUTS:
    sizes, owner = (
      experts_cases.sizes(*group_sizes),
      experts_cases.owner(group_sizes, 1200),
    )
    experts_cases.assert_close(
      actual(x, params, sizes), expected(x, params, owner)
    )


@pytest.mark.any_jax
@each
def test_rows_past_the_groups_are_not_read(implementation):
  n, sizes = 100, experts_cases.sizes(30, 0, 10, 5)
  x = experts_cases.normal(0, n, D).at[45:].set(jnp.nan)
  params = experts_cases.params()

  def loss(x, params):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    # The cotangent of those rows is NaN as well.
    return jnp.sum(out * x), out

  (d_x, d_params), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
  np.testing.assert_array_equal(out[45:], 0)
  np.testing.assert_array_equal(d_x[45:], 0)
  assert all(jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(d_params))
  out, pull = jax.vjp(
    lambda lhs, rhs: experts.grouped_matmul(
      lhs, rhs, sizes, implementation=implementation
    ),
    x,
    params.w_up,
  )
  d_lhs, d_rhs = pull(x[:, :F])
  np.testing.assert_array_equal(out[45:], 0)
  np.testing.assert_array_equal(d_lhs[45:], 0)
  assert jnp.all(jnp.isfinite(d_rhs))


@pytest.mark.any_jax
@each
def test_bfloat16_sums_in_float32(implementation):
  # A bfloat16 sum of ones stops at 256.
  n, d = 1000, 1024
  lhs, rhs = jnp.ones((n, d), jnp.bfloat16), jnp.ones((1, d, 1), jnp.bfloat16)

  def matmul(lhs, rhs):
    return experts.grouped_matmul(
      lhs, rhs, experts_cases.sizes(n), implementation=implementation
    )

  @jax.jit
  def both_ways(lhs, rhs):
    out, pull = jax.vjp(matmul, lhs, rhs)
    return out, *pull(out / d)

  out, d_lhs, d_rhs = both_ways(lhs, rhs)
  assert out.dtype == d_lhs.dtype == d_rhs.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, d)
  np.testing.assert_array_equal(d_rhs, n)
  wide = experts.grouped_matmul(
    lhs,
    rhs,
    experts_cases.sizes(n),
    implementation=implementation,
    preferred_element_type=jnp.float32,
  )
  assert wide.dtype == jnp.float32


@each
def test_bfloat16_swiglu(implementation):
  x, params, sizes = (
    experts_cases.normal(0, 130, 32),
    experts_cases.params(0, E, 32, 48),
    (70, 0, 9, 50),
  )
  x, params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (x, params))

  def ours(x, params, sizes):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    return out.astype(jnp.float32)

  def exact(x, params, owner):
    x, params = jax.tree.map(lambda v: v.astype(jnp.float32), (x, params))
    return experts_cases.einsum_swiglu(x, params, owner)

  sizes, owner = experts_cases.sizes(*sizes), experts_cases.owner(sizes, 130)
  experts_cases.assert_close(
    jax.jit(ours)(x, params, sizes), exact(x, params, owner), 1e-2
  )
  experts_cases.assert_close(
    experts_cases.gradients(ours)(x, params, sizes),
    experts_cases.gradients(exact)(x, params, owner),
    2e-2,
  )


@pytest.mark.gpu
def test_on_a_gpu():
  gpu = jax.devices("gpu")[0]
  x, params, sizes = (
    experts_cases.normal(0, 300, 64),
    experts_cases.params(0, 8, 64, 48),
    (0, 150, *[25] * 6),
  )
  owner, sizes = experts_cases.owner(sizes, 300), experts_cases.sizes(*sizes)
  x, params, sizes = jax.device_put((x, params, sizes), gpu)
  with jax.default_matmul_precision("highest"):
    actual = experts_cases.gradients(experts.swiglu)(x, params, sizes)
    expected = experts_cases.gradients(experts_cases.einsum_swiglu)(
      x, params, jax.device_put(owner, gpu)
    )
  experts_cases.assert_close(
    jax.device_get(actual), jax.device_get(expected), 1e-5
  )


@pytest.mark.any_jax
def test_dense_swiglu_is_one_expert_of_all_rows():
  x, params = experts_cases.normal(0, 20, D), experts_cases.params(e=1)
  dense = experts.dense_swiglu(x, jax.tree.map(lambda w: w[0], params))
  experts_cases.assert_close(
    dense, experts.swiglu(x, params, experts_cases.sizes(20))
  )


def test_one_trace_lowers_for_every_platform():
  params = jax.eval_shape(lambda: experts_cases.params(0, 8, 128, 128))
  x = jax.ShapeDtypeStruct((512, 128), jnp.float32)
  sizes = jax.ShapeDtypeStruct((8,), jnp.int32)

  def step(x, params, sizes):
    def loss(x, params):
      return jnp.sum(experts.swiglu(x, params, sizes))

    return jax.value_and_grad(loss, argnums=(0, 1))(x, params)

  traced = jax.jit(step).trace(x, params, sizes)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "ragged_dot" in text
  assert "while" not in text
  for platform in ("cpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_dot" not in text
    assert "while" in text
    # All experts in one product, of 1.25 times their share of the rows.
    batched = "tensor<8x80x128xf32>, tensor<8x128x128xf32>" in text
    assert batched == (platform == "cuda")


def test_init_has_variance_one_over_fan_in():
  params = experts.init_expert_params(
    jax.random.key(0), 8, 64, 256, jnp.bfloat16
  )
  assert params.w_gate.shape == params.w_up.shape == (8, 64, 256)
  assert params.w_down.shape == (8, 256, 64)
  assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  for w, fan_in in ((params.w_gate, 64), (params.w_down, 256)):
    variance = np.var(np.asarray(w, np.float32))
    np.testing.assert_allclose(variance, 1 / fan_in, rtol=0.05)
  assert not np.array_equal(params.w_gate, params.w_up)


LHS, RHS, SIZES = jnp.ones((3, D)), jnp.ones((E, D, F)), jnp.ones(E, jnp.int32)


@pytest.mark.parametrize(
  "args, words",
  [
    ((jnp.ones((2, 3, D)), RHS, SIZES), r"`lhs`.*\[N, D\].*\(2, 3, 6\)"),
    ((LHS, RHS[0], SIZES), r"`rhs` must be \[E, D=6, F\], got .*\(6, 5\)"),
    (
      (LHS[:, :2], RHS, SIZES),
      r"`rhs` must be \[E, D=2, F\], got .*\(4, 6, 5\)",
    ),
    (
      (LHS.astype(jnp.bfloat16), RHS, SIZES),
      "`rhs` must be bfloat16.*got float32",
    ),
    ((LHS, RHS, SIZES[:2]), r"`group_sizes`.*\[E=4\].*\(2,\)"),
    ((LHS, RHS, jnp.ones(E)), "`group_sizes` must be int32.*got float32"),
  ],
)
def test_bad_matmul_arguments_are_named(args, words):
  with pytest.raises(ValueError, match=words):
    experts.grouped_matmul(*args)


def test_bad_swiglu_arguments_are_named():
  params = experts_cases.params()

  def replaced(**arrays):
    fields = {f: getattr(params, f) for f in ("w_gate", "w_up", "w_down")}
    return experts.ExpertParams(**(fields | arrays))

  for bad, words in (
    (replaced(w_up=params.w_up[:, :, :2]), r"`params.w_up`.*\(4, 6, 2\)"),
    (replaced(w_down=params.w_up), r"F=5, D=6\], got .*\(4, 6, 5\)"),
    (
      replaced(w_up=params.w_up.astype(jnp.bfloat16)),
      "`params.w_up`.*bfloat16",
    ),
    (
      replaced(w_down=params.w_down.astype(jnp.bfloat16)),
      "`params.w_down`.*bfloat16",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      experts.swiglu(LHS, bad, SIZES)


def test_unknown_implementation_is_refused():
  words = "'batched', 'pallas_tpu', 'pallas_gpu', got 'tpu'"
  with pytest.raises(ValueError, match=words):
    experts.grouped_matmul(LHS, RHS, SIZES, implementation="tpu")
  with pytest.raises(ValueError, match=words):
    experts.swiglu(LHS, experts_cases.params(), SIZES, implementation="tpu")


@pytest.mark.parametrize("implementation", ("ragged_dot", "tiled", "batched"))
def test_xla_has_nothing_to_interpret(implementation):
  x, params, sizes = (
    jnp.zeros((4, 2)),
    experts_cases.params(0, 3, 2, 5),
    [1] * 3,
  )
  how = dict(implementation=implementation, interpret=True)
  sizes, words = jnp.array(sizes, jnp.int32), "no kernel to interpret.*True"
  with pytest.raises(NotImplementedError, match=words):
    experts.grouped_matmul(x, params.w_gate, sizes, **how)
  with pytest.raises(NotImplementedError, match=words):
    experts.swiglu(x, params, sizes, **how)


def test_negative_expected_rows_are_refused():
  with pytest.raises(ValueError, match="`expected_rows`.*got -1"):
    experts.swiglu(LHS, experts_cases.params(), SIZES, expected_rows=-1)
