# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rows that travel to the devices of their experts, against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from ragged import emulated_ragged  # noqa: F401

import jaxroute
from jaxroute import experts, layer
from jaxroute.parallel import all_to_all

pytestmark = [
  pytest.mark.optimized,
  pytest.mark.devices(8),
  pytest.mark.usefixtures("emulated_ragged"),
]

T, D, F, E, K = 64, 16, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K)
NAN_TOKEN = 3


def _partition(exchange, **fields):
  return jaxroute.Partition(
    token_axes=("data", "expert"),
    expert_axis="expert",
    exchange=exchange,
    **fields,
  )


def _mesh(shape, kind=AxisType.Auto):
  return jax.make_mesh(shape, ("data", "expert"), axis_types=(kind,) * 2)


@functools.cache
def _inputs():
  """Tokens, their uneven routing with padding and a NaN token, and parameters."""
  keys = jax.random.split(jax.random.key(0), 8)

  def normal(key, *shape):
    return jax.random.normal(key, shape) / 4

  params = experts.ExpertParams(
    w_gate=normal(keys[0], E, D, F),
    w_up=normal(keys[1], E, D, F),
    w_down=normal(keys[2], E, F, D),
  )
  shared = experts.ExpertParams(
    w_gate=normal(keys[3], D, F),
    w_up=normal(keys[4], D, F),
    w_down=normal(keys[5], F, D),
  )
  x = normal(keys[6], T, D) + 0.3
  x = x.at[NAN_TOKEN].set(jnp.nan)
  weight = normal(keys[7], D, E)
  bias = jnp.linspace(-0.3, 0.3, E, dtype=jnp.float32)
  routing, _ = layer.router(x, weight, bias, CONFIG, jnp.arange(T) % 7 != 1)
  load = np.asarray(routing.load)
  assert load.max() > 3 * load.mean() and load.min() == 0
  return x, routing, params, shared


@functools.partial(jax.jit, static_argnums=(4, 5))
def _run(x, routing, params, shared, partition=None, capacity_factor=None):
  """Output and rows of the layer, and the gradients of a loss of both."""

  def loss(x, weights, params, shared):
    y, sizes = layer.moe(
      x,
      dataclasses.replace(routing, weights=weights),
      params,
      shared,
      config=CONFIG,
      partition=partition,
      capacity_factor=capacity_factor,
    )
    kept = jnp.where(jnp.isnan(y), 0.0, y)
    return jnp.sum(kept**2), (y, sizes)

  grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  return grad(x, routing.weights, params, shared)


def _dropped(routing, kept):
  """A routing whose assignments that are not kept are of no expert."""
  expert_idx = jnp.where(jnp.asarray(kept), routing.expert_idx, E)
  return dataclasses.replace(routing, expert_idx=expert_idx)


def _assert_close(got, expected):
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6),
    *jax.device_get((got, expected)),
  )


@pytest.mark.parametrize("exchange", ["ragged", "equal"])
@pytest.mark.parametrize(
  ("shape", "kind", "factor"),
  [
    ((1, 8), AxisType.Auto, 0.2),
    ((2, 4), AxisType.Explicit, None),
    ((8, 1), AxisType.Auto, None),
  ],
)
def test_nothing_is_dropped_and_nothing_changes(shape, kind, factor, exchange):
  inputs = _inputs()
  grads, (y, sizes) = _run(*inputs)
  partition = _partition(exchange, buffer_factor=factor)
  with jax.set_mesh(_mesh(shape, kind)):
    got_grads, (got_y, got_sizes) = _run(*inputs, partition)
  np.testing.assert_array_equal(got_sizes, sizes)
  np.testing.assert_array_equal(sizes, inputs[1].load)
  # Rows come back in the order in which one device would sum them.
  np.testing.assert_allclose(got_y, y, rtol=1e-6, atol=1e-7)
  assert np.isnan(got_y[NAN_TOKEN]).all()
  _assert_close(got_grads, grads)


@pytest.mark.any_jax
@pytest.mark.parametrize("exchange", ["ragged", "equal"])
def test_what_does_not_fit_one_round_is_dropped_and_counted(exchange):
  x, routing, params, shared = _inputs()
  devices, factor = 4, 1.0
  partition = _partition(exchange, buffer_factor=factor, drop=True)
  with jax.set_mesh(_mesh((2, devices))):
    got_grads, (got_y, got_sizes) = _run(x, routing, params, shared, partition)
  size = T * K // 8
  kept = np.concatenate(
    [
      oracle.exchanged(ids, mask, E, devices, size, exchange)
      for ids, mask in zip(
        np.split(np.asarray(routing.expert_idx), 2),
        np.split(np.asarray(routing.token_mask), 2),
        strict=True,
      )
    ]
  )
  ids = np.asarray(routing.expert_idx)[kept]
  np.testing.assert_array_equal(got_sizes, np.bincount(ids, minlength=E))
  assert 0 < kept.sum() < routing.load.sum()
  grads, (y, _) = _run(x, _dropped(routing, kept), params, shared)
  np.testing.assert_allclose(got_y, y, rtol=1e-6, atol=1e-7)
  _assert_close(got_grads, grads)


@pytest.mark.any_jax
@pytest.mark.parametrize("exchange", ["ragged", "equal"])
def test_the_capacity_of_an_expert_is_that_of_all_gathered_tokens(exchange):
  inputs = _inputs()
  with jax.set_mesh(_mesh((2, 4))):
    got = _run(*inputs, _partition(exchange, buffer_factor=0.3), 1.0)
    expected = _run(*inputs, _partition("all_gather"), 1.0)
  np.testing.assert_array_equal(got[1][1], expected[1][1])
  # Two token shards, and ceil(64 / 2 * 2 / 8) rows of an expert for each.
  assert np.max(got[1][1]) == 16 < np.max(inputs[1].load)
  _assert_close(got, expected)


@pytest.mark.parametrize("exchange", ["all_gather", "equal"])
def test_no_tokens_have_no_rows(exchange):
  _, _, params, shared = _inputs()
  none = jnp.zeros((0, D))
  routing, _ = layer.router(none, jnp.zeros((D, E)), None, CONFIG)
  with jax.set_mesh(_mesh((2, 4))):
    grads, (y, sizes) = _run(
      none, routing, params, shared, _partition(exchange)
    )
  assert y.shape == (0, D)
  np.testing.assert_array_equal(sizes, np.zeros(E))
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_a_device_that_has_all_experts_drops_what_it_is_told_to():
  x, routing, params, shared = _inputs()
  partition = _partition("equal", buffer_factor=0.5, drop=True)
  with jax.set_mesh(_mesh((8, 1))):
    _, (_, sizes) = _run(x, routing, params, shared, partition)
  counted = np.asarray(routing.token_mask).reshape(8, -1).sum(axis=1) * K
  assert int(np.sum(sizes)) == np.minimum(counted, T // 8 * K // 2).sum()


@pytest.mark.any_jax
def test_known_ranks_are_of_a_device_and_change_nothing(monkeypatch):
  x, routing, params, shared = _inputs()
  found = zip(
    np.split(np.asarray(routing.expert_idx), 8),
    np.split(np.asarray(routing.token_mask), 8),
    strict=True,
  )
  rank = np.concatenate([oracle.ranks(*shard) for shard in found])
  ranked = dataclasses.replace(routing, rank=jnp.asarray(rank))
  _, (expected, _) = _run(x, routing, params, shared)
  sort, loads = layer.dispatch.sort_by_expert, []

  def spy(*args, rank, load):
    assert rank.shape == (T // 8, K)
    jax.debug.callback(loads.append, load)
    return sort(*args, rank=rank, load=load)

  monkeypatch.setattr(layer.dispatch, "sort_by_expert", spy)
  with jax.set_mesh(_mesh((2, 4))):
    y, _ = layer.moe(
      x, ranked, params, shared, config=CONFIG, partition=_partition("equal")
    )
  jax.effects_barrier()
  np.testing.assert_array_equal(np.sum(loads, axis=0), routing.load)
  np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)


def _abstract(kind, platform, shape):
  device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  return AbstractMesh(
    shape,
    ("data", "expert"),
    axis_types=(AxisType.Auto,) * 2,
    abstract_device=device,
  )


@pytest.mark.parametrize(
  ("kind", "platform", "shape", "expected"),
  [
    ("TPU v5 lite", "tpu", (4, 8), "ragged"),
    ("TPU v5 lite", "tpu", (8, 8), "equal"),
    ("TPU v5", "tpu", (8, 256), "ragged"),
    ("TPU v6 lite", "tpu", (16, 16), "ragged"),
    ("TPU7x", "tpu", (16, 16), "ragged"),
    ("NVIDIA H100 80GB HBM3", "gpu", (1, 8), "ragged"),
    ("cpu", "cpu", (2, 4), "equal"),
  ],
)
def test_the_exchange_is_chosen_by_the_devices(
  kind, platform, shape, expected, monkeypatch
):
  monkeypatch.undo()  # the emulation
  mesh = _abstract(kind, platform, shape)
  assert all_to_all.choose(_partition(None), mesh) == expected
  for exchange in ("equal", "all_gather"):
    assert all_to_all.choose(_partition(exchange), mesh) == exchange
  if expected == "equal":
    with pytest.raises(NotImplementedError, match="'ragged' cannot.*'equal'"):
      all_to_all.choose(_partition("ragged"), mesh)
  else:
    assert all_to_all.choose(_partition("ragged"), mesh) == "ragged"


def test_a_buffer_below_one_row_is_refused():
  partition = _partition("equal", buffer_factor=0.05)
  with jax.set_mesh(_mesh((2, 4))):
    with pytest.raises(ValueError, match="0.05.*one row of the 16.*got 0.8"):
      _run(*_inputs(), partition)
  assert all_to_all.buffer_rows(partition, 20, 4) == 8
  assert all_to_all.buffer_rows(_partition("equal"), 16, 4) == 24
  assert all_to_all.buffer_rows(_partition("equal"), 0, 4) == 8
  # No more than all devices send.
  partition = _partition("equal", buffer_factor=1e30)
  assert all_to_all.buffer_rows(partition, 16, 4) == 64
