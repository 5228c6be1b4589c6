# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Micro-batches make one step: counts add up, gradients and metrics average."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases
from step_cases import CONFIG, LAYERS, E

import jaxroute
from jaxroute import dual


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_make_one_update_with_the_same_bias(micro_batches):
  # Frozen parameters: the routes are then the same bit for bit, so the whole
  # trajectory of the bias must be.
  rule = optax.chain(dual.sign(dual.inverse_sqrt(1e-2)), optax.trace(0.9))
  optimizer = optax.set_to_zero()
  whole = split = step_cases.make_state(rule, optimizer)
  one = step_cases.make_step(rule, optimizer)
  many = step_cases.make_step(rule, optimizer, micro_batches=micro_batches)
  for seed in range(6):
    whole, whole_report = one(whole, step_cases.make_batch(seed=seed))
    split, split_report = many(split, step_cases.make_batch(seed=seed))
    np.testing.assert_array_equal(whole_report["load"], split_report["load"])
  chex.assert_trees_all_equal(whole.router, split.router)
  assert np.any(whole.router.expert_bias)


def test_micro_batches_average_gradients_and_metrics():
  rule, optimizer = dual.sign(1e-2), optax.sgd(0.1)
  rows = {k: v for k, v in step_cases.make_batch().items()}
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), rows)
  state = step_cases.make_state(rule, optimizer)
  # Strided parts: both micro-batches of the doubled batch are the batch.
  one, report = step_cases.make_step(rule, optimizer)(state, rows)
  two, doubled = step_cases.make_step(rule, optimizer, micro_batches=2)(
    state, twice
  )
  chex.assert_trees_all_close(one.params, two.params, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(report["value"], doubled["value"], rtol=1e-6)
  np.testing.assert_array_equal(2 * report["load"], doubled["load"])


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_histograms_of_micro_batches_add_up(micro_batches):
  config = dataclasses.replace(CONFIG, histogram=True)

  def loss_fn(params, expert_bias, batch):
    def layer(total, inputs):
      w, bias = inputs
      r = jaxroute.route(batch["x"] @ w, bias, config, batch["token_mask"])
      return total + jnp.sum(r.weights), r.counts

    loss, counts = jax.lax.scan(
      layer, jnp.zeros(()), (params["router"], expert_bias)
    )
    return loss, (counts, {})

  rule, optimizer = dual.quantile(), optax.set_to_zero()
  router = jaxroute.init_router_state(rule, E, LAYERS, histogram=True)
  state = jaxroute.init_train_state(step_cases.make_params(), router, optimizer)
  run = jax.jit(
    functools.partial(
      jaxroute.train_step,
      loss_fn=loss_fn,
      optimizer=optimizer,
      rule=rule,
      micro_batches=micro_batches,
    )
  )
  max_vio = []
  for _ in range(4):
    state, report = run(state, step_cases.make_batch(64))
    max_vio.append(report["max_vio"])
  assert max_vio[0] > 0.5 > 0.3 > max_vio[-1]
  whole = jax.jit(
    functools.partial(
      jaxroute.train_step, loss_fn=loss_fn, optimizer=optimizer, rule=rule
    )
  )
  one = jaxroute.init_train_state(step_cases.make_params(), router, optimizer)
  for _ in range(4):
    one, _ = whole(one, step_cases.make_batch(64))
  chex.assert_trees_all_equal(one.router, state.router)
  np.testing.assert_array_equal(state.router.counts.histogram, 0)
  with pytest.raises(ValueError, match="must count a histogram"):
    jaxroute.train_step(
      one,
      step_cases.make_batch(64),
      loss_fn=step_cases.loss_fn,
      optimizer=optimizer,
      rule=rule,
    )
