# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The kernel that numbers the assignments of every expert, interpreted."""

import functools

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jaxroute import dispatch
from jaxroute.kernels import route_tpu, sort_tpu

_sort = conformance.jit_interpreted(
  functools.partial(dispatch._sort_tpu, interpret=True),
  static_argnames=("num_experts", "capacity"),
)


def _choices(t, e, k, nowhere=0.2):
  """Distinct experts per token, and index E for those that are not here."""
  rng = np.random.default_rng(0)
  idx = np.argsort(rng.random((t, e)), axis=1)[:, :k].astype(np.int32)
  return np.where(rng.random((t, k)) < nowhere, e, idx).astype(np.int32)


def _assert_is_oracle(idx, e, capacity=None):
  load, *order = _sort(idx, num_experts=e, capacity=capacity)
  expected = oracle.sort_by_expert(idx, e, None, capacity)
  np.testing.assert_array_equal(order[0], expected[0])
  np.testing.assert_array_equal(order[1], expected[1])
  np.testing.assert_array_equal(load[:e], expected[2])
  assert load.sum() == idx.size


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_every_shape(shape):
  t, e, k = shape
  _assert_is_oracle(_choices(t, e, k), e)


def test_capacity_moves_the_later_tokens_to_the_end():
  _assert_is_oracle(_choices(70, 16, 3), 16, capacity=5)


@pytest.mark.parametrize("shape", ((2500, 20, 2), (300, 700, 9)), ids=str)
def test_blocks_of_tokens_and_words_of_experts(shape):
  t, e, k = shape
  _assert_is_oracle(_choices(t, e, k), e)


def test_products_of_older_generations(monkeypatch):
  monkeypatch.setattr(sort_tpu, "_columns", lambda interpret: 1)
  # A shape of its own, so that nothing is cached.
  _assert_is_oracle(_choices(2222, 24, 2), 24)


@pytest.mark.parametrize("expert", (0, 7, 8))
def test_all_tokens_on_one_expert_or_on_none(expert):
  _assert_is_oracle(np.full((300, 1), expert, np.int32), 8)


def test_no_expert_for_any_of_sixteen_choices():
  _assert_is_oracle(np.full((600, 16), 32, np.int32), 32)


def test_the_simulator_finds_no_race():
  idx, e = _choices(2100, 40, 3), 40
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  load, _, inverse = jax.jit(
    lambda idx: dispatch._sort_tpu(idx, e, None, interpret=params)
  )(idx)
  assert not interpret_pallas_call.races.races_found
  expected = oracle.sort_by_expert(idx, e, None, None)
  np.testing.assert_array_equal(inverse, expected[1])
  np.testing.assert_array_equal(load[:e], expected[2])


def test_sort_by_expert_takes_it_on_one_tpu_only(monkeypatch):
  taken = []

  def spy(key, num_experts, capacity):
    taken.append(key.shape)
    n = key.size
    return jnp.zeros(num_experts + 1, jnp.int32), *(
      [jnp.zeros(n, jnp.int32)] * 2
    )

  monkeypatch.setattr(dispatch, "_sort_tpu", spy)

  def takes(t=4, k=2):
    taken.clear()
    idx = jax.ShapeDtypeStruct((t, k), jnp.int32)
    # A function of its own, so that nothing is cached.
    jax.eval_shape(lambda i: dispatch.sort_by_expert.__wrapped__(i, 8), idx)
    return bool(taken)

  assert not takes()
  monkeypatch.setattr(route_tpu, "runs_here", lambda: True)
  assert not takes()  # eight devices, and no mesh to say how
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert takes()
  assert not takes(t=sort_tpu.MAX_ASSIGNMENTS // 2)
  mesh = jax.make_mesh((8,), ("data",))
  with jax.set_mesh(mesh):
    assert not takes()
