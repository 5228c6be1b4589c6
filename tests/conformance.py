# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What every implementation of `route` is held to: the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxroute import scores, types

# An interpreted kernel is thousands of small operations: fusing them takes ten
# times as long as running them.
jit_interpreted = functools.partial(
  jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"}
)

# Of tables of shapes and families: our arithmetic is the same on all versions of
# JAX, whose compiler and interpreter these rows try.
_ON_EVERY_JAX = (
  *((0, 8, 2), (7, 5, 3), (257, 128, 8)),
  *("deepseek_v3", "olmoe"),
)


def rows(values, on_every_jax=_ON_EVERY_JAX, long=()):
  """Parameters of a test, of which a second version of JAX gets some.

  Args:
    values: a shape, a name of a family, ... each.
    on_every_jax: those that it gets.
    long: those that are for `--all`.

  Returns:
    A list of the parameters.
  """

  def marks(value):
    if value in long:
      return pytest.mark.long
    return () if value in on_every_jax else pytest.mark.any_jax

  return [
    pytest.param(value, marks=marks(value), id=str(value)) for value in values
  ]


def bias(num_experts, seed=1):
  """[E] float32, small enough to matter and not to decide everything."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=num_experts) * 0.1).astype(np.float32)


def with_selection(route):
  """A function that returns the selection scores, too, that `route` compares.

  An optimizing compiler may give scores other bits in another program. In the
  same one they are one value, kept whole by a barrier.

  Args:
    route: as `jaxroute.route`.

  Returns:
    The `Routing` and `[T, E]` float32.
  """

  def both(logits, expert_bias, config, token_mask=None):
    selection = scores.selection_scores(logits, expert_bias, config)
    routing = route(logits, expert_bias, config, token_mask)
    return routing, jax.lax.optimization_barrier(selection)

  return both


def routing_of(outputs):
  """A `Routing` of what a GPU kernel returns."""
  return types.Routing(
    expert_idx=outputs.expert_idx,
    weights=outputs.weights,
    counts=types.Counts(load=outputs.load),
    cutoff=outputs.cutoff,
    token_mask=outputs.token_mask,
  )


def assert_is_oracle(
  routed, logits, expert_bias, config, token_mask=None, cutoff_rtol=0
):
  """Ids and cutoff for the very selection scores, all else for those ids.

  Args:
    routed: what `with_selection` makes, jitted.
    logits: `[T, E]`.
    expert_bias: `[E]`, or None.
    config: a `RouterConfig`.
    token_mask: `[T]`, or None.
    cutoff_rtol: how far the cutoff may be from the selection scores.
  """
  r, selection = routed(logits, expert_bias, config, token_mask)
  ids, cutoff = oracle.select(np.asarray(selection), config)
  np.testing.assert_array_equal(r.expert_idx, ids)
  assert_cutoff(r.cutoff, cutoff, config, cutoff_rtol)
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


def assert_cutoff(actual, expected, config, rtol=0):
  """Equal cutoffs; on a GPU to some ulp of a softmax over all experts.

  A kernel there adds up its terms in another order than XLA does.

  Args:
    actual: `[T]`.
    expected: `[T]`.
    config: a `RouterConfig`.
    rtol: how far apart they may be anywhere.
  """
  atol = 0
  selects_on_softmax = config.needs_row_softmax and not config.selects_on_logits
  if selects_on_softmax and jax.default_backend() == "gpu":
    rtol, atol = max(rtol, 1e-6), 1e-7
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def assert_weights_are_exact(weigh, logits, config, jit=jax.jit, rtol=1e-6):
  """Weights, and their gradient, are off by 1e-6 of a token's largest weight at most.

  Args:
    weigh: a function of logits, for `[T, K]` weights and experts.
    logits: `[T, E]`, finite after the multiplier and the cap.
    config: a `RouterConfig`.
    jit: what it is compiled by.
    rtol: in place of 1e-6, for the gradient.
  """

  @jit
  def with_gradient(logits, d_weights):
    weights, pull, expert_idx = jax.vjp(weigh, logits, has_aux=True)
    return weights, expert_idx, pull(d_weights)[0]

  d_weights = np.random.default_rng(2).uniform(
    -1, 1, (len(logits), config.top_k)
  )
  d_weights = d_weights.astype(np.float32)
  weights, expert_idx, gradient = map(
    np.asarray, with_gradient(jnp.asarray(logits), jnp.asarray(d_weights))
  )
  # Numbers below are too small for float32.
  tiny = 2e-38
  rows = oracle.prepare_logits(logits, config)
  chosen = zip(rows, expert_idx, strict=True)
  for i, (row, ids) in enumerate(chosen):
    expected = oracle.chosen_weights(row, ids, config)
    largest = expected.max()
    np.testing.assert_allclose(
      weights[i], expected, 0, 1e-6 * largest + tiny, err_msg=str(row[ids])
    )
    expected = oracle.weights_gradient(row, ids, config, d_weights[i])
    np.testing.assert_allclose(
      gradient[i], expected, 0, rtol * largest + tiny, err_msg=str(row[ids])
    )
