# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The step functions: one dual step per optimizer step, whatever the batching."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases
from step_cases import CONFIG, LAYERS, E, K

import jaxroute
from jaxroute import dual, step


def test_update_moves_every_layer_by_its_own_load():
  rule = dual.sign(0.5)
  state = jaxroute.update(
    step_cases.loaded_state(rule, [3, 1], [2, 2], [0, 4]), rule
  )
  np.testing.assert_array_equal(
    state.expert_bias, [[-0.5, 0.5], [0, 0], [0.5, -0.5]]
  )
  np.testing.assert_array_equal(state.load, jnp.zeros((3, 2)))


@pytest.mark.parametrize("jit", [False, True])
def test_apply_false_discards_the_load_and_changes_nothing_else(jit):
  rule = optax.chain(dual.sign(dual.inverse(0.5)), optax.trace(0.9))
  state = jaxroute.update(step_cases.loaded_state(rule, [3, 1]), rule)
  loaded = step_cases.with_load(state, jnp.array([[1, 3]], jnp.int32))
  fn = jax.jit(step.update, static_argnums=1) if jit else step.update
  chex.assert_trees_all_equal(fn(loaded, rule, False), state)


def test_nothing_counted_leaves_the_bias():
  rule = dual.sign(0.5)
  state = jaxroute.update(jaxroute.init_router_state(rule, 4), rule)
  np.testing.assert_array_equal(state.expert_bias, 0)


def test_accumulate_takes_stacked_listed_and_single_routings():
  rule = dual.sign(0.5)
  logits = jax.random.normal(jax.random.key(0), (LAYERS, 6, E))
  bias = jnp.zeros(E)
  each = [jaxroute.route(x, bias, CONFIG) for x in logits]
  stacked = jax.vmap(lambda x: jaxroute.route(x, bias, CONFIG))(logits)
  state = jaxroute.init_router_state(rule, E, LAYERS)
  expected = np.stack([r.load for r in each])
  for routing in (each, stacked):
    state = jaxroute.accumulate(state, routing)
  np.testing.assert_array_equal(state.load, 2 * expected)
  single = jaxroute.init_router_state(rule, E)
  single = jaxroute.accumulate(single, each[0])
  np.testing.assert_array_equal(single.load[0], each[0].load)
  assert single.load.dtype == jnp.int32


@pytest.mark.parametrize("count", (2**24 + 1, 2**30 + 1))
def test_counts_add_up_exactly_beyond_what_float32_and_int16_hold(count):
  rule = dual.sign(0.5)
  state = jaxroute.init_router_state(rule, E)
  load = jnp.full((1, E), count, jnp.int32)
  state = dataclasses.replace(state, counts=jaxroute.Counts(load=load))
  routing = jaxroute.route(jnp.zeros((3, E)), None, CONFIG)
  after = jaxroute.accumulate(state, routing)
  np.testing.assert_array_equal(
    after.load[0], [count + 3] * K + [count] * (E - K)
  )
  assert after.load.dtype == jnp.int32


def test_update_takes_any_pytree_of_biases():
  rule = dual.sign(0.5)
  bias = {
    "a": {"expert_bias": jnp.zeros((2, 2))},
    "b": {"expert_bias": jnp.zeros(3)},
  }
  load = {
    "a": {"load": jnp.array([[3, 1], [1, 3]], jnp.int32)},
    "b": {"load": jnp.array([0, 3, 6], jnp.int32)},
  }
  state = jaxroute.RouterState(
    expert_bias=bias,
    counts=jaxroute.Counts(load=load),
    rule_state=rule.init(bias),
  )
  after = jaxroute.update(state, rule)
  np.testing.assert_array_equal(
    after.expert_bias["a"]["expert_bias"], [[-0.5, 0.5], [0.5, -0.5]]
  )
  np.testing.assert_array_equal(
    after.expert_bias["b"]["expert_bias"], [0.5, 0, -0.5]
  )
  chex.assert_trees_all_equal_structs(after, state)


@pytest.mark.devices(8)
def test_update_inside_shard_map_sums_before_the_sign():
  # Local signs disagree: device 0 sees (9, 0), the others (0, 1) each.
  rule = dual.sign(0.5)
  mesh = jax.make_mesh((8,), ("data",))
  loads = jnp.array([[[9, 0]]] + [[[0, 1]]] * 7, jnp.int32)
  state = jaxroute.init_router_state(rule, 2)

  def local(state, load):
    state = step_cases.with_load(state, load[0])
    return jaxroute.update(state, rule, axis_name="data").expert_bias

  with jax.set_mesh(mesh):
    run = jax.jit(
      jax.shard_map(local, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    )
    bias = run(state, jax.reshard(loads, jax.P("data")))
    text = run.lower(state, jax.reshard(loads, jax.P("data"))).as_text()
  np.testing.assert_array_equal(bias, [[-0.5, 0.5]])
  assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.devices(8)
def test_histograms_of_all_layers_and_loads_travel_in_one_all_reduce():
  rule, layers = dual.quantile(), 3
  mesh = jax.make_mesh((8,), ("data",))
  config = dataclasses.replace(CONFIG, histogram=True)
  logits = jax.random.normal(jax.random.key(0), (layers, 64, E)) + jnp.linspace(
    0.0, 2.0, E
  ).reshape(1, 1, E)
  state = jaxroute.init_router_state(rule, E, layers, histogram=True)

  def local(state, logits, axis_name="data"):
    routings = [
      jaxroute.route(x, b, config)
      for x, b in zip(logits, state.expert_bias, strict=True)
    ]
    state = jaxroute.accumulate(state, routings)
    return jaxroute.update(state, rule, axis_name=axis_name)

  expected = jax.jit(functools.partial(local, axis_name=None))(state, logits)
  with jax.set_mesh(mesh):
    run = jax.jit(
      jax.shard_map(
        local, in_specs=(jax.P(), jax.P(None, "data")), out_specs=jax.P()
      )
    )
    sharded = jax.reshard(logits, jax.P(None, "data"))
    compiled = run.lower(state, sharded).compile()
    chex.assert_trees_all_equal(
      jax.device_get(run(state, sharded)), jax.device_get(expected)
    )
  assert (
    len(re.findall(r"= \S+ all-reduce(-start)?\(", compiled.as_text())) == 1
  )
  assert np.any(expected.expert_bias)


@pytest.mark.devices(8)
def test_a_replicated_result_without_the_sum_is_refused_by_check_vma():
  rule = dual.sign(0.5)
  mesh = jax.make_mesh((8,), ("data",))

  def local(state, load):
    state = step_cases.with_load(state, load[0])
    return jaxroute.update(state, rule).expert_bias

  with jax.set_mesh(mesh), pytest.raises(ValueError, match="varying|vma|infer"):
    jax.shard_map(local, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())(
      jaxroute.init_router_state(rule, 2),
      jax.reshard(jnp.zeros((8, 1, 2), jnp.int32), jax.P("data")),
    )


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda r: jaxroute.init_router_state(r, 0), "`num_experts`.*0"),
    (lambda r: jaxroute.init_router_state(r, 2, 0), "`num_layers`.*0"),
    (
      lambda r: jaxroute.accumulate(
        jaxroute.init_router_state(r, E, 3),
        jaxroute.route(jnp.zeros((2, E)), None, CONFIG),
      ),
      r"\(3, 8\).*got \[\(8,\)\] of 1",
    ),
    (
      lambda r: jaxroute.update(
        step_cases.with_load(
          jaxroute.init_router_state(r, 2), jnp.zeros((1, 3), jnp.int32)
        ),
        r,
      ),
      r"of the shapes \[\(1, 2\)\], got \[\(1, 3\)\]",
    ),
    (
      lambda r: jaxroute.update(
        dataclasses.replace(
          jaxroute.init_router_state(r, 2),
          expert_bias=jnp.zeros((1, 2), jnp.bfloat16),
        ),
        r,
      ),
      "`expert_bias` must be float32, got bfloat16",
    ),
    (
      lambda r: step_cases.make_step(r, optax.sgd(0.1), micro_batches=5)(
        step_cases.make_state(r, optax.sgd(0.1)), step_cases.make_batch()
      ),
      "`micro_batches`=5.*divide",
    ),
    (
      lambda r: jaxroute.train_step(
        step_cases.make_state(r, optax.sgd(0.1)),
        step_cases.make_batch(),
        loss_fn=lambda params, bias, batch: (
          jnp.sum(params["scale"]),
          (jnp.zeros((LAYERS, E), jnp.int32), {}),
        ),
        optimizer=optax.sgd(0.1),
        rule=r,
      ),
      r"`loss_fn` must return .*`jaxroute.Counts`.*Counts\(load=",
    ),
    (
      # A bool for each layer, which would be one for each expert.
      lambda r: step.update(
        step.init_router_state(r, 2, 2), r, apply=jnp.array([True, False])
      ),
      r"`apply` must be one bool, got bool \(2,\). It holds for all layers.",
    ),
    (
      lambda r: step.update(step.init_router_state(r, 2), r, apply=None),
      "`apply` must be one bool, got None",
    ),
    (
      lambda r: step.init_router_state(r, 2, histogram="no"),
      "`histogram` must be a bool, got 'no'",
    ),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call(dual.sign(1e-3))
