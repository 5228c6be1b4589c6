# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The oracle itself, against numbers computed by hand."""

import numpy as np
import oracle
import pytest

from jaxroute import RouterConfig

pytestmark = pytest.mark.any_jax

_LN3 = float(np.log(3.0))


def test_score():
  # e^0 / (e^0 + e^ln3) = 1/4; 1 / (1 + e^-ln3) = 3/4; ln(1 + e^ln3) = ln 4.
  np.testing.assert_allclose(
    oracle.score([0.0, _LN3, -np.inf, np.nan], "softmax"),
    [0.25, 0.75, 0.0, np.nan],
  )
  np.testing.assert_allclose(
    oracle.score([0.0, _LN3, -np.inf], "sigmoid"), [0.5, 0.75, 0.0]
  )
  np.testing.assert_allclose(
    oracle.score([_LN3, 900.0], "sqrtsoftplus"), [np.log(4.0) ** 0.5, 30.0]
  )
  np.testing.assert_array_equal(
    oracle.score([-np.inf, -np.inf], "softmax"), [0, 0]
  )


def test_prepare_logits():
  config = RouterConfig(
    num_experts=2, top_k=1, logit_soft_cap=2.0, logit_multiplier=0.5
  )
  # 2 tanh(0.5 * 4 / 2) = 2 tanh(1).
  np.testing.assert_allclose(
    oracle.prepare_logits([4.0, -np.inf], config), [1.5231884, -np.inf]
  )


def test_selection_scores():
  x, bias = [[0.0, -np.inf, np.nan]], np.float32([0.25, 9.0, 9.0])
  config = RouterConfig(num_experts=3, top_k=1)
  np.testing.assert_array_equal(
    oracle.selection_scores(x, bias, config), [[0.75, -np.inf, -np.inf]]
  )
  config = RouterConfig(num_experts=3, top_k=1, bias_space="logits")
  np.testing.assert_array_equal(
    oracle.selection_scores(x, bias, config), [[0.25, -np.inf, -np.inf]]
  )


def test_best_and_group_score():
  assert oracle.best([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]
  assert oracle.best([0.0, -0.0], 2) == [0, 1]
  groups = dict(num_experts=8, top_k=6, num_groups=2, group_top_k=2)
  members = np.float32([1.0, 4.0, 2.0, 3.0])
  for group_score, worth in (("top1", 4), ("top2", 7), ("top_k", 9)):
    config = RouterConfig(group_score=group_score, **groups)
    assert oracle.group_score(members, config) == worth


def test_select_within_groups():
  config = RouterConfig(num_experts=6, top_k=2, num_groups=3, group_top_k=1)
  # Sums of pairs 5, 6, 4: only experts 2 and 3 are left.
  ids, cutoff = oracle.select([[5, 0, 3, 3, 4, 0]], config)
  np.testing.assert_array_equal(ids, [[2, 3]])
  np.testing.assert_array_equal(cutoff, [-np.inf])


def test_route():
  config = RouterConfig(
    num_experts=3,
    top_k=2,
    score_fn="softmax",
    score_after_top_k=True,
    scaling_factor=2.0,
  )
  logits = [[0.0, _LN3, -1.0], [np.nan, np.nan, 0.0], [9.0, 8.0, 7.0]]
  ids, weights, load, cutoff, mask = oracle.route(
    logits, None, config, [True, True, False]
  )
  np.testing.assert_array_equal(ids, [[1, 0], [2, 0], [0, 1]])
  np.testing.assert_allclose(weights, [[1.5, 0.5], [np.nan, np.nan], [0, 0]])
  np.testing.assert_array_equal(load, [1, 1, 0])
  np.testing.assert_array_equal(cutoff, [-1.0, -np.inf, 7.0])
  np.testing.assert_array_equal(mask, [True, False, False])


def test_sort_by_expert():
  idx = [[1, 0], [0, 1], [2, 0]]
  # Expert 0 has assignments 1, 2, 5; expert 1 has 0, 3; expert 2 has 4.
  order, inverse, sizes = oracle.sort_by_expert(idx, 3)
  np.testing.assert_array_equal(order, [1, 2, 5, 0, 3, 4])
  np.testing.assert_array_equal(inverse, [3, 0, 1, 4, 5, 2])
  np.testing.assert_array_equal(sizes, [3, 2, 1])
  order, _, sizes = oracle.sort_by_expert(idx, 3, [True, False, True], 1)
  np.testing.assert_array_equal(order, [1, 0, 4, 2, 3, 5])
  np.testing.assert_array_equal(sizes, [1, 1, 1])


def test_grouped_matmul():
  rhs = np.float32([[[2.0]], [[3.0]], [[5.0]]])
  out = oracle.grouped_matmul(np.float32([[1], [2], [3], [4]]), rhs, [1, 0, 2])
  np.testing.assert_array_equal(out, [[2], [10], [15], [0]])


def test_moe():
  one = np.ones((2, 1, 1), np.float32)
  x, ids = np.float32([[_LN3], [1.0]]), [[0, 1], [1, 0]]
  weights = np.float32([[0.5, 0.25], [np.nan, np.nan]])
  down = np.float32([[[1.0]], [[2.0]]])
  kept = np.array([[True, True], [False, False]])
  # silu(ln3) = 3/4 ln3, times ln3; weighted by 0.5 * 1 + 0.25 * 2 = 1.
  out = oracle.moe(x, one, one, down, ids, weights, kept)
  np.testing.assert_allclose(out, [[0.75 * _LN3**2], [np.nan]], rtol=1e-6)
  kept[0, 1] = False
  out = oracle.moe(x, one, one, down, ids, weights, kept)
  np.testing.assert_allclose(out[0], [0.375 * _LN3**2], rtol=1e-6)


def test_violation_and_dual_value():
  np.testing.assert_allclose(
    oracle.violation([[3, 1, 0, 0], [0, 0, 0, 0]]),
    [[2, 0, -1, -1], [0, 0, 0, 0]],
  )
  # Best of (1 + 0, 0 + 2) is 2, of (3, 2) is 3; less 2 * 1 / 2 * (0 + 2).
  assert oracle.dual_value([[1.0, 0.0], [3.0, 0.0]], np.array([0, 2]), 1) == 3


def test_dual_value_and_best_assignment_by_hand():
  scores = [[0.9, 0.1], [0.8, 0.7]]
  # Both prefer the first expert; the second token loses less by leaving it.
  assert oracle.dual_value(scores, [0.0, 0.0], 1) == pytest.approx(1.7)
  assert oracle.dual_value(scores, [-0.2, 0.2], 1) == pytest.approx(1.6)
  value, x = oracle.best_assignment(scores, 1)
  assert value == pytest.approx(1.6)
  np.testing.assert_array_equal(x, [[1, 0], [0, 1]])


def test_weights_and_their_gradient():
  # Scores e^-100 and e^-100 3: shares 1/4 and 3/4, of slope 3/16.
  row, ids = np.array([-100.0, _LN3 - 100.0, 5.0]), np.array([1, 0])
  for score_fn in ("sigmoid", "softmax"):
    config = RouterConfig(
      num_experts=3, top_k=2, score_fn=score_fn, norm_eps=0.0, scaling_factor=2
    )
    weights = oracle.chosen_weights(row, ids, config)
    np.testing.assert_allclose(weights, [1.5, 0.5])
    gradient = oracle.weights_gradient(row, ids, config, np.array([1.0, 0.0]))
    np.testing.assert_allclose(gradient, [-3 / 8, 3 / 8, 0], atol=1e-15)
