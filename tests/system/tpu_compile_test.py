# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The layer and the kernel compiled for TPUs that are not here, by their compiler."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_cycles

import jaxroute
from jaxroute import dispatch, dual, experts, layer
from jaxroute.aot import chips, tpu
from jaxroute.kernels.tpu import device, scatter

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86-64")

T, D, F, E = 1024, 256, 128, 64
CONFIG = jaxroute.RouterConfig(
  num_experts=E, top_k=6, num_groups=8, group_top_k=4, histogram=True
)
RULE = dual.quantile(0.8)
PARTITION = jaxroute.Partition(
  token_axes=("data", "expert"), expert_axis="expert"
)


def _step(implementation, x, router_weight, params, state):
  """Forward, backward and the dual step of one expert-parallel layer."""

  def loss(router_weight, params):
    routing, _ = layer.router(
      x,
      router_weight,
      state.expert_bias[0],
      CONFIG,
      implementation=implementation,
      fuse_projection=True,
    )
    y, _ = layer.moe(x, routing, params, config=CONFIG, partition=PARTITION)
    return jnp.sum(y.astype(jnp.float32) ** 2), routing

  grads, routing = jax.grad(loss, argnums=(0, 1), has_aux=True)(
    router_weight, params
  )
  return grads, jaxroute.update(jaxroute.accumulate(state, routing), RULE)


@pytest.mark.parametrize(
  ("topology", "implementation"),
  [
    pytest.param("v5e:2x2", None, marks=pytest.mark.any_jax),
    ("v6e:2x2", None),
    pytest.param("v6e:2x2", "xla", marks=pytest.mark.any_jax),
    pytest.param("v5e:2x2", "xla", marks=pytest.mark.long),
  ],
)
def test_the_expert_parallel_layer_compiles(topology, implementation):
  devices = chips.devices(topology)
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(2, 2),
    ("data", "expert"),
    axis_types=(jax.sharding.AxisType.Explicit,) * 2,
  )

  def like(shape, dtype, *spec):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  params = experts.ExpertParams(
    w_gate=like((E, D, F), jnp.float32, "expert"),
    w_up=like((E, D, F), jnp.float32, "expert"),
    w_down=like((E, F, D), jnp.float32, "expert"),
  )
  state = jax.tree.map(
    lambda v: like(v.shape, v.dtype),
    jax.eval_shape(
      lambda: jaxroute.init_router_state(RULE, E, 1, histogram=True)
    ),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = (
      jax.jit(_step, static_argnums=0)
      .trace(
        implementation,
        like((T, D), jnp.bfloat16, ("data", "expert")),
        like((D, E), jnp.float32),
        params,
        state,
      )
      .lower(lowering_platforms=("tpu",))
      .compile()
    )
  text = compiled.as_text()
  # What None takes follows from the devices of the mesh, which are not here.
  assert "jaxroute_rows" in text
  assert ("jaxroute_route" in text) == (implementation is None)
  assert ("jit(project_and_route)" in text) == (
    implementation is None and topology == "v6e:2x2"
  )
  memory = compiled.memory_analysis()
  # The parameters' shard and its gradient are there, the whole array is not.
  shard = 3 * E * D * F * 4 // 2
  assert shard < memory.argument_size_in_bytes < 1.2 * shard + 2 * T * D


def _long_but_first(values):
  """Parameters of which all but the first are for `--all`."""
  first, *others = values
  return [first, *(pytest.param(x, marks=pytest.mark.long) for x in others)]


# The other generations are compiled by the test of their cycles, below. The
# longest case is the same kernel on a longer grid.
@pytest.mark.parametrize("generation", ["v5p", "v7x"])
@pytest.mark.parametrize(
  "case",
  _long_but_first(
    ["E=256 K=8 V3"]
    + [
      name
      for name, (t, *_) in tpu_cycles.CASES.items()
      if t <= 8192 and name != "E=256 K=8 V3"
    ]
  ),
)
def test_the_kernel_compiles(generation, case):
  compiled = tpu_cycles.compile_for(generation, case, "jaxroute")
  assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("generation", ["v6e", "v7x"])
@pytest.mark.parametrize("case", _long_but_first(["E=128 K=8", "E=1024 K=16"]))
def test_projection_and_routing_compile_as_one(generation, case):
  text = tpu_cycles.compile_for(generation, case, "project fused").as_text()
  assert "tpu_custom_call" in text
  assert " convolution(" not in text  # nor is a matmul left for XLA


# A v5p has the instructions of a v5e.
@pytest.mark.parametrize(
  "generation", ["v5e", "v7x", pytest.param("v5p", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
  ("case", "program", "kernels"),
  [
    ("E=128 K=8", "jaxroute grad", ["jaxroute_route", "jaxroute_scatter"]),
    ("E=128 K=8", "sort", ["jaxroute_count", "jaxroute_rows"]),
    ("E=128 K=8", "jaxroute histogram", ["jaxroute_route"]),
    pytest.param(
      "E=64 K=6 softmax",
      "jaxroute grad",
      ["jaxroute_route", "jaxroute_scatter"],
      marks=pytest.mark.long,
    ),
  ],
)
def test_the_other_kernels_compile(generation, case, program, kernels):
  text = tpu_cycles.compile_for(generation, case, program).as_text()
  for kernel in kernels:
    assert kernel in text


@pytest.mark.any_jax
def test_the_largest_routing_fits_the_smallest_memory():
  compiled = tpu_cycles.compile_for("v5e", "E=1024 K=16", "jaxroute")
  assert "tpu_custom_call" in compiled.as_text()


def test_the_projection_is_left_apart_where_that_is_faster():
  with pytest.raises(NotImplementedError, match="before v6e"):
    tpu_cycles.compile_for("v5e", "E=128 K=8", "project fused")


def test_the_kernel_and_its_gradient_compile_inside_shard_map():
  devices = chips.devices("v6e:2x2")
  mesh = jax.sharding.Mesh(np.array(devices), ("data",))
  tokens, whole = jax.P("data"), jax.P()

  def like(shape, dtype, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def local(logits, bias, mask):
    def loss(logits):
      r = jaxroute.route(
        logits, bias, CONFIG, mask, implementation="pallas_tpu"
      )
      return jnp.sum(r.weights**2), jax.lax.psum(r.load, "data")

    return jax.grad(loss, has_aux=True)(logits)

  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(tokens, whole, tokens),
    out_specs=(tokens, whole),
    check_vma=True,
  )
  traced = jax.jit(sharded).trace(
    like((T, E), jnp.float32, tokens),
    like((E,), jnp.float32, whole),
    like((T,), jnp.bool_, tokens),
  )
  lowered = traced.lower(lowering_platforms=("tpu",))
  # One kernel, and one for a gradient that scatters nothing.
  assert lowered.as_text().count("@tpu_custom_call") == 2
  assert "stablehlo.scatter" not in lowered.as_text()
  lowered.compile()


@pytest.mark.parametrize(
  ("generation", "implementation"),
  [*((x, None) for x in tpu_cycles.TPUS), ("v6e", "pallas_tpu")],
)
def test_the_experts_multiply_no_row_by_every_expert(
  generation, implementation
):
  topology, *_ = tpu_cycles.TPUS[generation]
  devices = chips.devices(topology)
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
  whole = jax.NamedSharding(mesh, jax.P())

  def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  def loss(x, params, sizes):
    y = experts.swiglu(x, params, sizes, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32) ** 2)

  params = experts.ExpertParams(
    w_gate=like(4, D, F), w_up=like(4, D, F), w_down=like(4, F, D)
  )
  sizes = like(4, dtype=jnp.int32)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(like(T, D), params, sizes)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  text = compiled.as_text()
  assert " convolution(" not in text
  by_kernel = implementation is not None or not device.multiplies_groups()
  found = re.findall("%jaxroute_grouped_(matmul|outer)\\S* = ", text)
  assert found.count("outer") == 3 * by_kernel
  assert found.count("matmul") >= 5 if by_kernel else not found


@pytest.mark.any_jax
@pytest.mark.parametrize(
  "case",
  _long_but_first(
    [
      ("v5p", 8517, jnp.bfloat16),
      ("v5p", 6384, jnp.float32),
      ("v5e", 8192, jnp.bfloat16),
      ("v6e", 8192, jnp.bfloat16),
    ]
  ),
)
def test_rows_are_moved_in_the_smallest_memory(case, monkeypatch):
  generation, t, dtype = case
  monkeypatch.setattr(device, "gathers_apart", lambda: False)
  topology, *_ = tpu_cycles.TPUS[generation]
  devices = chips.devices(topology)
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
  whole = jax.NamedSharding(mesh, jax.P())
  n, d = 2 * t, 2048

  def like(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  def step(x, weights, permutation):
    def loss(x, weights):
      rows = jnp.sin(dispatch.dispatch(x, permutation))
      return jnp.sum(dispatch.combine(rows, weights, permutation) ** 2)

    return jax.grad(loss, (0, 1))(x, weights)

  permutation = dispatch.Permutation(
    permutation=like(n), inverse_permutation=like(n), group_sizes=like(E)
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(step).trace(
      like(t, d, dtype=dtype),
      like(t, n // t, dtype=jnp.float32),
      permutation,
    )
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  for name in ("add", "take", "multiply"):
    assert f"jaxroute_{name}_rows" in compiled.as_text()


@pytest.mark.any_jax
def test_the_largest_gradient_of_a_softmax_fits_the_smallest_memory():
  devices = chips.devices("v5e:2x2")
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
  whole = jax.NamedSharding(mesh, jax.P())

  def like(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  gradient = jax.jit(
    functools.partial(scatter.softmax_gradient, multiplier=1.0, soft_cap=30.0)
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = gradient.trace(
      like((T, 1024), jnp.float32),
      like((T, 16), jnp.int32),
      like((T, 16), jnp.float32),
    )
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  assert "tpu_custom_call" in compiled.as_text()


_OTHERS = ["jaxroute grad", "jaxroute histogram", "project fused", "sort"]


@pytest.mark.parametrize(
  ("generations", "table_cases", "candidates"),
  [
    (["v5e", "v6e"], ["E=64 K=6 softmax"], ["jaxroute"]),
    pytest.param(["v6e"], ["E=128 K=8"], _OTHERS, marks=pytest.mark.any_jax),
    pytest.param(
      ["v5e", "v6e"],
      list(tpu_cycles.CASES),
      ["jaxroute"],
      marks=pytest.mark.long,
    ),
  ],
  ids=["route", "others", "all"],
)
def test_no_cycle_count_has_risen(generations, table_cases, candidates):
  """By more than a tenth over the table, for a compiler that is in it."""
  tables = json.loads(tpu_cycles.TABLE.read_text())
  version = tpu.version()
  recorded = tables.get(version, tables[max(tables)])
  rows = tpu_cycles.table(generations, table_cases, candidates, bounds=False)
  for name, row in rows.items():
    for candidate, found in row.items():
      before = recorded[name][candidate]["cycles"]
      most = (1.1 if version in tables else 2) * before
      assert found["cycles"] < most, (name, candidate)
