# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where parameters and states lie, and that nothing else depends on it."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import dual, experts, parallel

E, D, F, S, LAYERS = 8, 16, 12, 4, 3
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=2, histogram=True)
PARTITIONS = {
  "expert": jaxroute.Partition(token_axes=("data",), expert_axis="expert"),
  "fsdp": jaxroute.Partition(token_axes=("data",), fsdp_axis="data"),
  "both": jaxroute.Partition(
    token_axes=("data", "expert"), expert_axis="expert", fsdp_axis="data"
  ),
  "tensor": jaxroute.Partition(token_axes=("data",), tensor_axis="expert"),
}


def _mesh(kind=jax.sharding.AxisType.Auto):
  return jax.make_mesh((4, 2), ("data", "expert"), axis_types=(kind,) * 2)


class Block(nn.Module):
  """A norm and a layer, to be scanned over."""

  partition: jaxroute.Partition | None = None

  @nn.compact
  def __call__(self, x, _):
    y, _ = jaxroute.linen.MoE(
      CONFIG, hidden_size=F, shared_hidden_size=S, partition=self.partition
    )(nn.RMSNorm()(x))
    return x + y, None


class Model(nn.Module):
  """Layers under a scan, and a layer of no router."""

  partition: jaxroute.Partition | None = None

  @nn.compact
  def __call__(self, x):
    names = ("params", "expert_bias", *jaxroute.linen.COUNTED)
    layers = nn.scan(
      Block,
      variable_axes=dict.fromkeys(names, 0),
      split_rngs={"params": True},
      length=LAYERS,
    )
    x, _ = layers(self.partition, name="layers")(x, None)
    return nn.Dense(7, name="head")(x)


def _shapes(optimizer):
  def init(key):
    variables = Model().init(key, jnp.zeros((16, D)))
    router = jaxroute.linen.init_router_state(variables, dual.sign(1e-2))
    return jaxroute.init_train_state(variables["params"], router, optimizer)

  return jax.eval_shape(init, jax.random.key(0))


def _specs(tree, partition):
  """Specifications by path; what nothing shards is left out."""
  found = parallel.shardings(tree, partition, _mesh())
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(s.spec)
    for path, s in jax.tree_util.tree_leaves_with_path(found)
    if s.spec
  }


# By the name of a parameter under a scan over layers; the first axis is theirs.
_SCANNED = {
  "expert": {
    "w_gate": (None, "expert"),
    "w_up": (None, "expert"),
    "w_down": (None, "expert"),
  },
  "fsdp": {
    "w_gate": (None, None, "data"),
    "w_up": (None, None, "data"),
    "w_down": (None, None, None, "data"),
  },
  "both": {
    "w_gate": (None, "expert", "data"),
    "w_up": (None, "expert", "data"),
    "w_down": (None, "expert", None, "data"),
  },
  "tensor": {
    "w_gate": (None, None, None, "expert"),
    "w_up": (None, None, None, "expert"),
    "w_down": (None, None, "expert"),
  },
}
_SCANNED["fsdp"] |= (
  others := {
    "shared_gate": (None, "data"),
    "shared_up": (None, "data"),
    "shared_down": (None, None, "data"),
    "router/kernel": (None, "data"),
  }
)
_SCANNED["both"] |= others


def _of_params(name, prefix):
  """The specifications of the parameters of `Model`, or of their moments."""
  found = {f"{prefix}/layers/MoE_0/{n}": s for n, s in _SCANNED[name].items()}
  if name in ("fsdp", "both"):
    found[f"{prefix}/layers/RMSNorm_0/scale"] = (None, "data")
    found[f"{prefix}/head/kernel"] = ("data",)
  return found


@pytest.mark.any_jax
@pytest.mark.parametrize("name", PARTITIONS)
def test_a_state_lies_as_its_partition_says(name):
  state = _shapes(optax.chain(optax.clip(1.0), optax.adamw(1e-3)))
  expected = {}
  for prefix in ("params", "opt_state/1/0/mu", "opt_state/1/0/nu"):
    expected |= _of_params(name, prefix)
  assert _specs(state, PARTITIONS[name]) == expected
  assert not _specs(state.router, PARTITIONS[name])


@pytest.mark.any_jax
def test_moments_of_other_shapes_are_replicated():
  # Of [Lyr, E, D, F] it keeps [Lyr, E, D] and [Lyr, E, F].
  state = _shapes(optax.adafactor(1e-3, min_dim_size_to_factor=2))
  shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
  assert {(LAYERS, E, D), (LAYERS, E, F)} <= shapes
  found = _specs(state, PARTITIONS["both"])
  assert found == _of_params("both", "params")


@pytest.mark.any_jax
def test_variables_of_linen_and_nnx_and_experts_alone():
  specs = {"w_gate": ("expert", "data"), "w_up": ("expert", "data")}
  specs["w_down"] = ("expert", None, "data")
  shared = {"shared_gate": ("data",), "shared_up": ("data",)}
  layer = specs | shared | {"shared_down": (None, "data")}
  layer["router/kernel"] = ("data",)
  partition = PARTITIONS["both"]

  moe = jaxroute.linen.MoE(CONFIG, hidden_size=F, shared_hidden_size=S)
  variables = jax.eval_shape(moe.init, jax.random.key(0), jnp.zeros((2, D)))
  expected = {f"params/{n}": spec for n, spec in layer.items()}
  assert _specs(variables, partition) == expected

  model = jaxroute.nnx.MoE(
    CONFIG,
    in_features=D,
    hidden_size=F,
    shared_hidden_size=S,
    rngs=nnx.Rngs(0),
  )
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  paths = ("0", "1/opt_state/0/mu", "1/opt_state/0/nu")
  expected = {f"{p}/{n}/value": layer[n] for p in paths for n in layer}
  state = nnx.state((model, optimizer))
  assert _specs(state, partition) == expected
  placed = parallel.shardings(state, partition, _mesh())
  state = jax.device_put(state, placed)
  assert state[0]["w_up"].get_value().sharding.shard_shape((E, D, F)) == (
    4,
    4,
    F,
  )

  params = experts.init_expert_params(jax.random.key(0), E, D, F)
  assert _specs(params, partition) == specs
  dense = {"w_gate": jnp.zeros((E, D, F)), "bias": jnp.zeros(8)}  # of E layers
  assert _specs(dense, PARTITIONS["expert"]) == {}
  assert _specs(jnp.zeros((8, 4)), partition) == {"": ("data",)}


@pytest.mark.parametrize(
  "partition, mesh, message",
  [
    (None, "mesh", "`partition` must be a `Partition`, got None"),
    (PARTITIONS["both"], None, "`mesh` must be a `Mesh`, got None"),
    (
      jaxroute.Partition(fsdp_axis="model"),
      "mesh",
      r"names the mesh axes \['model'\], got a mesh with \('data', 'expert'\)",
    ),
    (
      jaxroute.Partition(expert_axis="data"),
      "mesh",
      r"shards 6 experts over the mesh axes \('data',\), 4 devices",
    ),
    (
      jaxroute.Partition(tensor_axis="expert"),
      "mesh",
      r"shards 5 units of an expert's width F over .*'expert'.*, 2 devices",
    ),
  ],
)
def test_what_does_not_fit_is_named(partition, mesh, message):
  params = experts.init_expert_params(jax.random.key(0), 6, 3, 5)
  mesh = _mesh() if mesh else None
  with pytest.raises(ValueError, match=message):
    parallel.shardings(params, partition, mesh)
