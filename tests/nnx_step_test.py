# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The training step of nnx models: linen's numbers, written in place."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import dual

D, F, E = 8, 8, 4
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=2)
RULE = optax.chain(dual.sign(dual.inverse_sqrt(1e-2)), optax.trace(0.5))


class Model(nnx.Module):
  """An MoE layer with batch statistics and dropout behind it."""

  def __init__(self, rngs):
    self.moe = jaxroute.nnx.MoE(CONFIG, in_features=D, hidden_size=F, rngs=rngs)
    self.norm = nnx.BatchNorm(D, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, token_mask=None):
    y, _ = self.moe(x, token_mask)
    return self.dropout(self.norm(y))


def _moe():
  return jaxroute.nnx.MoE(
    CONFIG, in_features=D, hidden_size=F, rngs=nnx.Rngs(0)
  )


def _router():
  return jaxroute.nnx.Router(CONFIG, in_features=D, rngs=nnx.Rngs(0))


def _batch(seed=0):
  x = jax.random.normal(jax.random.key(seed), (12, D)) + 0.3
  return {"x": x, "token_mask": jnp.arange(12) % 5 != 0}


def _weight_fn(batch):
  return jnp.sum(batch["token_mask"])


def _loss(y, batch):
  mask = batch["token_mask"][:, None].astype(jnp.float32)
  return jnp.sum(mask * (y - batch["x"]) ** 2) / jnp.sum(mask)


def _loss_fn(model, batch):
  y = model(batch["x"], batch["token_mask"])
  loss = _loss(y[0] if isinstance(y, tuple) else y, batch)
  return loss, {"again": loss}


def _make_step(**kwargs):
  @nnx.jit(donate_argnums=(0, 1, 2))
  def step(model, optimizer, rule_state, batch):
    return jaxroute.nnx.train_step(
      model,
      optimizer,
      rule_state,
      batch,
      loss_fn=_loss_fn,
      rule=RULE,
      **kwargs,
    )

  return step


@pytest.mark.implicit_promotion  # optax.MultiSteps promotes
def test_it_is_the_step_of_linen():
  optimizer = optax.MultiSteps(optax.sgd(0.1), 2)
  model = _moe()
  other = jaxroute.linen.MoE(CONFIG, hidden_size=F)
  params = {n: getattr(model, n)[...] for n in ("w_gate", "w_up", "w_down")}
  params["router"] = {"kernel": model.router.kernel[...]}
  params = jax.tree.map(jnp.copy, params)

  def linen_loss_fn(params, expert_bias, batch):
    (y, _), counted = other.apply(
      {"params": params, "expert_bias": expert_bias},
      batch["x"],
      batch["token_mask"],
      mutable=jaxroute.linen.COUNTED,
    )
    loss = _loss(y, batch)
    return loss, (jaxroute.linen.counts(counted), {"again": loss})

  kwargs = {"micro_batches": 3, "weight_fn": _weight_fn}
  linen_step = jax.jit(
    functools.partial(
      jaxroute.train_step,
      loss_fn=linen_loss_fn,
      optimizer=optimizer,
      rule=RULE,
      **kwargs,
    )
  )
  nnx_step = _make_step(**kwargs)
  variables = jax.jit(other.init)(jax.random.key(0), _batch()["x"])
  router = jaxroute.linen.init_router_state(variables, RULE)
  state = jaxroute.init_train_state(params, router, optimizer)
  nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)
  for seed in range(4):
    state, expected = linen_step(state, _batch(seed))
    rule_state, report = nnx_step(
      model, nnx_optimizer, rule_state, _batch(seed)
    )
    assert set(report) == set(expected)
    chex.assert_trees_all_close(report, expected, rtol=1e-6)
    chex.assert_trees_all_equal(
      jaxroute.nnx.router_state(model, rule_state), state.router
    )
    assert nnx_optimizer.step[...] == state.step
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(found, state.params, rtol=1e-6)
  assert np.any(model.router.expert_bias[...])
  assert nnx_optimizer.opt_state.gradient_step[...] == 2


def test_streams_and_statistics_are_handed_on_and_kept_where_it_skips():
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)
  step = _make_step(micro_batches=2)
  rule_state, report = step(model, optimizer, rule_state, _batch())
  assert report["skipped"] == 0
  assert model.dropout.rngs.count[...] == 2
  assert np.all(model.norm.mean[...] != 0)
  assert np.any(model.moe.router.expert_bias[...])
  before = nnx.to_pure_dict(nnx.state((model, optimizer.opt_state)))
  before = jax.tree.map(jnp.copy, (before, rule_state))
  batch = _batch(1)
  batch["x"] = batch["x"].at[2].set(jnp.nan)
  rule_state, report = step(model, optimizer, rule_state, batch)
  assert report["skipped"] == 1
  after = nnx.to_pure_dict(nnx.state((model, optimizer.opt_state)))
  chex.assert_trees_all_equal((after, rule_state), before)
  assert optimizer.step[...] == 2


def test_what_a_forward_pass_adds_to_the_model_is_dropped():
  def loss_fn(model, batch):
    _, logits = model(batch["x"])
    model.hidden = nnx.Intermediate(logits)
    return jnp.mean(logits**2), {}

  model = _router()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  jaxroute.nnx.train_step(
    model,
    optimizer,
    jaxroute.nnx.init_rule_state(model, RULE),
    _batch(),
    loss_fn=loss_fn,
    rule=RULE,
  )
  assert not hasattr(model, "hidden")


def test_update_sums_over_the_axes_that_it_is_told():
  # Local signs disagree: device 0 counted (9, 0), the others (0, 1) each.
  mesh = jax.make_mesh((8,), ("data",))
  config = jaxroute.RouterConfig(num_experts=2, top_k=1)
  rule = dual.sign(0.5)
  model = jaxroute.nnx.Router(config, in_features=D, rngs=nnx.Rngs(0))
  loads = jnp.array([[9, 0]] + [[0, 1]] * 7, jnp.int32)

  def local(loads):
    copy = nnx.clone(model)
    copy.load[...] = loads[0]
    state = jaxroute.nnx.init_rule_state(copy, rule)
    jaxroute.nnx.update(copy, rule, state, axis_name="data")
    return copy.expert_bias[...]

  with jax.set_mesh(mesh):
    bias = jax.jit(
      jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P())
    )(jax.reshard(loads, jax.P("data")))
  np.testing.assert_array_equal(bias, [-0.5, 0.5])


@pytest.mark.parametrize(
  "kwargs, words",
  [
    ({"optimizer": optax.sgd(0.1)}, r"`optimizer` must be an `nnx.Optimizer\("),
    ({"wrt": (nnx.Param, jaxroute.nnx.ExpertBias)}, "leave the biases.*wrt="),
    (
      {"loss_fn": lambda model, batch: jnp.sum(model(batch["x"])[1])},
      r"return \(loss, metrics\), got",
    ),
    (
      {"loss_fn": lambda model, batch: (jnp.sum(model(batch["x"])[1]), 0.0)},
      "a dict of metrics, got 0.0",
    ),
    ({"loss_fn": None}, "`loss_fn` must be a function, got None"),
    ({"rule": "sign"}, "`rule` must be an optax transformation, got 'sign'"),
    ({"rule": dual.pid(1e-3)}, "`state.rule_state` must be like.*Pid"),
  ],
)
def test_a_mistake_is_named(kwargs, words):
  def loss_fn(model, batch):
    return jnp.sum(model(batch["x"])[1]), {}

  kwargs = {"loss_fn": loss_fn, "rule": RULE, "wrt": nnx.Param} | kwargs
  model = _router()
  wrt = kwargs.pop("wrt")
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=wrt)
  optimizer = kwargs.pop("optimizer", optimizer)
  rule_state = jaxroute.nnx.init_rule_state(model, RULE)
  with pytest.raises(ValueError, match=words):
    jaxroute.nnx.train_step(model, optimizer, rule_state, _batch(), **kwargs)


def test_a_model_that_does_not_count_is_not_trained():
  model = _router()
  model.eval()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"evaluation mode.*`model.train\(\)`"):
    jaxroute.nnx.train_step(
      model,
      optimizer,
      jaxroute.nnx.init_rule_state(model, RULE),
      _batch(),
      loss_fn=lambda model, batch: (jnp.sum(model(batch["x"])[1]), {}),
      rule=RULE,
    )
