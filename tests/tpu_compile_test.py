# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The layer compiled for TPU slices that are not here, by the real TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

import jaxroute
from jaxroute import dual, experts, layer

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86-64")

T, D, F, E = 1024, 256, 128, 64
CONFIG = jaxroute.RouterConfig(
  num_experts=E, top_k=6, num_groups=8, group_top_k=4
)
PARTITION = jaxroute.Partition(
  token_axes=("data", "expert"), expert_axis="expert"
)


def _step(x, kernel, params, state):
  """Forward, backward and the dual step of one expert-parallel layer."""
  rule = dual.sign(1e-3)

  def loss(kernel, params):
    routing, _ = layer.router(x, kernel, state.expert_bias[0], CONFIG)
    y, _ = layer.moe(x, routing, params, config=CONFIG, partition=PARTITION)
    return jnp.sum(y.astype(jnp.float32) ** 2), routing

  grads, routing = jax.grad(loss, argnums=(0, 1), has_aux=True)(kernel, params)
  return grads, jaxroute.update(jaxroute.accumulate(state, routing), rule)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_the_expert_parallel_layer_compiles(topology):
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
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
    jax.eval_shape(lambda: jaxroute.init_router_state(dual.sign(1e-3), E, 1)),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = (
      jax.jit(_step)
      .trace(
        like((T, D), jnp.bfloat16, ("data", "expert")),
        like((D, E), jnp.float32),
        params,
        state,
      )
      .lower(lowering_platforms=("tpu",))
      .compile()
    )
  memory = compiled.memory_analysis()
  # The parameters' shard and its gradient are there, the whole array is not.
  shard = 3 * E * D * F * 4 // 2
  assert shard < memory.argument_size_in_bytes < 1.2 * shard + 2 * T * D
