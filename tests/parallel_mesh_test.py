# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Which mesh is in force, and what a kernel may do under it."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute import layer, losses
from jaxroute.parallel import mesh as mesh_lib

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def _mesh(shape, *kinds):
  names = ("data", "expert")[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=kinds)


def test_without_a_mesh_several_devices_forbid_what_was_not_asked_for():
  assert "8 devices" in mesh_lib.kernel_refusal(by_name=False)
  assert mesh_lib.kernel_refusal(by_name=True) is None


@pytest.mark.parametrize(
  ("shape", "kinds", "over_shards", "axes"),
  (
    ((8,), (AUTO,), True, ["data"]),
    ((8,), (EXPLICIT,), False, ["data"]),
    ((8,), (EXPLICIT,), True, None),
    ((4, 2), (EXPLICIT, AUTO), True, ["expert"]),
    ((8, 1), (EXPLICIT, AUTO), True, None),
    ((1, 1), (AUTO, AUTO), False, None),
  ),
)
@pytest.mark.parametrize("by_name", (False, True))
def test_a_kernel_needs_axes_that_xla_does_not_partition(
  shape, kinds, over_shards, axes, by_name
):
  with jax.set_mesh(_mesh(shape, *kinds)):
    reason = mesh_lib.kernel_refusal(by_name, over_shards)
  if axes is None:
    assert reason is None
  else:
    assert str(axes) in reason and "jax.shard_map" in reason


def test_inside_shard_map_a_kernel_may_run():
  reasons = []

  def local(x):
    reasons.append(mesh_lib.kernel_refusal(by_name=False))
    return x

  with jax.set_mesh(_mesh((8,), AUTO)):
    mapped = jax.shard_map(
      local, in_specs=jax.P("data"), out_specs=jax.P("data")
    )
    jax.eval_shape(mapped, jnp.ones(8))
  assert reasons == [None]


def test_arrays_vary_alike_inside_shard_map_and_stay_outside():
  varying = []

  def local(x, y):
    x, y = mesh_lib.vary_alike((x, y))
    varying.append([jax.typeof(v).manual_axis_type.varying for v in (x, y)])
    return x + y

  mesh = _mesh((8,), AUTO)
  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data")
  )
  jax.eval_shape(mapped, jnp.ones(8), jnp.ones(1))
  assert varying == [[{"data"}, {"data"}]]
  x = jnp.ones(3)
  assert mesh_lib.vary_alike({"x": x})["x"] is x


def test_an_axis_that_is_not_there_is_named():
  partition = jaxroute.Partition(token_axes=("data",), expert_axis="model")
  with jax.set_mesh(_mesh((8,), AUTO)):
    with pytest.raises(ValueError, match=r"\['data', 'model'\].*jax.set_mesh"):
      mesh_lib.mesh_of(partition)


def test_sizes_that_do_not_divide_are_named():
  mesh = _mesh((4, 2), AUTO, AUTO)
  with pytest.raises(ValueError, match="shards 6 tokens.*8 devices.*Pad"):
    mesh_lib.check_divides("tokens", 6, mesh, ("data", "expert"))
  mesh_lib.check_divides("tokens", 16, mesh, ("data", "expert"))


@pytest.mark.parametrize(
  ("token_axes", "expert_axis", "shards"),
  (
    ((), None, 1),
    (("data",), None, 4),
    (("data", "expert"), "expert", 4),
    (("data", "expert"), None, 8),
  ),
)
def test_shards_of_tokens_are_those_dispatched_apart(
  token_axes, expert_axis, shards
):
  partition = jaxroute.Partition(token_axes=token_axes, expert_axis=expert_axis)
  with jax.set_mesh(_mesh((4, 2), AUTO, AUTO)):
    assert mesh_lib.token_shards(partition) == shards
  assert mesh_lib.token_shards(None) == 1


def _double_and_count(x, bias):
  return {"x": 2 * x + bias, "count": jnp.sum(x > 0), "none": None}


@pytest.mark.parametrize("is_sharded", (False, True))
@pytest.mark.parametrize("is_mesh_set", (False, True))
def test_a_function_of_tokens_is_mapped_over_their_shards(
  is_sharded, is_mesh_set
):
  mesh = _mesh((8,), EXPLICIT)
  x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
  bias = np.ones(3, np.float32)[None]
  sizes = []

  def function(x, bias):
    sizes.append(len(x))
    return _double_and_count(x, bias)

  def mapped(x, bias):
    return mesh_lib.map_over_tokens(
      function,
      [x, bias],
      are_per_token=[True, False],
      outputs_per_token={"x": True, "count": False, "none": True},
    )

  expected = _double_and_count(x, bias)
  placed = x
  if is_sharded:
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
  if is_mesh_set:
    with jax.set_mesh(mesh):
      actual = jax.jit(mapped)(placed, bias)
  else:
    actual = jax.jit(mapped)(placed, bias)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  assert set(sizes) == {2 if is_sharded else 16}
  if is_sharded:
    assert jax.typeof(actual["x"]).sharding.spec == jax.P("data", None)
    assert actual["count"].is_fully_replicated


@pytest.mark.parametrize(
  ("partition", "mesh", "x", "words"),
  (
    (("data",), None, (8, 4), "no mesh in force.*jax.set_mesh"),
    (("rows",), (AUTO, AUTO), (8, 4), r"'rows'\], got a mesh with \('data'"),
    (("data",), (EXPLICIT, AUTO), (2, 3, 4), "shards 6 tokens.*4 dev.*Pad"),
    (("data",), (AUTO, AUTO), (4,), "shards 1 tokens.*4 devices"),
    ((), (AUTO, AUTO), (8, 4), "shards 7 experts.*2 devices"),
  ),
)
def test_what_a_mesh_lacks_is_said_before_anything_is_traced(
  partition, mesh, x, words
):
  partition = jaxroute.Partition(token_axes=partition, expert_axis="expert")
  context = contextlib.nullcontext()
  if mesh is not None:
    context = jax.set_mesh(_mesh((4, 2), *mesh))
  with context, pytest.raises(ValueError, match=words):
    layer.router(
      jnp.ones(x), jnp.ones((4, 7)), None, _config(7), partition=partition
    )


def _config(num_experts):
  return jaxroute.RouterConfig(num_experts=num_experts, top_k=2)


def test_a_partition_inside_shard_map_over_its_axes_is_refused():
  partition = jaxroute.Partition(token_axes="data")

  def local(x):
    router, _ = layer.router(
      x, jnp.ones((4, 8)), None, _config(8), partition=partition
    )
    return router.weights

  with jax.set_mesh(_mesh((8,), AUTO)):
    mapped = jax.shard_map(
      local, in_specs=jax.P("data"), out_specs=jax.P("data")
    )
    with pytest.raises(
      ValueError, match=r"shard_map` over \['data'\].*axis_name=\('data',\)"
    ):
      jax.eval_shape(mapped, jnp.ones((8, 4)))


@pytest.mark.parametrize("spec", (jax.P(), jax.P("data", None, "expert")))
def test_on_explicit_axes_tokens_are_routed_where_they_lie(spec):
  x = jax.random.normal(jax.random.key(0), (8, 3, 4))
  weight = jax.random.normal(jax.random.key(1), (4, 8))

  def route(x, weight):
    return layer.router(x, weight, None, _config(8))[0]

  expected = jax.jit(route)(x, weight)
  with jax.set_mesh(_mesh((4, 2), EXPLICIT, EXPLICIT)):
    x = jax.device_put(x, spec)
    weight = jax.device_put(weight, jax.P("expert"))
    routing = jax.jit(route)(x, weight)
  assert jax.typeof(routing.expert_idx).sharding.spec == jax.P(
    spec[0] if spec else None, None
  )
  np.testing.assert_array_equal(routing.expert_idx, expected.expert_idx)
  np.testing.assert_array_equal(routing.load, expected.load)


def test_load_and_histogram_travel_in_one_all_reduce():
  config = jaxroute.RouterConfig(num_experts=8, top_k=2, histogram=True)
  partition = jaxroute.Partition(token_axes=("data", "expert"))

  def counts(x):
    weight = jnp.ones((4, 8))
    return layer.router(x, weight, None, config, partition=partition)[0].counts

  for kind in (AUTO, EXPLICIT):
    with jax.set_mesh(_mesh((4, 2), kind, kind)):
      text = jax.jit(counts).lower(jnp.ones((16, 4))).as_text()
    assert text.count("stablehlo.all_reduce") == 1


def test_a_loss_of_the_load_has_it_summed_once_also_under_remat():
  partition = jaxroute.Partition(token_axes=("data", "expert"))

  def loss(weight, x):
    routing, logits = layer.router(
      x, weight, None, _config(8), partition=partition
    )
    return losses.switch(logits, routing, _config(8))

  weight, x = jnp.ones((4, 8)), jnp.ones((16, 4))
  kept = jax.checkpoint(loss, policy=jaxroute.save_routing)
  with jax.set_mesh(_mesh((4, 2), AUTO, AUTO)):
    for function in (loss, kept):
      text = jax.jit(jax.grad(function)).lower(weight, x).as_text()
      sums = re.findall(
        r"all_reduce.*?\}\) : \(tensor<(\S+)>\)", text, re.DOTALL
      )
      assert sums.count("8xi32") == 1
