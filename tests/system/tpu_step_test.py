# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A whole step of the main job, for a slice of TPUs that are not here."""

import collections
import re

import config as config_lib
import jax
import jax.numpy as jnp
import lm_runs
import numpy as np
import pytest
import trainer as trainer_lib
from jax.experimental import topologies
from jax.sharding import AxisType

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86-64")
pytestmark = pytest.mark.implicit_promotion  # optax's Adam promotes.

# Beginnings of the groups of a 4 x 4 mesh in a version of JAX that writes numbers;
# others name the axes.
_AXES = {
  "[[0, 1, 2, 3, 4,": ("data", "expert"),
  "[[0, 1, 2, 3],": ("expert",),
  "[[0, 4, 8, 12],": ("data",),
}
_COLLECTIVES = "all.reduce|all.gather|reduce.scatter|all.to.all|permute"


def _collectives(text):
  """Of a StableHLO program: name, mesh axis and what travels, counted."""
  found = collections.Counter()
  for name, groups, sent in re.findall(
    rf'"stablehlo\.({_COLLECTIVES})"\([^)]*\) <{{(.*?)}}>.*?'
    r" : \(tensor<(\S+)>\) -> ",
    text,
    re.DOTALL,
  ):
    axes = tuple(re.findall(r'ref<name = "(\w+)">', groups))
    for beginning, numbered in _AXES.items():
      axes = axes or (beginning in groups and numbered)
    found[name, axes, sent] += 1
  for sent in re.findall(
    r"custom_call @ragged_all_to_all.*? : \(tensor<(\S+)>", text
  ):
    found["ragged_all_to_all", ("expert",), sent] += 1
  return found


def test_a_step_on_a_slice_takes_the_kernel_and_the_documented_collectives():
  config = config_lib.Config(
    **lm_runs.TINY | {"mesh": "data=4,expert=4", "batch_size": 16}
  )
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:4x4"
  ).devices
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(4, 4),
    ("data", "expert"),
    axis_types=(AxisType.Auto,) * 2,
  )
  shape = config.batch_size, config.seq_len + 1
  batch = jax.ShapeDtypeStruct(
    shape, jnp.uint8, sharding=jax.NamedSharding(mesh, jax.P(mesh.axis_names))
  )
  trainer = trainer_lib.Trainer(config, mesh)
  traced = trainer.step.trace(trainer.shapes, batch)
  lowered = traced.lower(lowering_platforms=("tpu",))
  compiled = lowered.compile().as_text()
  text = lowered.as_text()
  for kernel in ("route", "scatter", "count", "rows"):
    assert f"jaxroute_{kernel}" in text and f"jaxroute_{kernel}" in compiled
  rows = config.batch_size * config.seq_len // 16 * config.top_k  # of a device
  e, d, f = config.num_experts, config.model_size, config.expert_size
  found = _collectives(text)
  # Rows to the devices of their experts and back; a buffer has a quarter more.
  exchanged = {key for key in found if key[0] == "ragged_all_to_all"}
  assert exchanged == {
    ("ragged_all_to_all", ("expert",), f"{n}x{d}xf32")
    for n in (rows, rows * 5 // 4)
  }
  # The table of docs/performance.md, for the layers under a scan.
  both = ("data", "expert")
  assert {k: n for k, n in found.items() if k not in exchanged} == {
    ("all_reduce", both, f"{e}xi32"): 1,
    ("all_to_all", ("expert",), f"4x2x{e // 4}xi32"): 2,
    ("all_reduce", both, "i32"): 1,
    ("all_reduce", both, f"{d}x{e}xf32"): 1,
    ("all_reduce", ("data",), f"{e // 4}x{d}x{f}xf32"): 2,
    ("all_reduce", ("data",), f"{e // 4}x{f}x{d}xf32"): 1,
  }
  # The compiler adds all-reduces of the other gradients, and nothing else.
  names = re.findall(rf"= .* ({_COLLECTIVES})(?:-start)?\(", compiled)
  assert set(names) == {"all-reduce", "all-to-all"}
  counts = re.findall(r"= \(?s32\[[0-9]\S+ all-reduce(?:-start)?\(", compiled)
  assert len(counts) == 1
