# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A whole step of the main job, for a slice of TPUs that are not here."""

import collections
import re

import config as config_lib
import jax
import jax.numpy as jnp
import lm_runs
import pytest
import train as train_lib

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


def test_a_step_on_a_slice_takes_the_kernel_and_the_documented_collectives():
  config = config_lib.Config(mesh="2,2", **lm_runs.TINY)
  mesh = chips.make_mesh(chips.devices("v6e:2x2"), {"data": 2, "expert": 2})
  shape = config.batch_size, config.seq_len + 1
  batch = jax.ShapeDtypeStruct(
    shape, jnp.uint8, sharding=jax.NamedSharding(mesh, jax.P("data"))
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    trainer = train_lib.Trainer(config, mesh)
    traced = trainer.step.trace(trainer.shapes, batch)
    lowered = traced.lower(lowering_platforms=("tpu",))
    compiled = lowered.compile().as_text()
  text = lowered.as_text()
  for kernel in ("route", "scatter", "count", "rows"):
    assert f"jaxroute_{kernel}" in text and f"jaxroute_{kernel}" in compiled
  t = config.batch_size * config.seq_len // 2  # of a device
  e, d, f = config.num_experts, config.model_size, config.expert_size
  # The table of docs/performance.md, for the layers under a scan.
  assert _collectives(text) == {
    ("all_reduce", "data", f"{e}xi32"): 1,
    ("all_reduce", "expert", f"{t}x{d}xf32"): 2,
    ("all_reduce", "expert", f"{t}x{config.top_k}xf32"): 1,
    ("all_reduce", "data", f"{d}x{e}xf32"): 1,
    ("all_reduce", "data", f"{e // 2}x{d}x{f}xf32"): 2,
    ("all_reduce", "data", f"{e // 2}x{f}x{d}xf32"): 1,
  }
  assert len(re.findall(_COLLECTIVES, text)) == 8
  # The compiler adds all-reduces of the other gradients, and nothing else.
  names = re.findall(rf"= .* ({_COLLECTIVES})(?:-start)?\(", compiled)
  assert set(names) == {"all-reduce"}
  counts = re.findall(r"= \(?s32\[\S+ all-reduce(?:-start)?\(", compiled)
  assert len(counts) == 1
