# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What every implementation of `route` is held to: the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jaxroute import scores

_selection = jax.jit(scores.selection_scores, static_argnames="config")

# An interpreted kernel is thousands of small operations: fusing them takes ten
# times as long as running them.
jit_interpreted = functools.partial(
  jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"}
)


def bias(num_experts, seed=1):
  """[E] float32, small enough to matter and not to decide everything."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=num_experts) * 0.1).astype(np.float32)


def assert_is_oracle(
  route, logits, expert_bias, config, token_mask=None, cutoff_rtol=0
):
  """Ids and cutoff for the very selection scores, all else for those ids."""
  r = route(logits, expert_bias, config, token_mask)
  selection = np.asarray(_selection(logits, expert_bias, config))
  ids, cutoff = oracle.select(selection, config)
  np.testing.assert_array_equal(r.expert_idx, ids)
  np.testing.assert_allclose(r.cutoff, cutoff, rtol=cutoff_rtol)
  _, weights, load, _, mask = oracle.route(
    logits, expert_bias, config, token_mask, expert_idx=ids
  )
  np.testing.assert_allclose(r.weights, weights, rtol=2e-5, atol=1e-6)
  np.testing.assert_array_equal(r.load, load)
  np.testing.assert_array_equal(r.token_mask, mask)
  assert [x.dtype for x in jax.tree.leaves(r)] == [
    jnp.int32,
    jnp.float32,
    jnp.int32,
    jnp.float32,
    jnp.bool_,
  ]
