# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Weights of chosen experts, from scores so small that `norm_eps` matters."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute import types
from jaxroute.routing import weights

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("norm_eps", (0.0, 1e-20, 1e-6, 0.5))
@pytest.mark.parametrize("size", (1.0, 1e-7))
def test_the_sum_is_normalized_with_the_eps_of_the_config(norm_eps, size):
  config = types.RouterConfig(num_experts=8, top_k=3, norm_eps=norm_eps)
  scores = np.float32([[0.5, 0.25, 0.125], [0.75, 0.5, 0.0]]) * np.float32(size)
  found, counted = weights.weigh_scores(jnp.asarray(scores), config, None)
  total = np.float64(scores).sum(1, keepdims=True) + norm_eps
  np.testing.assert_allclose(found, scores / total, rtol=1e-6)
  assert counted.all()


def test_scores_of_0_have_weights_of_0():
  config = types.RouterConfig(num_experts=8, top_k=3)
  found, counted = weights.weigh_scores(jnp.zeros((2, 3)), config, None)
  np.testing.assert_array_equal(found, 0)
  assert counted.all()
