# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The same numbers with no mesh, Auto axes, Explicit axes, and inside `shard_map`.

This prints the loads of every layer in every way:

  python -m pytest -s -k the_loads_are_equal tests/system/mesh_test.py
"""

import contextlib
import functools

import config as config_lib
import jax
import jax.numpy as jnp
import lm_runs
import numpy as np
import optax
import pytest
import train as train_lib
from flax import nnx as nnx_lib
from jax.sharding import AxisType

import jaxroute
from jaxroute import dual, linen, nnx

B, S, D, F, E = 16, 3, 16, 8, 8
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=2, histogram=True)
PARTITION = jaxroute.Partition(token_axes="data", expert_axis="expert")
AXES = ("data", "expert")
WAYS = ("no mesh", "Auto", "Explicit", "shard_map")
TOKENS, WHOLE = jax.P(AXES), jax.P()


def _mesh(way):
  """A context, and the partition that a layer has in it."""
  if way == "no mesh":
    return contextlib.nullcontext(), None
  kind = AxisType.Auto if way == "Auto" else AxisType.Explicit
  mesh = jax.make_mesh((4, 2), AXES, axis_types=(kind,) * 2)
  return jax.set_mesh(mesh), None if way == "shard_map" else PARTITION


def _map(way, function, out_specs):
  """`function(variables, x, total)`, jitted; its `total` sums over devices."""
  if way != "shard_map":
    return jax.jit(functools.partial(function, total=lambda tree: tree))
  summed = functools.partial(function, total=lambda v: jax.lax.psum(v, AXES))
  return jax.jit(
    jax.shard_map(summed, in_specs=(WHOLE, TOKENS), out_specs=out_specs)
  )


def _linen(partition):
  return linen.MoE(
    CONFIG, hidden_size=F, shared_hidden_size=F, partition=partition
  )


def _run_linen(way, partition, x):
  model = _linen(partition)

  def run(variables, x, total):
    (y, _), counted = model.apply(variables, x, mutable=linen.COUNTED)
    return total(linen.counts(counted)), y

  # Under Explicit axes these lie anyhow: nothing has placed them.
  variables = jax.jit(_linen(None).init)(jax.random.key(0), x)
  if partition is not None:
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
  return _map(way, run, (WHOLE, TOKENS))(variables, x)


def _run_nnx(way, partition, x):
  model = nnx.MoE(
    CONFIG,
    in_features=D,
    hidden_size=F,
    shared_hidden_size=F,
    partition=partition,
    rngs=nnx_lib.Rngs(0),
  )
  graph, variables = nnx_lib.split(model)

  def run(variables, x, total):
    model = nnx_lib.merge(graph, variables)
    y, _ = model(x)
    return total(nnx.router_state(model, None).counts), y

  return _map(way, run, (WHOLE, TOKENS))(variables, x)


def _run_train_step(way, partition, x):
  model, rule, optimizer = _linen(partition), dual.quantile(), optax.sgd(0.1)

  def run(state, x, total):
    def loss_fn(params, expert_bias, x):
      variables = {"params": params, "expert_bias": expert_bias}
      (y, _), counted = model.apply(variables, x, mutable=linen.COUNTED)
      loss = total(jnp.sum((y - x) ** 2)) / (B * S)
      return loss, (total(linen.counts(counted)), {})

    step = functools.partial(
      jaxroute.train_step,
      loss_fn=loss_fn,
      optimizer=optimizer,
      rule=rule,
      micro_batches=2,
    )
    state, report = step(state, x)
    counts = report["load"], state.router.expert_bias
    return state, (counts, report["loss"])

  variables = jax.jit(_linen(None).init)(jax.random.key(0), x)
  router = linen.init_router_state(variables, rule)
  state = jaxroute.init_train_state(variables["params"], router, optimizer)
  step = _map(way, run, (WHOLE, WHOLE))
  state, (counts, loss) = step(state, x)
  state, second = step(state, x)
  return (counts, second[0]), (state.params, loss, second[1])


def _run_example(way, partition, x):
  del x
  config = config_lib.Config(**lm_runs.TINY | {"num_layers": 2})
  mesh = partition and jax.sharding.get_mesh()
  trainer = train_lib.Trainer(config, mesh)
  shape = config.batch_size, config.seq_len + 1
  batch = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
  state = trainer.init(jax.random.key(0))
  _, report = trainer.step(state, trainer.place(lambda rows: batch[rows]))
  return jax.tree.leaves(report["load"]), report["loss"]


_RUNS = {
  "linen": _run_linen,
  "nnx": _run_nnx,
  "train_step": _run_train_step,
  "example": _run_example,
}


def _results(run, way):
  x = np.random.default_rng(0).normal(0.3, 1, (B, S, D)).astype(np.float32)
  context, partition = _mesh(way)
  with context:
    x = jax.device_put(x, TOKENS) if way == "shard_map" else jnp.asarray(x)
    return jax.device_get(run(way, partition, x))


@pytest.mark.implicit_promotion  # optax's Adam promotes.
@pytest.mark.parametrize(
  "name",
  [
    *("linen", "nnx", "train_step"),
    # examples_lm_train_test.py moves it to a mesh.
    pytest.param("example", marks=pytest.mark.long),
  ],
)
def test_the_loads_are_equal_and_the_outputs_close(name):
  # The main job has no `shard_map` of its own.
  ways = WAYS[:-1] if name == "example" else WAYS
  found = {way: _results(_RUNS[name], way) for way in ways}
  print()
  for way, (counts, _) in found.items():
    print(f"{name:10} {way:9} {jax.tree.leaves(counts)[0].reshape(-1)}")
  counts, outputs = found["no mesh"]
  for way in ways[1:]:
    jax.tree.map(np.testing.assert_array_equal, found[way][0], counts)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5),
      found[way][1],
      outputs,
    )
