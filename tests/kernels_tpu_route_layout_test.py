# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where experts and groups of experts lie in the routing kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.kernels.tpu.route import layout, refs
from jaxroute.kernels.tpu.route.plan import Plan


def test_indices_of_experts_are_divided_exactly():
  expert_idx = jnp.arange(1024, dtype=jnp.int32)
  for divisor in range(1, 1025):
    np.testing.assert_array_equal(
      layout.divide(expert_idx, divisor), np.arange(1024) // divisor
    )


@pytest.mark.parametrize("num_groups", (2, 4, 8, 16, 24, 32))
def test_a_segment_of_a_sublane_is_within_a_group(num_groups):
  num_experts = 192
  plan = Plan(
    config=jaxroute.RouterConfig(
      num_experts=num_experts, top_k=2, num_groups=num_groups, group_top_k=1
    ),
    tokens=1024,
  )
  for expert in range(num_experts):
    sublane, register = divmod(expert, plan.experts_per_sublane)
    segment = register // plan.experts_per_segment
    group = layout.group_of(plan, sublane, segment)
    assert group == expert // plan.config.group_size


@pytest.mark.parametrize("num_experts", (1, 60, 64, 256, 1024))
@pytest.mark.parametrize("histogram", (False, True))
def test_what_is_stored_by_columns_fits_its_buffer(num_experts, histogram):
  top_k = min(num_experts, 10)
  plan = Plan(
    config=jaxroute.RouterConfig(
      num_experts=num_experts, top_k=top_k, histogram=histogram
    ),
    tokens=8192,
  )
  shapes = refs.scratch_shapes(plan)
  assert (shapes.bin_counts is not None) == histogram
  assert shapes.projected_logits is None
  for buffer, registers in (
    (shapes.lists, sum(plan.list_sizes)),
    (shapes.bits_above, plan.words_per_sublane),
    (shapes.chosen_logits, plan.padded_top_k // 8),
  ):
    last = layout.column_slice(plan, registers - 1, plan.columns - 1)
    assert last.start + last.size < buffer.shape[0] + layout.COLUMN_PITCH
    # No two sublanes of a dense load are a multiple of 8 rows apart.
    across = layout.across_columns(plan, 0, 0)
    assert across.stride % 2 == 1
  last = layout.dense_slice(plan, plan.padded_top_k - 1)
  assert last.start + last.size <= shapes.expert_idx.shape[0]
