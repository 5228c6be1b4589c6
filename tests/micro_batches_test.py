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

pytestmark = pytest.mark.any_jax


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


def _take_step(loss, params, batch, **kwargs):
  """A step of size 1 down the gradient of a loss, and its report."""
  rule, optimizer = dual.sign(1.0), optax.sgd(1.0)
  counts = jaxroute.Counts(load=jnp.array([[3, 1]], jnp.int32))

  def loss_fn(params, expert_bias, batch):
    value, metrics = loss(params, batch)
    return value, (counts, metrics)

  state = jaxroute.init_train_state(
    params, jaxroute.init_router_state(rule, 2), optimizer
  )
  step = functools.partial(
    jaxroute.train_step, loss_fn=loss_fn, optimizer=optimizer, rule=rule
  )
  return jax.jit(functools.partial(step, **kwargs))(state, batch)


@pytest.mark.parametrize(
  "dtype, slope",
  [(jnp.float16, 300), (jnp.float32, 1e20), (jnp.float32, 1e-30)],
)
def test_a_finite_gradient_is_taken_and_its_norm_is_right(dtype, slope):
  def loss(w, x):
    return slope * jnp.sum(w.astype(jnp.float32)) * jnp.mean(x), {}

  for micro_batches in (1, 2):
    state, report = _take_step(
      loss, jnp.ones(4, dtype), jnp.ones(2), micro_batches=micro_batches
    )
    np.testing.assert_allclose(report["grad_norm"], 2 * slope, rtol=1e-6)
    assert report["grad_norm"].dtype == jnp.float32
    assert report["skipped"] == 0
    np.testing.assert_array_equal(state.router.expert_bias, [[-1, 1]])
    np.testing.assert_allclose(
      np.asarray(state.params, np.float32), 1 - np.float32(slope), rtol=1e-3
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_gradient_that_is_not_finite_skips_the_step(bad):
  @jax.custom_jvp
  def ignore(b):
    return jnp.zeros_like(b)

  ignore.defjvp(lambda b, db: (jnp.zeros_like(b[0]), bad * db[0]))
  params = {"a": jnp.ones(3), "b": jnp.zeros(())}
  state, report = _take_step(
    lambda p, x: (jnp.sum(p["a"]) + ignore(p["b"]), {}), params, jnp.ones(2)
  )
  assert report["loss"] == 3
  assert report["skipped"] == 1
  chex.assert_trees_all_equal(state.params, params)


def test_sums_over_micro_batches_are_wider_than_the_parameters():
  def loss(w, x):
    value = (w * x.mean().astype(w.dtype)).astype(w.dtype)
    return value, {"count": jnp.sum(x > 0, dtype=jnp.int32), "loss16": value}

  state, report = _take_step(
    loss, jnp.ones((), jnp.bfloat16), jnp.ones(512), micro_batches=512
  )
  # In bfloat16 the sum of ones ends at 256.
  assert state.params == 0 and state.params.dtype == jnp.bfloat16
  assert report["loss"] == report["loss16"] == report["count"] == 1
  assert report["count"].dtype == report["loss16"].dtype == jnp.float32


@pytest.mark.implicit_promotion  # of int32 by the sums of x64
def test_with_x64_doubles_stay_doubles():
  with jax.enable_x64(True):
    third = jnp.ones(6, jnp.float64) / 3
    state, report = _take_step(
      lambda w, x: (w * x.mean(), {}),
      jnp.ones((), jnp.float64),
      third,
      micro_batches=3,
    )
    np.testing.assert_allclose(state.params, 2 / 3, rtol=1e-15)
    assert report["loss"].dtype == report["grad_norm"].dtype == jnp.float64
    assert state.router.load.dtype == jnp.int32


@pytest.mark.parametrize(
  "batch, words",
  [
    (
      {"x": jnp.ones(8), "key": jax.random.key(0)},
      r"`micro_batches`=2 .*got shape \(\) at batch\['key'\].*`rng`",
    ),
    ({"x": jnp.ones(8), "scale": 1.0}, r"\(\) at batch\['scale'\]"),
    ({"x": jnp.ones(7)}, r"got shape \(7,\) at batch\['x'\]"),
  ],
)
def test_what_cannot_be_split_is_named(batch, words):
  with pytest.raises(ValueError, match=words):
    _take_step(
      lambda w, b: (w * jnp.mean(b["x"]), {}),
      jnp.ones(()),
      batch,
      micro_batches=2,
    )


def test_a_batch_may_hold_arrays_of_no_size():
  batch = {"x": jnp.arange(8.0), "empty": jnp.zeros((8, 0))}
  _, report = _take_step(
    lambda w, b: (w * jnp.mean(b["x"]), {}),
    jnp.ones(()),
    batch,
    micro_batches=2,
  )
  assert float(report["loss"]) == 3.5


@pytest.mark.parametrize("micro_batches", (1, 2))
@pytest.mark.parametrize(
  ("metrics", "words"),
  (
    ({"a": {"b": "c"}}, r"got 'c' at metrics\['a'\]\['b'\]"),
    ({"key": jax.random.key(0)}, r"got key<fry> \(\) at metrics\['key'\]"),
  ),
)
def test_metrics_that_have_no_mean_are_named(metrics, words, micro_batches):
  with pytest.raises(ValueError, match=words):
    _take_step(
      lambda w, x: (w * jnp.mean(x), metrics),
      jnp.ones(()),
      jnp.ones(8),
      micro_batches=micro_batches,
    )


@pytest.mark.parametrize("weight", (None, "a", 1j, jnp.ones(2)))
def test_a_weight_that_is_no_number_is_named(weight):
  with pytest.raises(ValueError, match="`weight_fn` must return a real scalar"):
    _take_step(
      lambda w, x: (w * jnp.mean(x), {}),
      jnp.ones(()),
      jnp.ones(8),
      micro_batches=2,
      weight_fn=lambda batch: weight,
    )
