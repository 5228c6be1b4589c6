# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routing compiled for NVIDIA GPUs that are not here, by their compilers."""

import json
import re

import cases
import gpu_model
import gpu_static
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxroute
from jaxroute import ladder
from jaxroute.aot import gpu, process

IMPLEMENTATIONS = ("xla", "pallas_gpu")

needs_compiler = pytest.mark.skipif(bool(gpu.missing()), reason=gpu.missing())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("t", "e", "k"), cases.SHAPES)
def test_every_shape_is_exported_for_cuda(t, e, k, implementation):
  config = jaxroute.RouterConfig(num_experts=e, top_k=k)

  def route(logits, bias):
    return jaxroute.route(logits, bias, config, implementation=implementation)

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((t, e), (e,))]
  try:
    exported = export.export(jax.jit(route), platforms=["cuda"])(*shapes)
  except ladder.Refusal as error:
    assert implementation == "pallas_gpu" and jax.__version_info__ < (0, 11)
    pytest.skip(str(error))
  assert exported.platforms == ("cuda",)
  assert [x.shape for x in exported.out_avals][:2] == [(t, k), (t, k)]


# One row of each kind; the others are for `--all`.
_FIRST = "h100 V3 L=2", "b200 V3 L=8", "h100 xla T=16"


def _long_but_first(names):
  return [
    name if name in _FIRST else pytest.param(name, marks=pytest.mark.long)
    for name in names
  ]


def _assert_not_worse(name, found):
  before = gpu_static.recorded()
  if not before:
    return  # other versions than those of the table
  assert gpu_static.worse(found, before[name]) == [], name


@needs_compiler
@pytest.mark.parametrize("name", _long_but_first(gpu_static.KERNELS))
def test_a_kernel_takes_no_more_than_it_may(name):
  found = gpu_static.row(name)
  case = gpu_static.CASES[name.split(" ", 1)[1]]
  assert found["spills"] == 0
  if name.startswith("h100"):
    assert found["registers"] <= case.registers
  assert found["instructions"] <= case.instructions
  assert found["barriers"] <= 24
  assert found["launches"] <= 2
  assert found["order_launches"] <= 5
  assert found["temporaries"] <= 4e6
  _assert_not_worse(name, found)


@needs_compiler
@pytest.mark.parametrize("name", _long_but_first(gpu_static.PROGRAMS))
def test_a_program_takes_no_more_than_it_did(name):
  _assert_not_worse(name, gpu_static.row(name))


def test_xla_launches_no_more_than_plain_jax_where_launches_count():
  """But for one, for the cutoff, which plain JAX does not have."""
  for rows in json.loads(gpu_static.TABLE.read_text()).values():
    for target in ("h100", "a100"):
      for t in (16, 4096):
        ours, plain = (rows[f"{target} {x} T={t}"] for x in ("xla", "plain"))
        assert ours["launches"] <= plain["launches"] + 1
        assert ours["temporaries"] <= plain["temporaries"]


def _shards_of_xla():
  """Runs apart: collectives and sorts of sharded tokens, by kind of axis."""
  config = jaxroute.RouterConfig(
    num_experts=64, top_k=6, num_groups=8, group_top_k=4
  )

  def route(logits, bias):
    r = jaxroute.route(logits, bias, config, implementation="xla")
    return r.expert_idx, r.weights, r.load, r.cutoff

  jax.config.update("jax_disable_most_optimizations", False)
  found = []
  for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    devices = np.array(gpu.devices("h100", 4))
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(axis_type,))
    shapes = [
      jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(mesh, p))
      for s, p in (((64, 64), jax.P("data")), ((64,), jax.P()))
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      traced = jax.jit(route).trace(*shapes)
      compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    collectives = r"(all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    found.append(
      (
        re.findall(collectives, text),
        re.findall(r"(\w+\[[\d,]+\])\S* sort\(", text),
      )
    )
  return found


@needs_compiler
def test_tokens_stay_in_their_shards():
  for collectives, sorts in process.apart(_shards_of_xla):
    assert collectives == ["all-reduce"]  # of the load
    assert sorts == ["s32[16,64]"]


@needs_compiler
@pytest.mark.long
def test_the_model_of_a_core_prefers_the_threads_that_are_chosen():
  few, many = (
    process.apart(gpu_model.compile_router, "V3", lanes) for lanes in (4, 8)
  )
  for tokens in (16, 16_384, 65_536):
    times = [gpu_model.estimate("V3", c, tokens) for c in (few, many)]
    assert (times[0] < times[1]) == (tokens > 16)
    # Of a copy of the logits, on an H100, by `docs/performance.md`.
    if tokens == 65_536:
      assert times[0] < 0.85 * 45.7
