# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A model of two routers and its training step, for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jaxroute

LAYERS, E, K, D = 2, 8, 2, 16
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K)


def make_params(seed=0):
  w = jax.random.normal(jax.random.key(seed), (LAYERS, D, E)) / D**0.5
  return {"router": w, "scale": jnp.ones(E)}


def make_batch(rows=32, seed=1):
  # A common offset makes the load skewed.
  x = jax.random.normal(jax.random.key(seed), (rows, D)) + 0.5
  return {"x": x, "token_mask": jnp.arange(rows) % 5 != 0}


def loss_fn(params, expert_bias, batch):
  """A loss over two routers whose gradient reaches every parameter."""

  def layer(total, inputs):
    w, bias = inputs
    routing = jaxroute.route(batch["x"] @ w, bias, CONFIG, batch["token_mask"])
    value = jnp.sum(routing.weights * params["scale"][routing.expert_idx])
    return total + value / w.shape[0], routing.counts

  loss, counts = jax.lax.scan(
    layer, jnp.zeros(()), (params["router"], expert_bias)
  )
  return loss**2, (counts, {"value": loss})


def make_state(rule, optimizer, params=None):
  params = make_params() if params is None else params
  return jaxroute.init_train_state(
    params, jaxroute.init_router_state(rule, E, LAYERS), optimizer
  )


def make_step(rule, optimizer, **kwargs):
  return jax.jit(
    functools.partial(
      jaxroute.train_step,
      loss_fn=loss_fn,
      optimizer=optimizer,
      rule=rule,
      **kwargs,
    )
  )


def loaded_state(rule, *rows):
  state = jaxroute.init_router_state(rule, len(rows[0]), len(rows))
  return with_load(state, jnp.array(rows, jnp.int32))


def with_load(state, load):
  return dataclasses.replace(state, counts=jaxroute.Counts(load=load))
