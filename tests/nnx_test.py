# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The nnx layers: the numbers of the linen ones, and nnx's own traps."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import dual

pytestmark = pytest.mark.optimized

D, F, E, K = 16, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K)
RULE = optax.chain(dual.sign(dual.inverse_sqrt(1e-2)), optax.trace(0.5))


def _x(seed=0):
  return jax.random.normal(jax.random.key(seed), (3, 10, D)) + 0.3


def _model(seed=0, **kwargs):
  return jaxroute.nnx.MoE(
    CONFIG, in_features=D, hidden_size=F, rngs=nnx.Rngs(seed), **kwargs
  )


class Stack(nnx.Module):
  """Three MoE layers, made by vmap and run by scan."""

  def __init__(self, *, remat: bool, rngs: nnx.Rngs):
    self.remat = remat

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
      return jaxroute.nnx.MoE(CONFIG, in_features=D, hidden_size=F, rngs=rngs)

    self.layers = make(rngs)

  def __call__(self, x):
    def apply(x, layer):
      return x + layer(x)[0]

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
      return (nnx.remat(apply) if self.remat else apply)(x, layer)

    return run(x, self.layers)


def _linen_variables(model):
  """The same layer as linen variables."""
  params = {
    name: getattr(model, name)[...]
    for name in ("w_gate", "w_up", "w_down")
    + (("shared_gate", "shared_up", "shared_down") if model.has_shared else ())
  }
  params["router"] = {"kernel": model.router.kernel[...]}
  return {
    "params": params,
    "expert_bias": {"router": {"expert_bias": model.router.expert_bias[...]}},
    "load": {"router": {"load": model.router.load[...]}},
  }


@pytest.mark.parametrize(
  "kwargs",
  [
    {},
    {"shared_hidden_size": 4, "dtype": jnp.bfloat16, "capacity_factor": 1.0},
  ],
)
def test_nnx_equals_linen(kwargs):
  model = _model(**kwargs)
  model.router.expert_bias[...] = jnp.linspace(-0.3, 0.3, E)
  other = jaxroute.linen.MoE(CONFIG, hidden_size=F, **kwargs)
  variables = _linen_variables(model)
  mask = jnp.arange(30).reshape(3, 10) % 4 != 0

  def loss(params):
    (y, out), counted = other.apply(
      {**variables, "params": params}, _x(), mask, mutable=["load"]
    )
    return jnp.sum(y.astype(jnp.float32) ** 2), (y, out, counted)

  @nnx.jit
  def both(model):
    def loss(model):
      y, out = model(_x(), mask)
      return jnp.sum(y.astype(jnp.float32) ** 2), (y, out)

    return nnx.grad(loss, has_aux=True)(model)

  grads, (y, out, counted) = jax.jit(jax.grad(loss, has_aux=True))(
    variables["params"]
  )
  nnx_grads, (nnx_y, nnx_out) = both(model)
  chex.assert_trees_all_equal((nnx_y, nnx_out), (y, out))
  np.testing.assert_array_equal(
    model.router.load[...], counted["load"]["router"]["load"]
  )
  pure = nnx.to_pure_dict(nnx_grads)
  chex.assert_trees_all_equal(pure, grads)


@pytest.mark.any_jax
@pytest.mark.parametrize(
  "rule", [RULE, dual.quantile()], ids=["sign", "quantile"]
)
def test_a_run_of_both_has_the_same_bias_trajectory(rule):
  config = dataclasses.replace(CONFIG, histogram=rule is not RULE)
  model = jaxroute.nnx.MoE(
    config, in_features=D, hidden_size=F, rngs=nnx.Rngs(0)
  )
  other = jaxroute.linen.MoE(config, hidden_size=F)
  variables = other.init(jax.random.key(0), _x())
  variables = dict(variables, params=_linen_variables(model)["params"])
  state = jaxroute.linen.init_router_state(variables, rule)
  rule_state = jaxroute.nnx.init_rule_state(model, rule)
  counts = ["load", "histogram"] if config.histogram else ["load"]
  for seed in range(4):
    model(_x(seed))
    rule_state = jaxroute.nnx.update(model, rule, rule_state)
    _, counted = other.apply(
      {"params": variables["params"], "expert_bias": state.expert_bias},
      _x(seed),
      mutable=jaxroute.linen.COUNTED,
    )
    state = dataclasses.replace(state, counts=jaxroute.linen.counts(counted))
    state = jaxroute.update(state, rule)
    np.testing.assert_array_equal(
      model.router.expert_bias[...], state.expert_bias["router"]["expert_bias"]
    )
    for name in counts:
      np.testing.assert_array_equal(getattr(model.router, name)[...], 0)
  assert np.any(model.router.expert_bias[...])


def test_eval_does_not_count_and_train_does():
  model = _model()
  model.eval()
  model(_x())
  np.testing.assert_array_equal(model.router.load[...], 0)
  model.train()
  _, out = model(_x())
  np.testing.assert_array_equal(model.router.load[...], out.routing.load)


def test_apply_false_discards_the_load_and_changes_nothing_else():
  model = _model()
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)
  model(_x())
  after = jaxroute.nnx.update(model, RULE, rule_state, apply=False)
  chex.assert_trees_all_equal(after, rule_state)
  np.testing.assert_array_equal(model.router.expert_bias[...], 0)
  np.testing.assert_array_equal(model.router.load[...], 0)


@pytest.mark.implicit_promotion  # optax.adam promotes its count
def test_the_optimizer_and_weight_decay_pass_the_bias_by():
  model = _model()
  bias = jnp.linspace(-0.3, 0.3, E)
  model.router.expert_bias[...] = bias
  optimizer = nnx.Optimizer(
    model, optax.adamw(1e-2, weight_decay=0.5), wrt=nnx.Param
  )
  before = model.w_up[...]

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.sum(m(_x())[0] ** 2))(model)
    optimizer.update(model, grads)

  step(model, optimizer)
  step(model, optimizer)
  np.testing.assert_array_equal(model.router.expert_bias[...], bias)
  assert np.any(model.w_up[...] != before)
  assert model.router.load[...].sum() == 2 * 30 * K


@pytest.mark.any_jax
def test_a_cast_of_the_parameters_leaves_bias_and_load_alone():
  model = _model()
  params = nnx.state(model, nnx.Param)
  nnx.update(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
  y, out = model(_x().astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert out.routing.weights.dtype == jnp.float32
  assert model.router.expert_bias[...].dtype == jnp.float32
  assert model.router.load[...].dtype == jnp.int32


@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_count_once_and_update_every_layer(remat):
  model = Stack(remat=remat, rngs=nnx.Rngs(0))
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)

  @nnx.jit
  def step(model, x):
    return nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)

  biases = []
  for seed in range(3):
    step(model, _x(seed))
    load = model.layers.router.load[...]
    assert load.shape == (3, E)
    np.testing.assert_array_equal(load.sum(axis=1), 30 * K)
    rule_state = jaxroute.nnx.update(model, RULE, rule_state)
    biases.append(np.asarray(model.layers.router.expert_bias[...]))
  # The layers by hand, one after the other.
  plain = Stack(remat=False, rngs=nnx.Rngs(0))
  state = jaxroute.nnx.init_rule_state(plain, RULE)
  for seed, bias in enumerate(biases):
    plain(_x(seed))
    state = jaxroute.nnx.update(plain, RULE, state)
    np.testing.assert_array_equal(plain.layers.router.expert_bias[...], bias)


def test_update_works_under_jit():
  model = _model()
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)

  @nnx.jit
  def step(model, rule_state):
    model(_x())
    return jaxroute.nnx.update(model, RULE, rule_state)

  state = step(model, rule_state)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, rule_state)
  assert np.any(model.router.expert_bias[...])


def test_orbax_round_trip_with_a_bias(tmp_path):
  model = _model()
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)
  for seed in range(3):
    model(_x(seed))
    rule_state = jaxroute.nnx.update(model, RULE, rule_state)
  model(_x(4))
  saved = {"model": nnx.to_pure_dict(nnx.state(model)), "rule": rule_state}
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", saved)
  fresh = _model(seed=1)
  with ocp.StandardCheckpointer() as saver:
    loaded = saver.restore(tmp_path / "state", jax.eval_shape(lambda: saved))
  state = nnx.state(fresh)
  nnx.replace_by_pure_dict(state, loaded["model"])
  nnx.update(fresh, state)
  assert np.any(fresh.router.expert_bias[...])
  assert np.any(fresh.router.load[...])
  for m, r in ((model, rule_state), (fresh, loaded["rule"])):
    m(_x(5))
    jaxroute.nnx.update(m, RULE, r)
  chex.assert_trees_all_equal(
    nnx.to_pure_dict(nnx.state(fresh)), nnx.to_pure_dict(nnx.state(model))
  )


def test_linen_collections_arrive_as_our_variable_types():
  wrapped = nnx.bridge.ToNNX(
    jaxroute.linen.MoE(CONFIG, hidden_size=F), rngs=nnx.Rngs(0)
  )
  nnx.bridge.lazy_init(wrapped, _x())
  assert jax.tree.leaves(nnx.state(wrapped, jaxroute.nnx.ExpertBias))
  assert jax.tree.leaves(nnx.state(wrapped, jaxroute.nnx.Load))


def test_a_model_without_router_is_named():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`model` must hold.*Linear"):
    jaxroute.nnx.init_rule_state(model, RULE)


def test_tokens_of_another_width_are_named():
  model = jaxroute.nnx.MoE(
    CONFIG, in_features=D, hidden_size=F, rngs=nnx.Rngs(0)
  )
  words = rf"`x` must have D = `in_features` = {D}, got float32 \(3, {D + 1}\)"
  with pytest.raises(ValueError, match=words):
    model(jnp.zeros((3, D + 1)))
