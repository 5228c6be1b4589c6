# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The training step on meshes: the numbers of one device on each."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases
from step_cases import CONFIG, D, E

import jaxroute
from jaxroute import dual


def _run(axis_types, inside_shard_map=False):
  """Two steps in two micro-batches; the state and the last report."""
  rule, optimizer = dual.sign(1e-2), optax.sgd(1e-2)
  total = (
    functools.partial(jax.lax.psum, axis_name="data")
    if inside_shard_map
    else lambda x: x
  )

  def loss_fn(params, expert_bias, batch):
    mask = batch["token_mask"]
    routing = jaxroute.route(batch["x"] @ params, expert_bias[0], CONFIG, mask)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    loss = total(jnp.sum(routing.weights[:, 0] ** 2)) / total(tokens)
    counts = jax.tree.map(lambda c: total(c)[None], routing.counts)
    return loss, (counts, {"again": loss})

  step = functools.partial(
    jaxroute.train_step,
    loss_fn=loss_fn,
    optimizer=optimizer,
    rule=rule,
    micro_batches=2,
    weight_fn=lambda batch: total(jnp.sum(batch["token_mask"])),
  )
  in_force = contextlib.nullcontext()
  if axis_types:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_types,))
    in_force = jax.set_mesh(mesh)
  with in_force:
    if inside_shard_map:
      specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P()}
      step = jax.shard_map(step, **specs)
    params = jax.random.normal(jax.random.key(0), (D, E))
    state = jaxroute.init_train_state(
      params, jaxroute.init_router_state(rule, E), optimizer
    )
    batch = step_cases.make_batch(64)
    if axis_types:
      batch = jax.device_put(batch, jax.P("data"))
    step = jax.jit(step)
    for _ in range(2):
      state, report = step(state, batch)
  return jax.device_get((state, report))


@pytest.mark.parametrize(
  "axis_types, inside_shard_map",
  [
    (jax.sharding.AxisType.Auto, False),
    (jax.sharding.AxisType.Explicit, False),
    (jax.sharding.AxisType.Explicit, True),
  ],
)
def test_a_mesh_changes_no_load_and_no_bias(axis_types, inside_shard_map):
  state, report = _run(axis_types, inside_shard_map)
  expected_state, expected = _expected()
  np.testing.assert_array_equal(report["load"], expected["load"])
  np.testing.assert_array_equal(
    state.router.expert_bias, expected_state.router.expert_bias
  )
  assert np.any(state.router.expert_bias)
  np.testing.assert_allclose(state.params, expected_state.params, rtol=1e-5)
  for name in ("loss", "again", "grad_norm"):
    np.testing.assert_allclose(report[name], expected[name], rtol=1e-5)


@functools.cache
def _expected():
  return _run(None)
