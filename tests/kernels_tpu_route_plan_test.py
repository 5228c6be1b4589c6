# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Static shapes of the routing kernel, by hand."""

import pytest

import jaxroute
from jaxroute.kernels.tpu.route.plan import Plan


def _plan(num_experts, top_k=2, tokens=8192, width=0, **kwargs):
  config = jaxroute.RouterConfig(num_experts=num_experts, top_k=top_k, **kwargs)
  return Plan(config=config, tokens=tokens, width=width)


def test_deepseek_v3_by_hand():
  plan = _plan(256, 8, num_groups=8, group_top_k=4)
  assert plan.experts_per_sublane == 32
  assert plan.words_per_sublane == plan.sublanes_per_word == 1
  assert plan.segments_per_sublane == 1
  assert (plan.block_tokens, plan.blocks_per_step) == (1024, 2)
  assert plan.grid_steps == 4
  # 64 columns in all: counts up to 64 have 7 bits.
  assert plan.counter_bits == 7
  assert plan.list_length == 9


@pytest.mark.parametrize(
  ("tokens", "width", "blocks", "steps"),
  (
    (1, 0, 1, 1),
    (1024, 0, 1, 1),
    (3 * 1024, 0, 1, 3),
    (4 * 1024, 0, 2, 2),
    (5 * 1024, 0, 1, 5),
    (4 * 1024, 128, 1, 4),
  ),
)
def test_blocks_of_a_grid_step(tokens, width, blocks, steps):
  plan = _plan(64, tokens=tokens, width=width)
  assert (plan.blocks_per_step, plan.grid_steps) == (blocks, steps)
  assert plan.grid_steps * plan.step_tokens >= tokens


@pytest.mark.parametrize(
  ("num_experts", "sublanes"),
  ((8, 8), (32, 8), (33, 4), (64, 4), (65, 2), (128, 2), (129, 1)),
)
def test_sublanes_whose_bits_share_a_word(num_experts, sublanes):
  assert _plan(num_experts).sublanes_per_word == sublanes


def test_pitches_are_odd():
  for num_experts in (8, 64, 100, 1024):
    for tokens in (1, 300, 8192):
      plan = _plan(num_experts, tokens=tokens)
      assert plan.sublane_pitch % 2 == plan.dense_pitch % 2 == 1
