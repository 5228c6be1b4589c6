# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Where parameters and states lie, and that nothing else depends on it."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
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
RULE = dual.sign(1e-2)
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
  """A layer with a residual connection, to be scanned over."""

  partition: jaxroute.Partition | None = None
  logical_axes: bool = False

  @nn.compact
  def __call__(self, x, _):
    y, _ = jaxroute.linen.MoE(
      CONFIG,
      hidden_size=F,
      shared_hidden_size=S,
      partition=self.partition,
      logical_axes=self.logical_axes,
      name="moe",
    )(x)
    return x + y, None


def _model(*args, **kwargs):
  names = ("params", "expert_bias", *jaxroute.linen.COUNTED)
  return nn.scan(
    Block,
    variable_axes=dict.fromkeys(names, 0),
    split_rngs={"params": True},
    length=LAYERS,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )(*args, **kwargs)


def _init(optimizer, key):
  variables = _model().init(key, jnp.zeros((16, D)), None)
  router = jaxroute.linen.init_router_state(variables, RULE)
  others = {"kernel": jnp.ones((D, 7)), "bias": jnp.ones(7)}
  others["scale"] = jnp.ones((LAYERS, D))
  params = variables["params"] | {"others": others}
  return jaxroute.init_train_state(params, router, optimizer)


def _shapes(optimizer):
  return jax.eval_shape(functools.partial(_init, optimizer), jax.random.key(0))


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
  """The specifications of the parameters of `_init`, or of their moments."""
  found = {f"{prefix}/moe/{n}": spec for n, spec in _SCANNED[name].items()}
  if name in ("fsdp", "both"):
    found[f"{prefix}/others/scale"] = (None, "data")
    found[f"{prefix}/others/kernel"] = ("data",)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Dense:
  """A user's own SwiGLU, stacked over five layers."""

  w_gate: jax.Array
  w_up: jax.Array
  w_down: jax.Array


@pytest.mark.any_jax
def test_names_of_experts_in_other_classes_are_no_experts():
  dense = _Dense(*[jnp.zeros((5, D, F))] * 3)
  assert _specs(dense, PARTITIONS["expert"]) == {}


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


def test_a_layer_names_what_its_axes_do_not_fit():
  partition = PARTITIONS["tensor"]
  layer = jaxroute.linen.MoE(CONFIG, hidden_size=5, partition=partition)
  message = "shards 5 units of an expert's width F over .*, 2 devices"
  with jax.set_mesh(_mesh()), pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, D)))
  # It looks for all axes of a partition, also for one that it does not use.
  partition = jaxroute.Partition(fsdp_axis="model")
  layer = jaxroute.linen.MoE(CONFIG, hidden_size=F, partition=partition)
  message = (
    r"names the mesh axes \['model'\], got a mesh with \('data', 'expert'\)"
  )
  with jax.set_mesh(_mesh()), pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((8, D)))


@functools.cache
@functools.cache
def _step(name=None, kind=None):
  """Loads and loss of two steps, and the state after them."""
  partition = PARTITIONS.get(name)
  model = _model(partition)
  optimizer = optax.sgd(0.1, momentum=0.9)

  def loss_fn(params, expert_bias, batch):
    params = {"moe": params["moe"]}
    variables = {"params": params, "expert_bias": expert_bias}
    (y, _), counted = model.apply(
      variables, batch, None, mutable=jaxroute.linen.COUNTED
    )
    return jnp.mean(y**2), (jaxroute.linen.counts(counted), {})

  state = _init(optimizer, jax.random.key(0))
  batch = jax.random.normal(jax.random.key(1), (64, D)) + 0.3
  step = functools.partial(
    jaxroute.train_step,
    loss_fn=loss_fn,
    optimizer=optimizer,
    rule=RULE,
    micro_batches=2,
  )
  reports = []
  with contextlib.ExitStack() as stack:
    placed = None
    if partition:
      mesh = _mesh(kind)
      stack.enter_context(jax.set_mesh(mesh))
      placed = parallel.shardings(state, partition, mesh)
      state = jax.device_put(state, placed)
      batch = jax.device_put(batch, jax.P(partition.token_axes))
    step = jax.jit(step, out_shardings=(placed, None))
    for _ in range(2):
      state, report = step(state, batch)
      reports.append(jax.device_get((report["load"], report["loss"])))
  if placed:
    for x, t in zip(*map(jax.tree.leaves, (state, placed)), strict=True):
      assert x.sharding.is_equivalent_to(t, x.ndim)
  return reports, jax.device_get(state)


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.parametrize(
  "name, kind",
  [
    ("fsdp", EXPLICIT),
    pytest.param("both", AUTO, marks=pytest.mark.any_jax),
    ("both", EXPLICIT),
    ("tensor", AUTO),
    pytest.param("tensor", EXPLICIT, marks=pytest.mark.any_jax),
  ],
)
def test_training_does_not_depend_on_where_parameters_lie(name, kind):
  expected, expected_state = _step()
  reports, state = _step(name, kind)
  for (load, loss), (load1, loss1) in zip(reports, expected, strict=True):
    jax.tree.map(np.testing.assert_array_equal, load, load1)
    np.testing.assert_allclose(loss, loss1, rtol=1e-6)
  jax.tree.map(
    np.testing.assert_array_equal,
    state.router.expert_bias,
    expected_state.router.expert_bias,
  )
  # The momentum is made of the gradients.
  jax.tree.map(
    lambda x, x1: np.testing.assert_allclose(x, x1, rtol=1e-4, atol=1e-5),
    (state.params, state.opt_state),
    (expected_state.params, expected_state.opt_state),
  )


_RULES = (("expert", "expert"), ("embed", "data"), ("mlp", None))


@pytest.mark.any_jax
def test_flax_s_rules_place_linen_s_parameters():
  model = _model(logical_axes=True)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.ones((2, D)), None
  )
  specs = nn.get_partition_spec(variables)
  gate = specs["params"]["moe"]["w_gate"]
  assert gate == jax.P("layers", "expert", "embed", "mlp")
  mesh = _mesh()
  rules = (*_RULES, ("layers", None))
  by_rules = nn.logical_to_mesh_sharding(specs, mesh, rules)
  ours = nn.unbox(parallel.shardings(variables, PARTITIONS["both"], mesh))
  for s, x, t in zip(
    *map(jax.tree.leaves, (by_rules, nn.unbox(variables), ours)), strict=True
  ):
    assert s.is_equivalent_to(t, x.ndim), (s, t)


@pytest.mark.any_jax
def test_boxes_change_no_number():
  x = jax.random.normal(jax.random.key(1), (16, D))
  key = jax.random.key(0)
  plain = jax.jit(_model().init)(key, x, None)
  bias = plain["expert_bias"]

  def loss(model, params):
    variables = {"params": params, "expert_bias": bias}
    return jnp.mean(model.apply(variables, x, None)[0] ** 2)

  def grad(model):
    return jax.jit(jax.grad(functools.partial(loss, model)))

  expected = grad(_model())(plain["params"])
  model = _model(PARTITIONS["both"], logical_axes=True)
  mesh = _mesh()
  rules = (*_RULES, ("layers", None))
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    boxed = jax.jit(model.init)(key, x, None)["params"]
    assert isinstance(boxed["moe"]["w_up"], nn.LogicallyPartitioned)
    boxed = jax.device_put(
      boxed, parallel.shardings(boxed, PARTITIONS["both"], mesh)
    )
    jax.tree.map(
      np.testing.assert_array_equal, nn.unbox(boxed), plain["params"]
    )
    got = nn.unbox(grad(model)(boxed))
  jax.tree.map(
    lambda g, g1: np.testing.assert_allclose(g, g1, rtol=1e-4, atol=1e-5),
    jax.device_get(got),
    jax.device_get(expected),
  )


@pytest.mark.any_jax
def test_flax_s_rules_place_nnx_s_parameters():
  mesh = _mesh()

  def make(**kwargs):
    return jaxroute.nnx.MoE(
      CONFIG,
      in_features=D,
      hidden_size=F,
      shared_hidden_size=S,
      rngs=nnx.Rngs(0),
      **kwargs,
    )

  plain = nnx.state(make())
  with nnx.use_eager_sharding(False):
    state = nnx.state(make(logical_axes=True))
  with nnx.logical_axis_rules(_RULES):
    by_rules = nnx.get_named_sharding(state, mesh)
    with jax.set_mesh(mesh):  # and here they are sharded as they are made
      sharded = nnx.state(make(logical_axes=True))
  for tree in (plain, state):
    ours = parallel.shardings(tree, PARTITIONS["both"], mesh)
    for x, y, s, t in zip(
      *map(jax.tree.leaves, (plain, sharded, by_rules, ours)), strict=True
    ):
      assert s.is_equivalent_to(t, x.ndim), (s, t)
      assert y.sharding.is_equivalent_to(t, x.ndim), (y.sharding, t)
      np.testing.assert_array_equal(x, y)
