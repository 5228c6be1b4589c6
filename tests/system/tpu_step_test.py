# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A whole step of the main job, for a slice of TPUs that are not here."""

import collections
import functools
import math
import re

import config as config_lib
import jax
import jax.numpy as jnp
import lm_runs
import model as model_lib
import pytest
import trainer as trainer_lib

import jaxroute
import jaxroute.linen
from jaxroute.aot import chips

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86-64")
pytestmark = pytest.mark.implicit_promotion  # optax's Adam promotes.

# How the two versions of JAX write the groups of a 2 x 2 mesh.
_AXES = {
  'name = "data"': "data",
  "[[0, 2], [1, 3]]": "data",
  'name = "expert"': "expert",
  "[[0, 1], [2, 3]]": "expert",
}
_COLLECTIVES = "all.reduce|all.gather|reduce.scatter|all.to.all|permute"


def _collectives(text):
  """Of a StableHLO program: name, mesh axis and what travels, counted."""
  found = collections.Counter()
  for name, groups, sent in re.findall(
    rf'"stablehlo\.({_COLLECTIVES})"\([^)]*\) <{{(.*?)}}> .*?'
    r"\}\) : \(tensor<(\S+)>\)",
    text,
    re.DOTALL,
  ):
    (axis,) = {axis for words, axis in _AXES.items() if words in groups}
    found[name, axis, sent] += 1
  return found


def _step(config, partition, mesh):
  """A training step of the main job, and the shapes that it takes."""
  model = model_lib.Transformer(config, partition)
  rule, optimizer = config.make_rule(), config.make_optimizer()
  shape = config.batch_size, config.seq_len + 1

  def init(key):
    variables = model.init(key, jnp.zeros(shape, jnp.int32))
    router = jaxroute.linen.init_router_state(variables, rule)
    return jaxroute.init_train_state(variables["params"], router, optimizer)

  state = jax.eval_shape(init, jax.random.key(0))
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    jaxroute.parallel.shardings(state, partition, mesh),
  )
  batch = jax.ShapeDtypeStruct(
    shape,
    jnp.uint8,
    sharding=jax.NamedSharding(mesh, jax.P(partition.token_axes)),
  )
  step = functools.partial(
    jaxroute.train_step,
    loss_fn=model_lib.make_loss_fn(model),
    optimizer=optimizer,
    rule=rule,
    micro_batches=config.micro_batches,
  )
  return step, state, batch


def _programs(config, partition):
  """The step for a slice of 2 x 2: lowered, and compiled."""
  mesh = chips.make_mesh(chips.devices("v6e:2x2"), {"data": 2, "expert": 2})
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    step, *shapes = _step(config, partition, mesh)
    traced = jax.jit(step, donate_argnums=0).trace(*shapes)
    lowered = traced.lower(lowering_platforms=("tpu",))
  return lowered.as_text(), lowered.compile().as_text()


def _summed_counts(program):
  """Bytes of every int32 array that an all-reduce of a program sums.

  Scalars are of the exchange: devices agree on its rounds.
  """
  names = re.findall(r"= (.*) all-reduce(?:-start)?\(", program)
  shapes = re.findall(r"s32\[([\d,]+)\]", " ".join(names))
  return [4 * math.prod(map(int, shape.split(","))) for shape in shapes]


def _names(compiled):
  return set(
    re.findall(rf" ((?:ragged-)?(?:{_COLLECTIVES}))(?:-start)?\(", compiled)
  )


def _check_counts_travel_once(config, compiled):
  """They are 4 bytes x layers x E, outside of all loops."""
  layers = config.num_layers - 1  # the first is dense
  assert _summed_counts(compiled) == [4 * layers * config.num_experts]
  entry = compiled[compiled.index("\nENTRY ") :]
  assert _summed_counts(entry) == _summed_counts(compiled)


def test_a_step_on_a_slice_takes_the_kernel_and_the_documented_collectives():
  config = config_lib.Config(**lm_runs.TINY)
  partition = jaxroute.Partition(token_axes="data", expert_axis="expert")
  text, compiled = _programs(config, partition)
  for kernel in ("route", "scatter", "count", "rows"):
    assert f"jaxroute_{kernel}" in text and f"jaxroute_{kernel}" in compiled
  t = config.batch_size * config.seq_len // 2  # of a device
  e, d, f = config.num_experts, config.model_size, config.expert_size
  # The table of docs/performance.md, for the layers under a scan.
  assert _collectives(text) == {
    ("all_reduce", "expert", f"{t}x{d}xf32"): 2,
    ("all_reduce", "expert", f"{t}x{config.top_k}xf32"): 1,
    ("all_reduce", "data", f"{d}x{e}xf32"): 1,
    ("all_reduce", "data", f"{e // 2}x{d}x{f}xf32"): 2,
    ("all_reduce", "data", f"{e // 2}x{f}x{d}xf32"): 1,
  }
  assert len(re.findall(_COLLECTIVES, text)) == 7
  # The compiler adds all-reduces of the other gradients and of the counts, and
  # nothing else.
  assert _names(compiled) == {"all-reduce"}
  _check_counts_travel_once(config, compiled)


def test_the_counts_of_all_micro_batches_travel_once():
  config = config_lib.Config(**lm_runs.TINY | {"micro_batches": 2})
  partition = jaxroute.Partition(
    token_axes=("data", "expert"), expert_axis="expert", exchange="ragged"
  )
  _, compiled = _programs(config, partition)
  # Neither tokens nor the parameters of experts are gathered.
  assert _names(compiled) == {"all-reduce", "all-to-all", "ragged-all-to-all"}
  _check_counts_travel_once(config, compiled)


def test_the_main_job_sends_rows_to_their_experts_on_sixteen_chips():
  config = config_lib.Config(
    **lm_runs.TINY | {"mesh": "data=4,expert=4", "batch_size": 16}
  )
  mesh = chips.make_mesh(chips.devices("v6e:4x4"), {"data": 4, "expert": 4})
  batch = jax.ShapeDtypeStruct(
    (config.batch_size, config.seq_len + 1),
    jnp.uint8,
    sharding=jax.NamedSharding(mesh, jax.P(mesh.axis_names)),
  )
  trainer = trainer_lib.Trainer(config, mesh)
  traced = trainer.step.trace(trainer.shapes, batch)
  compiled = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
  for kernel in ("route", "scatter", "count", "rows"):
    assert f"jaxroute_{kernel}" in compiled
  assert _names(compiled) == {"all-reduce", "all-to-all", "ragged-all-to-all"}
  _check_counts_travel_once(config, compiled)
