# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The linen layers: what they compute, what they count, what leaves them alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization

import jaxroute
import jaxroute.linen
from jaxroute import dual

pytestmark = pytest.mark.optimized

D, F, E, K = 16, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K, scaling_factor=2.5)
RULE = dual.sign(1e-2)


def _x(seed=0, shape=(3, 10, D)):
  return jax.random.normal(jax.random.key(seed), shape) + 0.3


def _init(model, seed=0):
  return jax.jit(model.init)(jax.random.key(seed), _x())


def _apply(model, params, state, x, **kwargs):
  """One counting forward pass; the output and the state with the load."""
  variables = {
    "params": params,
    "expert_bias": state.expert_bias,
    "load": state.load,
  }
  apply = jax.jit(functools.partial(model.apply, mutable=["load"]))
  out, counted = apply(variables, x, **kwargs)
  return out, dataclasses.replace(state, counts=jaxroute.linen.counts(counted))


class Stack(nn.Module):
  """MoE layers by a scan or a loop, with or without rematerialisation."""

  num_layers: int = 3
  scan: bool = True
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    cls = nn.remat(Residual) if self.remat else Residual
    if not self.scan:
      for i in range(self.num_layers):
        x, _ = cls(name=f"layer_{i}")(x, None)
      return x
    x, _ = nn.scan(
      cls,
      variable_axes={"params": 0, "expert_bias": 0, "load": 0},
      split_rngs={"params": True},
      length=self.num_layers,
    )(name="layers")(x, None)
    return x


class Residual(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y, _ = jaxroute.linen.MoE(CONFIG, hidden_size=F, name="moe")(x)
    return x + y, None


def test_collections_shapes_and_dtypes():
  variables = _init(
    jaxroute.linen.MoE(CONFIG, hidden_size=F, shared_hidden_size=4)
  )
  shapes = jax.tree.map(lambda v: (v.shape, v.dtype.name), variables)
  assert shapes == {
    "params": {
      "router": {"kernel": ((D, E), "float32")},
      "w_gate": ((E, D, F), "float32"),
      "w_up": ((E, D, F), "float32"),
      "w_down": ((E, F, D), "float32"),
      "shared_gate": ((D, 4), "float32"),
      "shared_up": ((D, 4), "float32"),
      "shared_down": ((4, D), "float32"),
    },
    "expert_bias": {"router": {"expert_bias": ((E,), "float32")}},
    "load": {"router": {"load": ((E,), "int32")}},
  }


@pytest.mark.any_jax
def test_a_histogram_is_a_third_collection():
  config = dataclasses.replace(CONFIG, histogram=True)
  model = jaxroute.linen.MoE(config, hidden_size=F)
  variables = _init(model)
  state = jaxroute.linen.init_router_state(variables, dual.quantile())
  assert state.counts.histogram["router"]["histogram"].shape == (E, 16)
  (_, out), counted = model.apply(variables, _x(), mutable=["histogram"])
  assert set(counted) == {"histogram"}
  np.testing.assert_array_equal(
    counted["histogram"]["router"]["histogram"], out.routing.counts.histogram
  )


@pytest.mark.any_jax
@pytest.mark.parametrize("shared", [0, 4])
def test_the_layer_against_the_oracle(shared):
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F, shared_hidden_size=shared)
  variables = _init(model)
  bias = jnp.linspace(-0.3, 0.3, E)
  variables["expert_bias"] = {"router": {"expert_bias": bias}}
  mask = jnp.arange(30).reshape(3, 10) % 4 != 0
  y, out = model.apply(variables, _x(), mask)
  p = jax.tree.map(np.asarray, variables["params"])
  x = np.asarray(_x()).reshape(-1, D)
  ids, weights, load, _, valid = oracle.route(
    x @ p["router"]["kernel"], bias, CONFIG, np.ravel(mask)
  )
  np.testing.assert_array_equal(out.routing.expert_idx[valid], ids[valid])
  np.testing.assert_array_equal(out.routing.load, load)
  np.testing.assert_array_equal(out.group_sizes, load)
  kept = np.repeat(valid[:, None], K, axis=1)
  expected = oracle.moe(
    x, p["w_gate"], p["w_up"], p["w_down"], ids, weights, kept
  )
  if shared:
    gate = x @ p["shared_gate"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ p["shared_up"])
    expected = expected + valid[:, None] * (hidden @ p["shared_down"])
  np.testing.assert_allclose(y.reshape(-1, D), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.devices(8)
def test_parts_on_a_mesh_are_those_of_one_call():
  partition = jaxroute.Partition(token_axes="data")
  model = jaxroute.linen.Router(CONFIG, partition=partition)
  x = _x(shape=(8, 2, D))
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "expert_bias", "load"}
    del variables["load"]
    apply = jax.jit(
      functools.partial(model.apply, mutable=jaxroute.linen.COUNTED)
    )
    (routing, _), once = apply(variables, x)
    assert once["load_parts"]["load"].shape == (8, E)
    # Whoever hands on what was counted may have changed the total.
    half = once | {"load": jax.tree.map(lambda v: v // 2, once["load"])}
    _, more = apply(variables | half, x)
  for counted, sum_ in (
    (once, routing.load),
    (more, routing.load // 2 + routing.load),
  ):
    np.testing.assert_array_equal(counted["load"]["load"], sum_)
    counts = jaxroute.linen.counts(counted)
    np.testing.assert_array_equal(counts.load["load"], sum_)


def test_only_a_forward_pass_with_a_mutable_load_counts():
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F)
  variables = _init(model)
  np.testing.assert_array_equal(variables["load"]["router"]["load"], 0)
  params = variables["params"]
  state = jaxroute.linen.init_router_state(variables, RULE)
  (_, out), once = _apply(model, params, state, _x())
  _, twice = _apply(model, params, once, _x())
  np.testing.assert_array_equal(once.load["router"]["load"], out.routing.load)
  chex.assert_trees_all_equal(
    twice.load, jax.tree.map(lambda v: 2 * v, once.load)
  )
  # Evaluation needs no load at all, and nothing comes back to be changed.
  y, _ = model.apply({"params": params, "expert_bias": state.expert_bias}, _x())
  assert y.shape == _x().shape


@pytest.mark.any_jax
def test_the_bias_chooses_and_never_weighs():
  config = dataclasses.replace(CONFIG, top_k=E)
  model = jaxroute.linen.Router(config)
  variables = _init(model)
  plain, _ = model.apply(variables, _x())
  variables["expert_bias"] = {
    "expert_bias": jax.random.normal(jax.random.key(3), E)
  }
  biased, _ = model.apply(variables, _x())
  assert np.any(plain.expert_idx != biased.expert_idx)
  dense = [
    np.take_along_axis(
      np.asarray(r.weights), np.argsort(r.expert_idx, axis=1), axis=1
    )
    for r in (plain, biased)
  ]
  np.testing.assert_allclose(*dense, rtol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_give_the_same_loads_gradients_and_bias(scan, remat):
  reference = Stack(scan=False)
  ref_vars = _init(reference)
  model = Stack(scan=scan, remat=remat)
  variables = _init(model)
  # The loop's parameters, stacked for the scan.
  if scan:
    stacked = jax.tree.map(
      lambda *v: jnp.stack(v),
      *[ref_vars["params"][f"layer_{i}"] for i in range(3)],
    )
    params = {"layers": stacked}
  else:
    params = ref_vars["params"]
  chex.assert_trees_all_equal_shapes(params, variables["params"])

  def run(model, variables, params):
    state = jaxroute.linen.init_router_state(variables, RULE)

    def loss(params, state, x):
      y, state = _apply(model, params, state, x)
      return jnp.mean(y**2), state

    @jax.jit
    def step(state, x):
      (_, state), grads = jax.value_and_grad(loss, has_aux=True)(
        params, state, x
      )
      return jaxroute.update(state, RULE), state.load, grads

    for seed in range(3):
      state, load, grads = step(state, _x(seed))

    def rows(tree):
      return np.concatenate(
        [np.reshape(v, (-1, E)) for v in jax.tree.leaves(tree)]
      )

    return rows(load), rows(state.expert_bias), optax.tree.norm(grads)

  load, bias, norm = run(model, variables, params)
  ref_load, ref_bias, ref_norm = run(reference, ref_vars, ref_vars["params"])
  np.testing.assert_array_equal(load, ref_load)
  np.testing.assert_array_equal(bias, ref_bias)
  assert np.any(bias)
  assert (load.sum(axis=1) == 30 * K).all()
  np.testing.assert_allclose(norm, ref_norm, rtol=1e-5)


@pytest.mark.any_jax
def test_a_bf16_model_routes_in_float32():
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F, dtype=jnp.bfloat16)
  variables = _init(model)
  state = jaxroute.linen.init_router_state(variables, RULE)
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables["params"])
  (y, out), state = _apply(model, params, state, _x().astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert out.logits.dtype == out.routing.weights.dtype == jnp.float32
  state = jaxroute.update(state, RULE)
  assert state.expert_bias["router"]["expert_bias"].dtype == jnp.float32
  assert state.load["router"]["load"].dtype == jnp.int32


def test_a_bias_cast_to_bf16_is_refused():
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F)
  variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), _init(model))
  with pytest.raises(ValueError, match="`expert_bias` must be float32"):
    model.apply(variables, _x())


@pytest.mark.any_jax
def test_capacity_drops_are_counted():
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F, capacity_factor=0.5)
  _, out = model.apply(_init(model), _x())
  capacity = 4  # ceil(0.5 * 30 * 2 / 8)
  np.testing.assert_array_equal(
    out.group_sizes, np.minimum(out.routing.load, capacity)
  )
  dropped = jaxroute.metrics.drop_fraction(out.routing.load, out.group_sizes)
  assert dropped >= 1 - capacity * E / (30 * K)


def test_orbax_round_trip_with_a_bias(tmp_path):
  model = Stack()
  variables = _init(model)
  rule = optax.chain(dual.sign(dual.inverse_sqrt(1e-2)), optax.trace(0.9))
  state = jaxroute.linen.init_router_state(variables, rule)
  for seed in range(3):
    _, state = _apply(model, variables["params"], state, _x(seed))
    state = jaxroute.update(state, rule)
  _, state = _apply(model, variables["params"], state, _x(4))
  assert np.any(jax.tree.leaves(state.expert_bias)[0])
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", state)
  with ocp.StandardCheckpointer() as saver:
    restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
  chex.assert_trees_all_equal(restored, state)
  _, more = _apply(model, variables["params"], state, _x(5))
  _, again = _apply(model, variables["params"], restored, _x(5))
  chex.assert_trees_all_equal(
    jaxroute.update(more, rule), jaxroute.update(again, rule)
  )


def test_flax_serialization_round_trip():
  rule = dual.smebu()
  variables = _init(jaxroute.linen.MoE(CONFIG, hidden_size=F))
  state = jaxroute.init_train_state(
    variables["params"],
    jaxroute.linen.init_router_state(variables, rule),
    optax.adam(1e-3),
  )
  filled = jax.tree.map(lambda x: x + 3, state)
  saved = serialization.to_bytes(filled)
  restored = serialization.from_bytes(state, saved)
  chex.assert_trees_all_equal(restored, filled)
  chex.assert_trees_all_equal_dtypes(restored, filled)


def test_what_a_saved_state_lacks_is_named():
  rule = dual.sign(1e-3)
  state = jaxroute.init_router_state(rule, 4)
  saved = serialization.to_state_dict(state)
  assert saved["counts"]["histogram"] is None
  del saved["rule_state"]
  with pytest.raises(ValueError, match="RouterState.*lacks.*'rule_state'"):
    serialization.from_state_dict(state, saved)
  with_histogram = jaxroute.init_router_state(rule, 4, histogram=True)
  saved = serialization.to_state_dict(with_histogram)
  with pytest.raises(ValueError, match="`histogram` of a Counts at .*counts"):
    serialization.from_state_dict(state, saved)


def test_init_is_abstract():
  model = Stack()
  abstract = jax.eval_shape(model.init, jax.random.key(0), _x())
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, _init(model))


def test_a_model_without_router_is_named():
  with pytest.raises(ValueError, match=r"'expert_bias' and 'load', got \['p"):
    jaxroute.linen.init_router_state({"params": {}}, RULE)


@pytest.mark.parametrize(
  "variables, rule, words",
  [
    (
      RULE,
      4,
      r"`variables`.*GradientTransformation.*jaxroute.init_router_state\(",
    ),
    ({"expert_bias": {}, "load": {}}, "sign", "`rule` must be.*got 'sign'"),
    (
      {"expert_bias": {"a": jnp.zeros(E), "b": jnp.zeros(E)}, "load": {}},
      RULE,
      r"`load` must hold an array for each.*\(8,\), \(8,\)\], got \[\]",
    ),
  ],
)
def test_a_mistake_in_making_the_state_is_named(variables, rule, words):
  with pytest.raises(ValueError, match=words):
    jaxroute.linen.init_router_state(variables, rule)


def test_a_model_applied_without_its_bias_is_named():
  model = jaxroute.linen.Router(CONFIG)
  params = _init(model)["params"]
  with pytest.raises(ValueError, match="collection 'expert_bias'.*Pass {'par"):
    model.apply({"params": params}, _x(), mutable=jaxroute.linen.COUNTED)


def test_a_scan_without_the_collections_of_the_router_is_named():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      jaxroute.linen.Router(CONFIG)(x)
      return x, None

  axes, rngs = {"params": 0}, {"params": True}
  model = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)()
  with pytest.raises(ValueError, match="'expert_bias'.*`variable_axes`"):
    model.init(jax.random.key(0), _x(), None)


def test_a_mask_of_another_shape_is_named():
  model = jaxroute.linen.MoE(CONFIG, hidden_size=F)
  with pytest.raises(
    ValueError, match=r"`token_mask`.*\(3, 10\), got \(10, 3\)"
  ):
    model.apply(_init(model), _x(), jnp.ones((10, 3), bool))
