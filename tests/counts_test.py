# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One bias state: what counts it takes, and which mistakes it names."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jaxroute
from jaxroute import counts as counts_lib
from jaxroute import dual, layer

CONFIG = jaxroute.RouterConfig(num_experts=4, top_k=2)
RULE = dual.sign(1e-3)


def _state(*layers):
  """A state of one array of loads, or of a collection of named layers."""
  if not layers:
    return jaxroute.init_router_state(RULE, 4)
  bias = {name: {"expert_bias": jnp.zeros(4)} for name in layers}
  load = {name: {"load": jnp.zeros(4, jnp.int32)} for name in layers}
  return jaxroute.RouterState(
    expert_bias=bias,
    counts=jaxroute.Counts(load=load),
    rule_state=RULE.init(bias),
  )


def _routing():
  return jaxroute.route(jnp.arange(12.0).reshape(3, 4), None, CONFIG)


def _output(routing):
  return jaxroute.MoEOutput(
    routing=routing, logits=None, group_sizes=routing.load
  )


@pytest.mark.parametrize("layers", [(), ("router",)])
@pytest.mark.parametrize("form", ["routing", "output", "counts", "list"])
def test_a_state_of_one_layer_takes_whatever_a_layer_returns(layers, form):
  routing = _routing()
  given = {
    "routing": routing,
    "output": _output(routing),
    "counts": routing.counts,
    "list": [_output(routing)],
  }[form]
  state = jaxroute.accumulate(_state(*layers), given)
  (load,) = jax.tree.leaves(state.load)
  np.testing.assert_array_equal(load.reshape(-1), [0, 0, 3, 3])
  assert jax.tree.structure(state) == jax.tree.structure(_state(*layers))
  np.testing.assert_array_equal(jaxroute.max_vio(state), [1.0])


def test_a_state_of_named_layers_takes_counts_of_its_structure():
  state = _state("a", "b")
  load = {
    "a": {"load": jnp.array([4, 0, 0, 0], jnp.int32)},
    "b": {"load": jnp.array([1, 2, 1, 0], jnp.int32)},
  }
  counts = jaxroute.Counts(load=load)
  for _ in range(2):
    state = jaxroute.accumulate(state, counts)
  np.testing.assert_array_equal(state.load["b"]["load"], [2, 4, 2, 0])
  # Loads of layers one after the other, wherever they lie.
  for holder in (state, counts, load, list(load.values())):
    np.testing.assert_array_equal(jaxroute.max_vio(holder), [3.0, 1.0])


def test_max_vio_of_what_a_layer_returns_is_that_of_its_load():
  routing = _routing()
  for holder in (routing, _output(routing), routing.counts, routing.load):
    assert jaxroute.max_vio(holder) == 1.0
    assert jaxroute.max_vio(holder).shape == ()


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_shards_of_all_layers_counted_is_summed_at_once(kind):
  config = dataclasses.replace(CONFIG, histogram=True)
  state = jaxroute.init_router_state(RULE, 4, 2, histogram=True)
  x = jax.random.normal(jax.random.key(0), (16, 3)) + 0.5
  weights = jax.random.normal(jax.random.key(1), (2, 3, 4))

  def run(x, partition=None):
    layers = [
      layer.router(x, w, b, config, partition=partition)[0]
      for w, b in zip(weights, state.expert_bias, strict=True)
    ]
    return jaxroute.accumulate(state, layers)

  expected = jax.jit(run)(x)
  partition = jaxroute.Partition(token_axes="data")
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(kind,))):
    step = jax.jit(functools.partial(run, partition=partition))
    compiled = step.lower(x).compile()
    chex.assert_trees_all_equal(jax.device_get(step(x)), expected)
  sums = re.findall(r"= (\S+) all-reduce(?:-start)?\(", compiled.as_text())
  assert [s.split("{")[0] for s in sums] == ["s32[136]"]  # 2 x 4 x (1 + 16)


def test_parts_do_not_outlive_their_counts():
  parts = jaxroute.types.Parts(load=jnp.array([[1, 2], [3, 4]]))
  total = jaxroute.Counts(load=jnp.array([4, 6]))
  counts = counts_lib.of_parts(parts, total)
  assert counts.parts is parts and total.parts is None
  chex.assert_trees_all_equal(counts, total)
  assert jax.tree.map(lambda c: 2 * c, counts).parts is None
  assert dataclasses.replace(counts, load=total.load).parts is None
  # Those of a layer are missing, or of another number of shards.
  total = jaxroute.Counts(load=(total.load, total.load))
  for second in (None, parts.load[:1]):
    some = jaxroute.types.Parts(load=(parts.load, second))
    assert counts_lib.of_parts(some, total) is total


def _of_dtype(dtype):
  return jaxroute.Counts(load=jnp.zeros((1, 4), dtype))


@pytest.mark.parametrize(
  "state, routing, words",
  [
    (_state(), {"router": {"load": 0}}, r"got a dict.*linen.counts\("),
    (_state(), "load", "`routing` must be a `Routing`.*got a str"),
    (_state(), _state(), "`routing` must be.*got a RouterState"),
    (_state(), jnp.zeros((1, 4), jnp.int32), "`routing` must be a `Routing`"),
    (_state(), [], "at least one layer, got none"),
    (_state(), _of_dtype(jnp.int8), "int32 counts, got int8"),
    (_state(), _of_dtype(jnp.uint32), "int32 counts, got uint32"),
    (_state(), _of_dtype(jnp.float32), "int32 counts, got float32"),
    (_state("a", "b"), [_routing()] * 2, r"structure of the state's.*counts\("),
    (
      _of_dtype(jnp.int32),
      _routing(),
      "`state` must be a `RouterState`.*Counts",
    ),
  ],
)
def test_accumulate_names_a_mistake(state, routing, words):
  with pytest.raises(ValueError, match=words):
    jaxroute.accumulate(state, routing)


def _of_other_shape():
  rule = optax.trace(0.9)
  state = jaxroute.init_router_state(rule, 4)
  return rule, dataclasses.replace(state, rule_state=rule.init(jnp.zeros(4)))


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: jaxroute.init_router_state("sign", 4), "`rule`.*got 'sign'.*dual"),
    (lambda: jaxroute.init_router_state(4, RULE), "`rule` must be.*got 4"),
    (
      lambda: jaxroute.init_router_state({"params": {}}, RULE),
      r"got a dict.*jaxroute.linen.init_router_state\(variables, rule\)",
    ),
    (lambda: jaxroute.init_router_state(RULE, 4.0), "`num_experts`.*int.*4.0"),
    (
      lambda: jaxroute.update(_state(), dual.pid(1e-3)),
      r"`state.rule_state` must be.*PidState.*got \(EmptyState",
    ),
    (
      lambda: jaxroute.update(*reversed(_of_other_shape())),
      r"`state.rule_state`.*\(1, 4\).*got.*\(4,\)",
    ),
    (
      lambda: jaxroute.update(RULE, _state()),
      "`state` must be a `RouterState`",
    ),
    (lambda: jaxroute.max_vio("load"), "`load` must be.*got a str"),
    (lambda: jaxroute.max_vio({}), "`load` must be.*got a dict of \\[\\]"),
    (
      lambda: jaxroute.max_vio({"load": {}, "histogram": _routing().load}),
      r"loads only.*counted\[.load.\]",
    ),
  ],
)
def test_a_mistake_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_counts_that_a_state_cannot_hold_are_named():
  state = jaxroute.init_router_state(dual.sign(1.0), 2)
  counts = jaxroute.Counts(load=np.array([[2**31, 0]]))
  with pytest.raises(ValueError, match=r"below 2\*\*31, got 2147483648"):
    jaxroute.accumulate(state, counts)
  counts = jaxroute.Counts(load=np.array([[2**31 - 1, 0]]))
  assert jaxroute.accumulate(state, counts).load[0, 0] == 2**31 - 1


def test_layers_of_different_sizes_are_named():
  state = jaxroute.init_router_state(dual.sign(1.0), 4, num_layers=2)
  layers = [jaxroute.Counts(load=jnp.ones(e, jnp.int32)) for e in (4, 8)]
  with pytest.raises(
    ValueError, match=r"\(2, 4\).*got \[\(4,\), \(8,\)\] of 2"
  ):
    jaxroute.accumulate(state, layers)
