# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What real models bring to the training step: keys, variables, padding, MultiSteps."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxroute
from jaxroute import dual

RULE = dual.sign(1.0)
LOAD = jaxroute.Counts(load=jnp.array([[3, 1]], jnp.int32))


def _loss_fn(params, expert_bias, batch):
  """A loss with the gradient mean(batch), and a load of its own."""
  del expert_bias
  return params["w"] * jnp.mean(batch), (LOAD, {})


def _start(optimizer, variables=None):
  return jaxroute.init_train_state(
    {"w": jnp.zeros(())},
    jaxroute.init_router_state(RULE, 2),
    optimizer,
    variables,
  )


def _make_step(loss_fn, optimizer, **kwargs):
  return jax.jit(
    functools.partial(
      jaxroute.train_step,
      loss_fn=loss_fn,
      optimizer=optimizer,
      rule=RULE,
      **kwargs,
    )
  )


def test_every_step_and_micro_batch_has_its_own_key(key):
  def loss_fn(params, expert_bias, batch, *, rng):
    loss, (counts, _) = _loss_fn(params, expert_bias, batch)
    return loss, (counts, {"drawn": jax.random.uniform(rng)})

  optimizer = optax.sgd(1.0)
  state = _start(optimizer)
  for micro_batches in (1, 2):
    step = _make_step(loss_fn, optimizer, micro_batches=micro_batches)
    keys = [
      jax.random.fold_in(jax.random.fold_in(key, state.step), i)
      for i in range(micro_batches)
    ]
    expected = np.mean([jax.random.uniform(k) for k in keys])
    state, report = step(state, jnp.ones(2), rng=key)
    np.testing.assert_allclose(report["drawn"], expected, rtol=1e-6)
  report = jaxroute.eval_step(state, jnp.ones(2), loss_fn=loss_fn, rng=key)
  assert report["drawn"] == jax.random.uniform(key)


def test_micro_batches_hand_on_the_variables_and_a_skipped_step_does_not():
  def loss_fn(params, expert_bias, batch, *, variables):
    loss, (counts, _) = _loss_fn(params, expert_bias, batch)
    mean = 0.5 * variables["mean"] + 0.5 * jnp.mean(batch)
    after = {"mean": mean, "key": jax.random.fold_in(variables["key"], 1)}
    return loss + mean, (counts, {}, after)

  optimizer = optax.sgd(1.0)
  variables = {"mean": jnp.float32(8), "key": jax.random.key(0)}
  state = _start(optimizer, variables)
  step = _make_step(loss_fn, optimizer, micro_batches=2)
  # Strided parts, of the means 2 and 6: 8 -> 5 -> 5.5.
  batch = jnp.array([1.0, 5.0, 3.0, 7.0])
  after, report = step(state, batch)
  assert after.variables["mean"] == 5.5
  assert report["loss"] == (5 + 5.5) / 2
  assert after.variables["key"] != variables["key"]
  skipped, report = step(after, batch.at[0].set(jnp.nan))
  assert report["skipped"] == 1
  chex.assert_trees_all_equal(skipped.variables, after.variables)
  report = jaxroute.eval_step(after, batch, loss_fn=loss_fn)
  np.testing.assert_allclose(report["loss"], -4 * 4 + 4.75)


def _masked_loss_fn(params, expert_bias, batch):
  """A mean over the tokens that count: 0 / 0 where there are none."""
  del expert_bias
  error = (batch["x"] - params["w"]) ** 2
  mean = jnp.sum(error * batch["token_mask"]) / jnp.sum(batch["token_mask"])
  return mean, (LOAD, {"error": mean})


def _weight_fn(batch):
  return jnp.sum(batch["token_mask"])


def test_with_weights_micro_batches_make_the_mean_of_the_batch():
  optimizer = optax.sgd(1.0)
  # Of the four strided parts one has no token, the others 3, 1 and 2.
  batch = {
    "x": jnp.arange(12.0),
    "token_mask": jnp.array([1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0], jnp.float32),
  }
  results = [
    _make_step(
      _masked_loss_fn, optimizer, micro_batches=m, weight_fn=_weight_fn
    )(_start(optimizer), batch)
    for m in (1, 4)
  ]
  for state, report in results:
    assert report["skipped"] == 0
    np.testing.assert_allclose(state.params["w"], 2 * 21 / 6, rtol=1e-6)
    np.testing.assert_allclose(report["loss"], 121 / 6, rtol=1e-6)
    np.testing.assert_allclose(report["error"], 121 / 6, rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_without_a_token_is_skipped(micro_batches):
  optimizer = optax.sgd(1.0)
  state = _start(optimizer)
  batch = {"x": jnp.ones(4), "token_mask": jnp.zeros(4)}
  after, report = _make_step(
    _masked_loss_fn,
    optimizer,
    micro_batches=micro_batches,
    weight_fn=_weight_fn,
  )(state, batch)
  assert report["skipped"] == 1
  assert report["loss"] == report["grad_norm"] == 0
  chex.assert_trees_all_equal(
    dataclasses.replace(after, step=state.step), state
  )


def _multi_steps(every, **kwargs):
  return optax.MultiSteps(optax.sgd(1.0), every, **kwargs)


def _nested():
  inner = _multi_steps(2).gradient_transformation()
  return optax.MultiSteps(inner, 2)


def _injected():
  @optax.inject_hyperparams
  def optimizer(rate):
    return optax.MultiSteps(optax.sgd(rate), 4).gradient_transformation()

  return optimizer(rate=1.0)


OPTIMIZERS = {
  "the object": lambda: _multi_steps(4),
  "in a chain": lambda: optax.chain(
    optax.clip(10.0), _multi_steps(4).gradient_transformation()
  ),
  "injected": _injected,
  "nested": _nested,
}


@pytest.mark.implicit_promotion  # optax.MultiSteps promotes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_multi_steps_the_bias_moves_when_the_parameters_do(name):
  optimizer = OPTIMIZERS[name]()
  state = _start(optimizer)
  step = _make_step(_loss_fn, optimizer)
  for count in range(1, 6):
    state, report = step(state, jnp.ones(2))
    moves = count // 4
    assert state.params["w"] == -moves
    np.testing.assert_array_equal(
      state.router.expert_bias, moves * np.array([[-1, 1]])
    )
    np.testing.assert_array_equal(
      state.router.load, (count % 4) * LOAD.load, strict=True
    )
    np.testing.assert_array_equal(report["load"], LOAD.load)


@pytest.mark.implicit_promotion  # optax.MultiSteps promotes
@pytest.mark.parametrize("by", ["us", "optax"])
def test_a_skipped_part_of_multi_steps_discards_its_own_counts_only(by):
  kwargs = {}
  if by == "optax":
    kwargs["should_skip_update_fn"] = functools.partial(
      optax.transforms.skip_large_updates, max_squared_norm=9.0
    )
  optimizer = _multi_steps(2, **kwargs)
  state = _start(optimizer)
  step = _make_step(_loss_fn, optimizer)
  state, _ = step(state, jnp.ones(2))
  bad = jnp.full(2, 4.0 if by == "optax" else jnp.nan)
  state, report = step(state, bad)
  assert report["skipped"] == 1
  np.testing.assert_array_equal(state.router.load, LOAD.load)
  assert state.opt_state.mini_step == 1
  state, report = step(state, jnp.ones(2))
  assert report["skipped"] == 0
  assert state.params["w"] == -1
  np.testing.assert_array_equal(state.router.expert_bias, [[-1, 1]])
  np.testing.assert_array_equal(state.router.load, [[0, 0]])


@pytest.mark.implicit_promotion  # optax.MultiSteps promotes
def test_a_frozen_bias_stays_when_multi_steps_moves_the_parameters():
  optimizer = _multi_steps(2)
  state = _start(optimizer)
  step = _make_step(_loss_fn, optimizer, freeze_bias=True)
  for _ in range(2):
    state, _ = step(state, jnp.ones(2))
  assert state.params["w"] == -1
  np.testing.assert_array_equal(state.router.expert_bias, [[0, 0]])
  np.testing.assert_array_equal(state.router.load, [[0, 0]])
