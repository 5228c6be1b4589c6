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
import tpu_mesh
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from jaxroute import dispatch
from jaxroute.dispatch import api, pallas_tpu
from jaxroute.kernels.tpu import device, sort
from jaxroute.kernels.tpu.sort import plan

_sort = conformance.jit_interpreted(
  functools.partial(pallas_tpu.sort, by_name=True, interpret=True),
  static_argnames=("num_experts", "capacity"),
)


def _choices(t, e, k, unassigned=0.2):
  """Distinct experts per token, and index E for a share of them."""
  rng = np.random.default_rng(0)
  idx = np.argsort(rng.random((t, e)), axis=1)[:, :k].astype(np.int32)
  return np.where(rng.random((t, k)) < unassigned, e, idx).astype(np.int32)


def _assert_is_oracle(idx, e, capacity=None):
  load, *order = _sort(idx, num_experts=e, capacity=capacity)
  expected = oracle.sort_by_expert(idx, e, None, capacity)
  np.testing.assert_array_equal(order[0], expected[0])
  np.testing.assert_array_equal(order[1], expected[1])
  np.testing.assert_array_equal(load[:e], expected[2])
  assert load.sum() == idx.size


@pytest.mark.parametrize(
  "shape", conformance.rows(cases.SHAPES, long=[(17, 384, 8), (21, 512, 10)])
)
def test_every_shape(shape):
  t, e, k = shape
  _assert_is_oracle(_choices(t, e, k), e)


@pytest.mark.any_jax
def test_capacity_moves_the_later_tokens_to_the_end():
  _assert_is_oracle(_choices(70, 16, 3), 16, capacity=5)


@pytest.mark.parametrize(
  "shape", conformance.rows([(2500, 20, 2), (300, 700, 9)], [(2500, 20, 2)])
)
def test_blocks_of_tokens_and_words_of_experts(shape):
  t, e, k = shape
  _assert_is_oracle(_choices(t, e, k), e)


@pytest.mark.any_jax
def test_products_of_older_generations(monkeypatch):
  monkeypatch.setattr(plan, "_columns", lambda interpret: 1)
  # A shape of its own, so that nothing is cached.
  _assert_is_oracle(_choices(2222, 24, 2), 24)


def test_counts_and_rows_by_hand():
  idx = np.array([[2, 0], [3, 2], [3, 3]], np.int32)
  counts = sort.count_assignments(idx, num_experts=3, interpret=True)
  np.testing.assert_array_equal(counts, [1, 0, 2, 3])
  start = np.array([10, 20, 30, 40], np.int32)
  rows = sort.assignment_rows(idx, start, interpret=True)
  np.testing.assert_array_equal(rows, [[30, 10], [40, 31], [41, 42]])


@pytest.mark.any_jax
def test_as_many_choices_as_the_shape_of_the_experts_has_lines():
  # Both inputs of the kernel are [32, 128], and only one is cut into blocks.
  idx = _choices(128, 16, 16, unassigned=0.0)
  idx = np.concatenate([idx, np.full_like(idx, 16)], axis=1)
  rows = sort.assignment_rows(
    idx, np.arange(17, dtype=np.int32), interpret=True
  )
  np.testing.assert_array_equal(
    rows[:, :16], idx[:, :16] + np.arange(128)[:, None]
  )
  np.testing.assert_array_equal(rows[:, 16:].ravel(), 16 + np.arange(128 * 16))


def test_every_expert_has_an_address_of_its_own():
  experts = np.arange(1024)
  word, sublane, bit = sort.bit_address(experts)
  assert (word.max(), sublane.max(), bit.max()) == (3, 7, 31)
  assert len(set(zip(word, sublane, bit, strict=True))) == 1024
  # A shift and a mask make 16 experts in order: two on a sublane, low half
  # first.
  line = 256 * word + 16 * (bit % 16) + 2 * sublane + bit // 16
  np.testing.assert_array_equal(line, experts)
  assert sort.bit_address(256 + 16 + 2 + 1) == (1, 1, 17)


@pytest.mark.any_jax
@pytest.mark.parametrize("expert", (0, 7, 8))
def test_all_tokens_on_one_expert_or_on_none(expert):
  _assert_is_oracle(np.full((300, 1), expert, np.int32), 8)


@pytest.mark.any_jax
def test_no_expert_for_any_of_sixteen_choices():
  _assert_is_oracle(np.full((600, 16), 32, np.int32), 32)


def test_the_simulator_finds_no_race():
  idx, e = _choices(2100, 40, 3), 40
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  call = functools.partial(pallas_tpu.sort, by_name=True, interpret=params)
  load, _, inverse = jax.jit(lambda idx: call(idx, e, None))(idx)
  assert not interpret_pallas_call.races.races_found
  expected = oracle.sort_by_expert(idx, e, None, None)
  np.testing.assert_array_equal(inverse, expected[1])
  np.testing.assert_array_equal(load[:e], expected[2])


@pytest.mark.parametrize("capacity", (None, 5))
def test_sort_by_expert_interprets_it(capacity):
  idx = _choices(70, 16, 3, unassigned=0.0)
  mask = np.random.default_rng(1).random(70) < 0.6
  call = functools.partial(
    dispatch.sort_by_expert, implementation="pallas_tpu", interpret=True
  )
  p = conformance.jit_interpreted(call, static_argnums=(1, 3))(
    idx, 16, mask, capacity
  )
  expected = oracle.sort_by_expert(idx, 16, mask, capacity)
  np.testing.assert_array_equal(p.permutation, expected[0])
  np.testing.assert_array_equal(p.inverse_permutation, expected[1])
  np.testing.assert_array_equal(p.group_sizes, expected[2])


def _takes_kernel(implementation=None, t=4, k=2):
  """Whether what `sort_by_expert` traces to has the kernel in it."""
  idx = jax.ShapeDtypeStruct((t, k), jnp.int32)

  # A function of its own, so that nothing is cached.
  def call(idx):
    return api._sort_by_expert.__wrapped__(
      *(idx, None, None, None),
      num_experts=8,
      capacity=None,
      implementation=implementation,
      interpret=False,
    )

  return "jaxroute_rows" in str(jax.make_jaxpr(call)(idx))


@pytest.mark.parametrize(
  ("size", "axis_type", "kind", "takes"),
  (
    (1, AxisType.Auto, "TPU v6 lite", True),
    (1, AxisType.Explicit, "TPU v5 lite", True),
    (8, AxisType.Manual, "TPU v6 lite", True),
    (8, AxisType.Auto, "TPU v6 lite", False),
    (8, AxisType.Explicit, "TPU v6 lite", False),
    (1, AxisType.Auto, "TPU v4", False),
  ),
)
def test_sort_by_expert_takes_it_for_one_new_tpu(size, axis_type, kind, takes):
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(size, axis_type, kind)):
    assert _takes_kernel() == takes
    assert not _takes_kernel("xla")


def test_sort_by_expert_takes_it_for_what_it_counts_exactly():
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, AxisType.Auto)):
    assert _takes_kernel(t=2**23 - 1)
    assert not _takes_kernel(t=2**23)
    assert _takes_kernel(k=128)
    assert not _takes_kernel(k=129)
    with pytest.raises(NotImplementedError, match="at most 128.*got 129"):
      _takes_kernel("pallas_tpu", k=129)


def test_sort_by_expert_takes_it_without_a_mesh_on_one_tpu_only(monkeypatch):
  assert not _takes_kernel()
  monkeypatch.setattr(device, "generation", lambda: 6)
  assert not _takes_kernel()  # Of eight devices, none says which it is for.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert _takes_kernel()
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    assert not _takes_kernel()


def test_on_a_cpu_it_says_why_not_and_what_to_do():
  idx = jnp.zeros((4, 2), jnp.int32)
  with pytest.raises(NotImplementedError) as error:
    dispatch.sort_by_expert(idx, 8, implementation="pallas_tpu")
  for words in (
    "the TPU kernel of `sort_by_expert`",
    "another platform",
    "`interpret=True`",
  ):
    assert words in str(error.value)


def test_over_a_mesh_it_says_why_not_and_what_to_do():
  mesh = tpu_mesh.abstract(8, AxisType.Auto)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(NotImplementedError, match=r"\['data'\].*shard_map"):
      _takes_kernel("pallas_tpu")


@pytest.mark.parametrize(
  ("t", "k", "words"),
  (
    (2**22, 4, "fewer than 16777216 assignments, got 4194304 x 4"),
    (1, 129, "at most 128 in the TPU kernel, got 129"),
  ),
)
def test_unsupported_names_limit_and_value(t, k, words):
  assert words in sort.unsupported(t, k)
  assert sort.unsupported(t - 1, k - 1) is None
