# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The exact optimum against brute force, the dual function against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute import assignment, linear_program

# Another version of JAX runs its docstrings, and system/modes_test.py.
pytestmark = pytest.mark.any_jax


def _scores(t, e, seed=0):
  return np.random.default_rng(seed).random((t, e)).astype(np.float32)


@pytest.mark.parametrize(
  ("t", "e", "k"), ((4, 4, 1), (4, 4, 2), (6, 3, 1), (3, 3, 2), (5, 5, 5))
)
def test_the_optimum_is_that_of_all_assignments(t, e, k):
  scores = _scores(t, e, t)
  best = assignment.solve(scores, k)
  expected, x = oracle.best_assignment(scores, k)
  np.testing.assert_allclose(best.value, expected, rtol=1e-9)
  np.testing.assert_allclose(best.x, x, atol=1e-9)
  dual = oracle.dual_value(scores, best.expert_bias, k)
  np.testing.assert_allclose(dual, expected, rtol=1e-9)
  assert abs(best.expert_bias.mean()) < 1e-12


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_no_bias_has_a_lower_dual_than_the_optimum(data):
  t, e = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
  k = data.draw(st.integers(1, e))
  seed = data.draw(st.integers(0, 2**31))
  rng = np.random.default_rng(seed)
  # Also where E does not divide T K: the optimum is fractional then.
  scores = rng.normal(size=(t, e))
  best = assignment.solve(scores, k)
  bias = rng.normal(size=e)
  assert oracle.dual_value(scores, bias, k) >= best.value - 1e-9
  dual = oracle.dual_value(scores, best.expert_bias, k)
  np.testing.assert_allclose(dual, best.value, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(best.x.sum(1), k)
  np.testing.assert_allclose(best.x.sum(0), t * k / e)
  if t * k % e == 0:
    np.testing.assert_allclose(best.x, best.x.round(), atol=1e-9)


def test_padding_and_masked_experts():
  scores = _scores(10, 4)
  mask = np.arange(10) % 5 > 0
  best = assignment.solve(scores, 2, mask)
  np.testing.assert_allclose(
    best.value, assignment.solve(scores[mask], 2).value
  )
  np.testing.assert_array_equal(best.x[~mask], 0)
  scores[~mask] = np.nan
  assert assignment.solve(scores, 2, mask).value == best.value
  scores[1, 0] = -np.inf
  assert assignment.solve(scores, 2, mask).x[1, 0] == 0


@pytest.mark.parametrize(
  "shape", ((1, 1, 1), (7, 5, 3), (64, 8, 1), (33, 64, 6))
)
def test_dual_and_primal_values_are_the_oracle(shape):
  t, e, k = shape
  rng = np.random.default_rng(0)
  scores, bias = _scores(t, e), rng.normal(size=e).astype(np.float32)
  mask = rng.random(t) < 0.7
  dual = jax.jit(assignment.dual_value, static_argnums=2)
  for m in (None, mask):
    real = scores if m is None else scores[m]
    np.testing.assert_allclose(
      dual(scores, bias, k, m), oracle.dual_value(real, bias, k), rtol=1e-5
    )
  idx = np.argsort(-(scores + bias), axis=1)[:, :k].astype(np.int32)
  value = assignment.primal_value(scores, idx, mask)
  expected = sum(scores[i, j] for i in range(t) if mask[i] for j in idx[i])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  load = np.bincount(idx[mask].ravel(), minlength=e)
  np.testing.assert_allclose(
    assignment.complementary_slackness(bias, jnp.asarray(load, jnp.int32)),
    dual(scores, bias, k, mask) - value,
    rtol=1e-3,
    atol=1e-3,
  )


def test_complementary_slackness_has_a_sign():
  # Expert 0 has 2 tokens too many: its bias of -0.5 has to fall further, and
  # one of 0.5 to shrink.
  load = jnp.array([[6, 2], [6, 2], [4, 4]])
  bias = jnp.array([[-0.5, 0.5], [0.5, -0.5], [0.5, -0.5]])
  np.testing.assert_array_equal(
    assignment.complementary_slackness(bias, load), [-2.0, 2.0, 0.0]
  )


_gap = jax.jit(assignment.duality_gap, static_argnums=2)


def _draw(kind, t, e, rng):
  """Scores [T, E] and a bias [E] that tell much, or little, apart."""
  if kind == "constant":
    return np.zeros((t, e), np.float32), np.zeros(e, np.float32)
  scores = rng.normal(size=(t, e)) * 2
  bias = rng.normal(size=e)
  if kind == "ties":
    scores, bias = np.round(scores), np.round(bias)
  if kind == "forbidden":
    scores[rng.random((t, e)) < 0.3] = -np.inf
  return scores.astype(np.float32), bias.astype(np.float32)


@settings(max_examples=150)
@given(
  shape=st.sampled_from(
    [(1, 4, 2), (1, 5, 5), (7, 5, 3), (24, 8, 8), (40, 6, 2)]
  ),
  kind=st.sampled_from(("random", "ties", "constant", "forbidden")),
  padding=st.sampled_from((0.0, 0.3, 1.0)),
  seed=st.integers(0, 2**31),
)
def test_a_gap_is_never_negative_and_bounds_the_optimum(
  shape, kind, padding, seed
):
  t, e, k = shape
  rng = np.random.default_rng(seed)
  scores, bias = _draw(kind, t, e, rng)
  mask = rng.random(t) >= padding
  scores[~mask] = np.nan
  gap = _gap(scores, bias, k, mask)
  assert gap >= 0
  if not mask.any():
    assert gap == 0
  elif kind != "forbidden":
    value = oracle.dual_value(scores[mask], bias, k) - gap
    assert value <= assignment.solve(scores, k, mask).value + 1e-3
    assert np.isfinite(gap)


def test_the_gap_is_small_at_the_best_bias():
  scores = np.float32(_scores(64, 8) + 0.3 * np.linspace(0, 1, 8))
  best = assignment.solve(scores, 2)
  at_zero = _gap(scores, jnp.zeros(8), 2)
  at_best = _gap(scores, jnp.float32(best.expert_bias), 2)
  assert 0 <= at_best < 1e-3 * best.value < 1e-2 * best.value < at_zero


def test_the_optimum_is_proven_however_poor_the_first_guess(monkeypatch):
  # From a bias of 0 the first programs of undecided variables have a solution,
  # of the wrong value, or none.
  scores = _scores(256, 8) + np.float32(0.3) * np.linspace(0, 1, 8)
  best = assignment.solve(scores, 2)
  widths = []
  solve_undecided = linear_program.solve_undecided

  def spy(gamma, top_k, undecided, chosen):
    vertex = solve_undecided(gamma, top_k, undecided, chosen)
    widths.append(vertex and vertex.value)
    return vertex

  monkeypatch.setattr(linear_program, "solve_undecided", spy)
  monkeypatch.setattr(linear_program, "alternate", lambda g, _: np.zeros(8))
  again = assignment.solve(scores, 2)
  assert any(v is not None and v < best.value - 1e-6 for v in widths)
  np.testing.assert_allclose(again.value, best.value, rtol=1e-12)
  dual = oracle.dual_value(scores, again.expert_bias, 2)
  np.testing.assert_allclose(again.value, dual, rtol=1e-12)


def test_regret_is_that_of_the_best_fixed_bias():
  scores, rng = _scores(60, 4).reshape(3, 20, 4), np.random.default_rng(1)
  best = assignment.solve(scores.reshape(-1, 4), 2).expert_bias
  fixed = np.tile(best, (3, 1))
  np.testing.assert_allclose(assignment.regret(scores, fixed, 2), 0, atol=1e-9)
  other = rng.normal(size=(3, 4))
  duals = [
    oracle.dual_value(s, b, 2) - oracle.dual_value(s, best, 2)
    for s, b in zip(scores, other, strict=True)
  ]
  regret = assignment.regret(scores, other, 2)
  np.testing.assert_allclose(regret, sum(duals), rtol=1e-9)
  # A common offset of a bias is not seen.
  np.testing.assert_allclose(assignment.regret(scores, other + 9.0, 2), regret)


@pytest.mark.parametrize(
  ("call", "words"),
  (
    (
      lambda: assignment.solve(np.full((4, 2), np.nan), 1),
      ("`scores`", "NaN", "token_mask"),
    ),
    (
      lambda: assignment.solve(np.ones((4, 2)), 3),
      ("`top_k`", "[1, E=2]", "got 3"),
    ),
    (
      lambda: assignment.solve(np.ones((4, 2)), 1, np.zeros(4, bool)),
      ("`token_mask`", "none"),
    ),
    (
      lambda: assignment.solve([[0.5, -np.inf], [0.5, -np.inf]], 1),
      ("`scores`", "-inf", "Allow"),
    ),
    (
      lambda: assignment.solve([[0.5, 0.5], [-np.inf, -np.inf]], 1),
      ("`scores`", "-inf", "Allow"),
    ),
    (
      lambda: assignment.solve(np.full((3, 2), -np.inf), 1),
      ("`scores`", "-inf", "Allow"),
    ),
    (
      lambda: assignment.solve(np.ones((4, 2)), 1, np.ones(3, bool)),
      ("`token_mask`", "[T=4]", "(3,)"),
    ),
    (
      lambda: assignment.dual_value(jnp.ones((4, 2)), jnp.ones(3), 1),
      ("`expert_bias`", "[E=2]", "(3,)"),
    ),
    (
      lambda: assignment.primal_value(jnp.ones(4), jnp.ones((4, 1))),
      ("`scores`", "[T, E]", "(4,)"),
    ),
    (
      lambda: assignment.regret(np.ones((3, 4, 2)), np.ones((4, 2)), 1),
      ("`expert_bias`", "[N, E]", "(4, 2)"),
    ),
  ),
)
def test_errors_name_argument_value_and_fix(call, words):
  with pytest.raises(ValueError) as error:
    call()
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize("scale", (1e-30, 1e-9, 1e-5, 1e5))
def test_the_optimum_scales_with_the_scores(scale):
  scores = np.random.default_rng(0).random((40, 4))
  best, scaled = (assignment.solve(x, 1) for x in (scores, scores * scale))
  np.testing.assert_allclose(scaled.value / scale, best.value, 1e-7)
  gap = oracle.dual_value(scores * scale, scaled.expert_bias, 1) - scaled.value
  assert abs(gap) <= 1e-6 * scaled.value


def test_no_tokens_have_no_gap():
  x, loss = assignment.round_to_balanced(jnp.zeros((0, 4)), jnp.zeros(4), 1)
  assert x.shape == (0, 4) and loss == 0


def test_values_of_half_precision_scores_are_summed_in_float32():
  scores = jnp.ones((70_000, 4), jnp.float16)
  idx = jnp.zeros((70_000, 2), jnp.int32)
  for value in (
    assignment.primal_value(scores, idx),
    assignment.dual_value(scores, jnp.zeros(4, jnp.float16), 2),
  ):
    assert value == 140_000 and value.dtype == jnp.float32


def test_an_index_of_no_expert_adds_no_score():
  idx = jnp.array([[0, -1], [4, 1]])
  scores = jnp.arange(8.0).reshape(2, 4)
  assert assignment.primal_value(scores, idx) == 0.0 + 5.0


def test_a_gap_is_compiled_once(caplog):
  first, second = (jnp.full((8, 4), fill) for fill in (0.5, 0.25))
  bias = jnp.zeros(4)
  assignment.duality_gap(first, bias, 1)
  caplog.clear()
  with jax.log_compiles():
    assignment.duality_gap(second, bias, 1)
  compiled = [r.getMessage() for r in caplog.records]
  assert not [words for words in compiled if "Compiling" in words]


@pytest.mark.parametrize("dtype", (jnp.int8, jnp.uint8, jnp.int16, jnp.int32))
def test_narrow_indices_are_those_of_experts(dtype):
  idx = jnp.array([[1, 2], [3, 127]], dtype)
  value = assignment.primal_value(jnp.ones((2, 256)), idx)
  assert float(value) == 4.0


def test_slackness_is_exact_for_counts_that_float32_does_not_hold():
  load = jnp.array([2**27 + 1, 2**27 - 1])
  residual = assignment.complementary_slackness(jnp.array([1.0, -1.0]), load)
  assert float(residual) == 2.0


@pytest.mark.parametrize("size", (1e-30, 1e20, 1e300))
def test_scores_of_any_size(size):
  best = assignment.solve(np.array([[3, 1], [2, 0.5], [1, 2.0]]) * size, 1)
  assert best.value == pytest.approx(6.25 * size)
