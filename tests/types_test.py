# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`RouterConfig`: what it derives and what it refuses; `Counts` that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute

pytestmark = pytest.mark.any_jax


@pytest.mark.parametrize(
  ("fields", "count"),
  (
    (dict(group_score="top1"), 1),
    (dict(group_score="top2"), 2),
    (dict(group_score="top_k"), 3),
  ),
)
def test_how_many_scores_make_up_that_of_a_group(fields, count):
  config = jaxroute.RouterConfig(
    num_experts=16, top_k=6, num_groups=4, group_top_k=2, **fields
  )
  assert config.group_score_count == count
  assert config.group_size == 4 and config.limits_groups


@pytest.mark.parametrize(
  ("fields", "on_logits", "row_softmax"),
  (
    (dict(), False, False),
    (dict(bias_space="logits"), True, False),
    (dict(score_after_top_k=True), True, False),
    (dict(score_fn="softmax"), False, True),
    (dict(score_fn="softmax", score_after_top_k=True), True, False),
    (dict(score_fn="softmax", bias_space="logits"), True, True),
  ),
)
def test_what_selection_and_scores_depend_on(fields, on_logits, row_softmax):
  config = jaxroute.RouterConfig(num_experts=8, top_k=2, **fields)
  assert config.selects_on_logits == on_logits
  assert config.needs_row_softmax == row_softmax
  assert not config.limits_groups


def test_numbers_of_numpy_and_jax_make_the_config_of_python_ones():
  plain = jaxroute.RouterConfig(
    num_experts=8, top_k=2, scaling_factor=2.0, logit_soft_cap=30
  )
  for integer, number in (
    (np.int64, np.float32),
    (np.uint8, np.float16),
    (jnp.int32, jnp.bfloat16),
    (np.array, jnp.array),
  ):
    config = jaxroute.RouterConfig(
      num_experts=integer(8),
      top_k=integer(2),
      scaling_factor=number(2.0),
      logit_soft_cap=number(30.0),
      normalize_weights=np.bool_(True),
    )
    assert config == plain and hash(config) == hash(plain)
    kinds = {type(value) for value in vars(config).values()}
    assert kinds == {int, float, bool, str}


def test_a_router_on_scores_compares_them_as_they_are():
  scores = jnp.array([[-1.0, 5.0, 2.0]])
  config = jaxroute.RouterConfig.on_scores(3, 2)
  bias = jnp.array([10.0, 0.0, 0.0])
  routing = jaxroute.route(scores, bias, config)
  np.testing.assert_array_equal(routing.expert_idx, [[0, 1]])
  np.testing.assert_array_equal(routing.cutoff, [2.0])


@pytest.mark.parametrize("histogram", (False, True))
def test_counts_of_the_parts_of_a_batch_are_those_of_the_batch(histogram):
  config = jaxroute.RouterConfig(num_experts=8, top_k=2, histogram=histogram)
  logits = jax.random.normal(jax.random.key(0), (10, 8))
  first, second, both = (
    jaxroute.route(x, None, config).counts
    for x in (logits[:4], logits[4:], logits)
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.map(jnp.add, first, second),
    both,
  )
  assert (both.histogram is not None) == histogram


@pytest.mark.parametrize(
  ("fields", "words"),
  (
    (dict(num_experts=0), ("num_experts", "0", "at least 1")),
    (dict(top_k=0), ("top_k", "0", "at least 1")),
    (dict(top_k=1.5), ("top_k", "1.5", "int")),
    (dict(num_groups=0), ("num_groups", "0")),
    (dict(group_top_k=0), ("group_top_k", "0")),
    (dict(top_k=9), ("top_k", "9", "add experts")),
    (dict(num_groups=3), ("num_groups", "3", "divide")),
    (dict(num_groups=4, group_top_k=5), ("group_top_k", "5", "4")),
    (dict(num_groups=8, top_k=2), ("top_k", "at most 1", "Keep more")),
    (dict(num_groups=8, group_top_k=2), ("group_score", "top2", "Use 'top1'")),
    (
      dict(num_groups=4, group_top_k=2, group_score="top_k", top_k=3),
      ("group_score", "top_k", "Use"),
    ),
    (dict(score_fn="relu"), ("score_fn", "relu", "sigmoid")),
    (dict(bias_space="probs"), ("bias_space", "probs", "logits")),
    (dict(group_score="max"), ("group_score", "max", "top1")),
    (dict(scaling_factor=float("nan")), ("scaling_factor", "nan", "finite")),
    (dict(logit_multiplier=float("inf")), ("logit_multiplier", "inf")),
    (dict(logit_soft_cap=0.0), ("logit_soft_cap", "0.0", "None")),
    (dict(norm_eps=-1.0), ("norm_eps", "-1.0", "[0, inf)")),
    # What a config.json may hold.
    (dict(scaling_factor=None), ("`scaling_factor`", "number", "got None")),
    (dict(norm_eps=None), ("`norm_eps`", "got None")),
    (dict(num_groups=None), ("`num_groups`", "int", "got None")),
    (dict(logit_soft_cap="30"), ("`logit_soft_cap`", "got '30'", "None")),
    (dict(num_experts="8"), ("`num_experts`", "int", "got '8'")),
    (dict(top_k=True), ("`top_k`", "int", "got True")),
    (dict(histogram=1), ("`histogram`", "bool", "got 1")),
    (dict(score_fn=None), ("`score_fn`", "got None", "sigmoid")),
    (dict(score_fn=["sigmoid"]), ("`score_fn`", "got a list")),
    # An inf in float32, or a 0 that divides or takes the -inf of a mask.
    (dict(scaling_factor=1e39), ("`scaling_factor`", "float32", "1e+39")),
    (dict(norm_eps=10**400), ("`norm_eps`", "float32")),
    (dict(logit_soft_cap=1e39), ("`logit_soft_cap`", "float32", "1e+39")),
    (dict(logit_soft_cap=1e-50), ("`logit_soft_cap`", "1e-50")),
    (dict(logit_multiplier=-1.0), ("`logit_multiplier`", "(0, inf)", "-1.0")),
    (dict(logit_multiplier=0), ("`logit_multiplier`", "(0, inf)", "got 0")),
    (dict(logit_multiplier=1e-45), ("`logit_multiplier`", "1e-45")),
  ),
)
def test_config_errors_name_field_value_and_fix(fields, words):
  with pytest.raises(ValueError) as error:
    jaxroute.RouterConfig(**{"num_experts": 8, "top_k": 2, **fields})
  for word in words:
    assert word in str(error.value)
