# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The parts of the linear program, on scores small enough to solve by hand."""

import numpy as np
import pytest

from jaxroute import linear_program

pytestmark = pytest.mark.any_jax

# Both tokens prefer expert 0; the second gives least up by leaving it.
GAMMA = np.array([[0.9, 0.1], [0.8, 0.7]])
ALL = np.ones((2, 2), np.bool_)


def test_an_optimum_of_all_variables():
  vertex = linear_program.solve_undecided(GAMMA, 1, ALL, ~ALL)
  assert vertex is not None
  np.testing.assert_allclose(vertex.x, np.eye(2))
  assert vertex.value == pytest.approx(1.6)
  # Only a bias between those at which one token changes its mind is optimal.
  difference = vertex.expert_bias[1] - vertex.expert_bias[0]
  assert 0.1 - 1e-9 <= difference <= 0.8 + 1e-9


def test_fixed_variables_stay():
  undecided = np.zeros((2, 2), np.bool_)
  chosen = np.array([[False, True], [True, False]])
  undecided[0] = True
  vertex = linear_program.solve_undecided(GAMMA, 1, undecided, chosen)
  assert vertex is not None
  np.testing.assert_allclose(vertex.x, chosen)
  assert vertex.value == pytest.approx(0.9)


def test_no_optimum_where_the_fixed_variables_leave_none():
  undecided = np.array([[True, False], [False, False]])
  chosen = np.array([[False, False], [True, False]])
  assert linear_program.solve_undecided(GAMMA, 1, undecided, chosen) is None


def test_scores_of_minus_infinity_are_worth_nothing():
  gamma = np.array([[0.5, -np.inf], [0.25, 0.125]])
  vertex = linear_program.solve_undecided(gamma, 1, np.isfinite(gamma), ~ALL)
  assert vertex is not None
  np.testing.assert_allclose(vertex.x, np.eye(2))
  assert vertex.value == pytest.approx(0.625)


def test_margins_are_distances_to_the_middle_of_the_cutoffs():
  gamma = np.array([[4.0, 1.0, 3.0], [0.0, 2.0, -np.inf]])
  bias = np.array([0.0, 1.0, 0.0])
  # Biased: 4, 2, 3 with its cutoffs at 4 and 3; 0, 3, -inf with 3 and 0.
  expected = [[0.5, -1.5, -0.5], [-1.5, 1.5, -np.inf]]
  np.testing.assert_array_equal(linear_program.margin(gamma, bias, 1), expected)


@pytest.mark.parametrize("gamma", ([[1.0, 3.0]], [[1.0, 3.0, -np.inf]]))
def test_who_has_no_other_choice_is_decided(gamma):
  margin = linear_program.margin(np.array(gamma), np.zeros(len(gamma[0])), 2)
  np.testing.assert_array_equal(margin[0, :2], [0.5, 2.5])


def test_alternation_balances_loads():
  rng = np.random.default_rng(0)
  gamma = rng.normal(size=(512, 8)) + np.linspace(0, 2, 8)
  bias = linear_program.alternate(gamma, 2)
  assert bias.mean() == pytest.approx(0.0, abs=1e-12)

  def load_of(bias):
    chosen = np.argsort(-(gamma + bias), axis=1)[:, :2]
    return np.bincount(chosen.ravel(), minlength=8)

  assert load_of(np.zeros(8)).max() > 1.5 * 128
  assert load_of(bias).max() <= 1.05 * 128


@pytest.mark.parametrize(("t", "k"), ((3, 4), (1, 1), (2, 3)))
def test_no_alternation_where_an_expert_has_no_quantile(t, k):
  gamma = np.random.default_rng(0).normal(size=(t, 4))
  np.testing.assert_array_equal(linear_program.alternate(gamma, k), np.zeros(4))


@pytest.mark.parametrize(
  ("first", "total", "expected"),
  (
    (8, 0, []),
    (8, 5, [5]),
    (8, 8, [8]),
    (8, 40, [8, 32, 40]),
  ),
)
def test_numbers_of_variables_grow_to_all(first, total, expected):
  assert [*linear_program.numbers(first, total)] == expected


def test_the_nearest_are_finite_and_with_their_ties():
  margin = np.array([[0.5, -0.25], [0.25, 0.0]])
  finite = np.array([[True, True], [True, False]])
  nearest = linear_program.nearest(margin, finite, 1)
  np.testing.assert_array_equal(nearest, [[False, True], [True, False]])
  nearest = linear_program.nearest(margin, finite, 3)
  np.testing.assert_array_equal(nearest, finite)
