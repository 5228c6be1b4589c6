# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routing compiled for NVIDIA GPUs that are not here, by their compilers."""

import functools
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
from jaxroute.kernels.gpu.route import plan as plan_lib
from jaxroute.kernels.gpu.route import refs

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


def test_shared_memory_is_counted_as_pallas_asks_for_it():
  """By which `lanes.possible` knows what fits."""
  for rows in json.loads(gpu_static.TABLE.read_text()).values():
    for name, found in rows.items():
      case = gpu_static.CASES.get(name.split(" ", 1)[1])
      if case is None:
        continue
      plan = plan_lib.Plan(
        config=jaxroute.RouterConfig(
          num_experts=case.e, top_k=case.k, **case.config
        ),
        tokens=gpu_static.TOKENS,
        dtype=jnp.dtype(jnp.float32),
        has_bias=True,
        has_mask=False,
        with_chosen=False,
        with_rank=False,
        lanes=case.lanes,
        interpret=False,
      )
      # The assembler has a byte of its own.
      assert found["shared_memory"] - refs.shared_bytes(plan) in (0, 1), name


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


def _lost_sums(text):
  """Results of kernels that a fusion moves from where the kernel adds to them.

  Such a kernel adds through the pointer of its operand; inside a fusion, what updates
  a slice by the result makes the result a part of that slice.
  """
  lost = []
  for computation in re.split(r"\n\n", text):
    lines = computation.splitlines()
    for kernel, aliases in re.findall(
      r"(%[\w.-]+) = .* custom-call\(.*output_to_operand_aliasing=\{(.*?\)\})",
      computation,
    ):
      sums = set(re.findall(r"\{(\d+)\}: \(", aliases))
      moved = set()
      for line in lines:
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        index = re.search(r", index=(\d+)", rest)
        bitcast = re.search(r"\bbitcast\((%[\w.-]+)\)", rest)
        if f"get-tuple-element({kernel})" in rest and index[1] in sums:
          moved.add(name)
        elif bitcast and bitcast[1] in moved:
          moved.add(name)
        elif "dynamic-update-slice(" in rest:
          update = re.search(
            r"dynamic-update-slice\(%[\w.-]+, (%[\w.-]+)", rest
          )
          if update[1] in moved:
            lost.append(line.strip())
  return lost


def test_a_sum_that_a_fusion_moves_is_seen():
  text = """
%dynamic-slice-fusion (p0: f32[8], p1: s32[4]) -> s32[3,4] {
  %k.1 = (f32[8]{0}, s32[4]{0}) custom-call(%p0, %p1), \
custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{1}: (1, {})}
  %get-tuple-element.1 = WHICH
  %bitcast.2 = s32[1,4]{1,0} bitcast(%get-tuple-element.1)
  ROOT %update.3 = s32[3,4]{1,0} dynamic-update-slice(%p2, %bitcast.2, %p3, %p4)
}
"""
  of_sum = "s32[4]{0} get-tuple-element(%k.1), index=1"
  of_other = "f32[8]{0} get-tuple-element(%k.1), index=0"
  assert len(_lost_sums(text.replace("WHICH", of_sum))) == 1
  assert _lost_sums(text.replace("WHICH", of_other)) == []


def _programs_that_stack_counts():
  """Runs apart: programs that keep the counts of several calls, compiled."""
  config = jaxroute.RouterConfig(num_experts=64, top_k=4, histogram=True)
  jax.config.update("jax_disable_most_optimizations", False)

  def route(logits, bias=None):
    return jaxroute.route(
      logits, bias, config, implementation="pallas_gpu", with_rank=True
    )

  def stack(logits, bias, loads):
    return loads.at[1].set(route(logits, bias).load)

  def layers(logits, biases):
    def layer(logits, bias):
      routing = route(logits, bias)
      return logits + jnp.sum(routing.weights), (routing.counts, routing.rank)

    return jax.lax.scan(layer, logits, biases)

  def gradient(logits, biases):
    def loss(logits):
      logits, (counts, _) = layers(logits, biases)
      return jnp.sum(logits), counts

    return jax.grad(loss, has_aux=True)(logits)

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  logits, biases = shape((300, 64)), shape((3, 64))
  loads = jax.ShapeDtypeStruct((3, 64), jnp.int32)
  programs = {
    "stack": (stack, logits, shape((64,)), loads),
    "gradient": (gradient, logits, biases),
    "vmap": (jax.vmap(route), shape((3, 300, 64))),
  }
  return {
    name: gpu.compile_for("h100", *program).as_text()
    for name, program in programs.items()
  }


@needs_compiler
def test_counts_stay_where_the_kernel_adds_to_them():
  for name, text in process.apart(_programs_that_stack_counts).items():
    assert "output_to_operand_aliasing" in text
    assert _lost_sums(text) == [], name


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
