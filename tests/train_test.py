# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The training step: what it moves, and what it leaves alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases
from step_cases import LAYERS, D, E, K

import jaxroute
from jaxroute import dual


def test_a_train_step_adds_to_what_the_state_has_counted():
  rule, optimizer = dual.sign(0.5), optax.set_to_zero()
  config = jaxroute.RouterConfig(num_experts=2, top_k=1)

  def loss_fn(params, expert_bias, batch):
    routing = jaxroute.route(batch * params, expert_bias[0], config)
    counts = jax.tree.map(lambda x: x[None], routing.counts)
    return jnp.sum(routing.weights), (counts, {})

  router = jaxroute.init_router_state(rule, 2)
  # The step counts 3 tokens for expert 0, the state 5 for expert 1 before.
  counted = jaxroute.Counts(load=jnp.array([[0, 5]], jnp.int32))
  router = dataclasses.replace(router, counts=counted)
  after, report = jaxroute.train_step(
    jaxroute.init_train_state(jnp.float32(1), router, optimizer),
    jnp.array([[1.0, 0.0]] * 3),
    loss_fn=loss_fn,
    optimizer=optimizer,
    rule=rule,
  )
  np.testing.assert_array_equal(report["load"], [[3, 0]])
  np.testing.assert_array_equal(after.router.expert_bias, [[0.5, -0.5]])


@pytest.mark.any_jax
def test_padding_is_invisible_to_the_bias_trajectory():
  rule, optimizer = dual.sign(1e-2), optax.set_to_zero()
  plain = padded = step_cases.make_state(rule, optimizer)
  run = step_cases.make_step(rule, optimizer)
  for seed in range(3):
    batch = step_cases.make_batch(seed=seed)
    more = {
      "x": jnp.concatenate([batch["x"], jnp.full((7, D), 1e4)]),
      "token_mask": jnp.concatenate([batch["token_mask"], jnp.zeros(7, bool)]),
    }
    plain, _ = run(plain, batch)
    padded, report = run(padded, more)
    assert not report["skipped"]
  chex.assert_trees_all_equal(plain.router, padded.router)


@pytest.mark.implicit_promotion  # optax.adam promotes its count
@pytest.mark.parametrize("reason", ["argument", "nan"])
def test_a_skipped_step_changes_nothing_but_its_number(reason):
  rule = optax.chain(dual.sign(1e-2), optax.trace(0.9))
  optimizer = optax.adam(1e-3)
  state = step_cases.make_state(rule, optimizer)
  state, _ = step_cases.make_step(rule, optimizer)(
    state, step_cases.make_batch()
  )
  batch = step_cases.make_batch(seed=2)
  if reason == "nan":
    batch["x"] = batch["x"].at[1].set(jnp.nan)
  after, report = step_cases.make_step(
    rule, optimizer, skip=reason == "argument"
  )(state, batch)
  assert report["skipped"] == 1
  assert np.isnan(report["loss"]) == (reason == "nan")
  chex.assert_trees_all_equal(
    dataclasses.replace(after, step=state.step), state
  )
  assert after.step == state.step + 1


def test_freeze_trains_the_parameters_and_leaves_the_bias():
  rule, optimizer = dual.sign(1e-2), optax.sgd(0.1)
  state = step_cases.make_state(rule, optimizer)
  after, report = step_cases.make_step(rule, optimizer, freeze_bias=True)(
    state, step_cases.make_batch()
  )
  chex.assert_trees_all_equal(after.router, state.router)
  assert np.any(after.params["router"] != state.params["router"])
  assert report["skipped"] == 0


@pytest.mark.any_jax
def test_the_bias_of_a_batch_depends_on_earlier_batches_only():
  rule, optimizer = dual.sign(1e-2), optax.set_to_zero()
  state, report = step_cases.make_step(rule, optimizer)(
    step_cases.make_state(rule, optimizer), step_cases.make_batch()
  )
  loads = jaxroute.eval_step(
    step_cases.make_state(rule, optimizer),
    step_cases.make_batch(),
    loss_fn=step_cases.loss_fn,
  )["load"]
  np.testing.assert_array_equal(report["load"], loads)


def test_evaluation_changes_nothing_and_counts():
  rule, optimizer = dual.sign(1e-2), optax.sgd(0.1)
  state = step_cases.make_state(rule, optimizer)
  before = jax.tree.map(np.array, state)
  out = jax.jit(
    functools.partial(jaxroute.eval_step, loss_fn=step_cases.loss_fn)
  )(state, step_cases.make_batch())
  chex.assert_trees_all_equal(state, before)
  assert int(out["load"].sum()) == LAYERS * K * int(
    step_cases.make_batch()["token_mask"].sum()
  )


@pytest.mark.implicit_promotion  # optax.adam promotes its count
def test_weight_decay_and_the_optimizer_do_not_reach_the_bias():
  rule, optimizer = dual.sign(0.0), optax.adamw(1e-1, weight_decay=0.5)
  state = step_cases.make_state(rule, optimizer)
  bias = jnp.full((LAYERS, E), 0.25)
  state = dataclasses.replace(
    state, router=dataclasses.replace(state.router, expert_bias=bias)
  )
  for seed in range(3):
    state, _ = step_cases.make_step(rule, optimizer)(
      state, step_cases.make_batch(seed=seed)
    )
  np.testing.assert_array_equal(state.router.expert_bias, bias)


@pytest.mark.implicit_promotion  # optax.adam promotes its count
def test_the_state_can_be_donated_and_keeps_its_type():
  rule, optimizer = dual.sign(1e-2), optax.adam(1e-3)
  run = jax.jit(
    functools.partial(
      jaxroute.train_step,
      loss_fn=step_cases.loss_fn,
      optimizer=optimizer,
      rule=rule,
    ),
    donate_argnums=0,
  )
  state = step_cases.make_state(rule, optimizer)
  types = jax.tree.map(jax.typeof, state)
  for seed in range(3):
    state, _ = run(state, step_cases.make_batch(seed=seed))
    assert jax.tree.map(jax.typeof, state) == types
  assert run._cache_size() == 1


def test_sharded_tokens_give_the_same_bias_bit_for_bit():
  rule, optimizer = dual.sign(1e-2), optax.set_to_zero()
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  over_data = jax.NamedSharding(mesh, jax.P("data"))
  everywhere = jax.NamedSharding(mesh, jax.P())
  one = many = step_cases.make_state(rule, optimizer)
  many = jax.device_put(many, everywhere)
  run = step_cases.make_step(rule, optimizer, micro_batches=2)
  for seed in range(4):
    batch = step_cases.make_batch(64, seed)
    one, _ = run(one, batch)
    many, _ = run(many, jax.device_put(batch, over_data))
  chex.assert_trees_all_equal(
    jax.device_get(one.router), jax.device_get(many.router)
  )
  assert many.router.expert_bias.sharding.is_equivalent_to(everywhere, 2)


def _returning(out):
  """The arguments of a step whose loss function returns this of its loss."""
  return {
    "loss_fn": lambda params, bias, batch: out(jnp.sum(params["scale"])),
  }


def _counts(dtype=jnp.int32):
  return jaxroute.Counts(load=jnp.zeros((LAYERS, E), dtype))


@pytest.mark.parametrize(
  "kwargs, words",
  [
    (
      _returning(lambda loss: (loss, _counts().load)),
      r"return \(loss, \(counts, metrics\)\), got \(float32 \(\), int32",
    ),
    (_returning(lambda loss: (loss, (_counts(),))), "got .*an empty dict"),
    (_returning(lambda loss: loss), r"got float32 \(\)"),
    (
      _returning(lambda loss: (loss[None], (_counts(), {}))),
      r"scalar as the loss, got float32 \(1,\)",
    ),
    (_returning(lambda loss: (loss, (_counts(), None))), "a dict of metrics"),
    (
      _returning(lambda loss: (loss, (_counts(jnp.int16), {}))),
      "`load` must hold int32 counts, got int16",
    ),
    ({"loss_fn": 1.0}, "`loss_fn` must be a function, got 1.0"),
    ({"optimizer": "adam"}, "`optimizer` must be an optax.*got 'adam'"),
    ({"rule": dual.pid(1.0)}, "`state.rule_state` must be like"),
    ({"micro_batches": 0}, "`micro_batches` must be an int.*got 0"),
    ({"micro_batches": 2.0}, "`micro_batches` must be an int.*got 2.0"),
    ({"skip": jnp.zeros(2, bool)}, r"`skip` must be one bool.*\(2,\)"),
    ({"skip": "no"}, "`skip` must be one bool, got 'no'"),
    ({"freeze_bias": jnp.nan}, "`freeze_bias` must be one bool, got nan"),
    ({"optimizer": optax.adam(0.1)}, "`state.opt_state` must be like"),
    (
      {"rng": jnp.zeros(3, jnp.uint32)},
      r"`rng` must be one random key.*\(3,\)",
    ),
    (
      _returning(lambda loss: (loss, (_counts(), {"max_vio": loss}))),
      r"other names than \['bias_spread'.*got \['max_vio'\]. Rename",
    ),
    ({"rng": 0}, r"`rng` must be one random key, got 0.*jax.random.key\("),
    (
      {"weight_fn": lambda batch: batch["token_mask"]},
      r"`weight_fn` must return a real scalar, got bool \(32,\)",
    ),
    ({"state": "state"}, "`state` must be a `TrainState`, got 'state'"),
  ],
)
def test_a_mistake_is_named(kwargs, words):
  rule, optimizer = dual.sign(1e-3), optax.sgd(0.1)
  state = step_cases.make_state(rule, optimizer)
  kwargs = {
    "loss_fn": step_cases.loss_fn,
    "optimizer": optimizer,
    "rule": rule,
  } | kwargs
  with pytest.raises(ValueError, match=words):
    jaxroute.train_step(
      kwargs.pop("state", state), step_cases.make_batch(), **kwargs
    )


def test_integer_parameters_and_other_variables_are_named():
  rule, optimizer = dual.sign(1e-3), optax.sgd(0.1)
  params = {"scale": jnp.ones(()), "count": jnp.zeros((), jnp.int32)}
  state = step_cases.make_state(rule, optimizer, params)
  kwargs = {"optimizer": optimizer, "rule": rule}
  with pytest.raises(ValueError, match=r"int32 0 at params\['count'\]"):
    jaxroute.train_step(
      state, jnp.ones(2), loss_fn=step_cases.loss_fn, **kwargs
    )

  def loss_fn(params, expert_bias, batch, variables):
    return params["scale"], (_counts(), {}, {"mean": jnp.ones(3)})

  del params["count"]
  state = step_cases.make_state(rule, optimizer, params)
  state = dataclasses.replace(state, variables={"mean": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"\(2,\)'}, got .*\(3,\)"):
    jaxroute.train_step(state, jnp.ones(2), loss_fn=loss_fn, **kwargs)


def test_eval_step_reports_its_own_loss():
  rule, optimizer = dual.sign(1e-3), optax.sgd(0.1)
  kwargs = _returning(lambda loss: (loss, (_counts(), {"loss": 1.0})))
  with pytest.raises(ValueError, match=r"\['load', 'loss'\].*got \['loss'\]"):
    jaxroute.eval_step(
      step_cases.make_state(rule, optimizer), step_cases.make_batch(), **kwargs
    )
