# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Dispatch and combine by the kernels for TPU: values, and where they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_mesh
from jax.sharding import AxisType

from jaxroute import dispatch
from jaxroute.dispatch import permute, permute_tpu
from jaxroute.kernels.tpu import device

T, K, E, D = 300, 2, 5, 1024
_KERNELS = (
  permute_tpu.weighted_copy,
  permute_tpu.products,
  permute_tpu.weighted_sum,
)


def _operands():
  """Rows, weights, tokens; drops, and NaN where nothing is to be read."""
  rng = np.random.default_rng(0)
  expert_idx = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
  mask = np.arange(T) % 10 > 0
  permutation = dispatch.sort_by_expert(
    jnp.asarray(expert_idx), E, jnp.asarray(mask), capacity=100
  )
  indices = permute._indices(permutation, T, K)
  past = np.arange(T * K) >= int(indices[2])
  rows = rng.normal(size=(T * K, D)).astype(np.float32)
  rows[past] = np.nan
  weights = rng.random((T, K)).astype(np.float32)
  weights[10] = np.nan  # it is masked
  d_out = rng.normal(size=(T, D)).astype(np.float32)
  return map(jnp.asarray, (rows, weights, d_out)), indices


def test_every_map_is_that_of_xla():
  arguments, indices = _operands()
  arguments = list(arguments)
  form, _ = permute._COMBINE
  for i, kernel in enumerate(_KERNELS):
    others = arguments[:i] + arguments[i + 1 :]
    actual = kernel(*others, *indices, dtype=jnp.float32, interpret=True)
    expected = form.maps[i](*others, *indices, dtype=jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
  rows = arguments[0]
  actual = permute_tpu.sum_rows(
    rows, *indices, dtype=jnp.float32, interpret=True
  )
  expected = permute._sum(rows, *indices, dtype=jnp.float32)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _step(x, weights, permutation):
  def loss(x, weights):
    rows = jnp.sin(dispatch.dispatch(x, permutation))
    return jnp.sum(dispatch.combine(rows, weights, permutation) ** 2)

  return jax.grad(loss, argnums=(0, 1))(x, weights)


def _abstract(d=D, lead=()):
  def like(shape, dtype):
    return jax.ShapeDtypeStruct((*lead, *shape), dtype)

  permutation = dispatch.Permutation(
    permutation=like((T * K,), jnp.int32),
    inverse_permutation=like((T * K,), jnp.int32),
    group_sizes=like((E,), jnp.int32),
  )
  x, weights = like((T, d), jnp.float32), like((T, K), jnp.float32)
  return x, weights, permutation


def _lowered(function, *args, platform="tpu"):
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "kind, gathers_apart", [("TPU v6 lite", False), ("TPU v5 lite", True)]
)
def test_where_rows_would_be_gathered_from_hbm(
  kind, gathers_apart, monkeypatch
):
  if not gathers_apart:  # whatever the compiler of this jax does
    monkeypatch.setattr(device, "gathers_apart", lambda: False)
  mesh = tpu_mesh.abstract(1, AxisType.Auto, kind)
  with jax.sharding.use_abstract_mesh(mesh):
    text = _lowered(functools.partial(_step), *_abstract())
  for name in ("add_rows", "take_rows", "multiply_rows"):
    assert f"jaxroute_{name}" in text


@pytest.mark.parametrize("platform", ("cpu", "tpu"))
def test_where_xla_keeps_it(platform, monkeypatch):
  monkeypatch.setattr(device, "gathers_apart", lambda: platform == "tpu")
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, AxisType.Auto)):
    text = _lowered(functools.partial(_step), *_abstract(), platform=platform)
  assert "_rows" not in text


def test_inside_shard_map_and_vmap_in_forward_mode(monkeypatch):
  monkeypatch.setattr(device, "gathers_apart", lambda: False)

  def derivatives(x, weights, permutation):
    step = functools.partial(_step, permutation=permutation)
    return jax.jvp(step, (x, weights), (x, weights))

  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(2, AxisType.Auto)):
    mapped = jax.shard_map(
      jax.vmap(derivatives),
      in_specs=(jax.P("data"),) * 3,
      out_specs=jax.P("data"),
      check_vma=True,
    )
    assert "jaxroute_add_rows" in _lowered(mapped, *_abstract(lead=(2,)))
