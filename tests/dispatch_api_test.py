# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`sort_by_expert` against the oracle, and the capacity of experts."""

import functools
import math

import cases
import conformance
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from jaxroute import dispatch, types
from jaxroute.dispatch import xla

pytestmark = pytest.mark.optimized

_sort = jax.jit(
  dispatch.sort_by_expert, static_argnames=("num_experts", "capacity")
)


def _choices(t, e, k, seed=0):
  rng = np.random.default_rng(seed)
  return np.argsort(rng.random((t, e)), axis=1)[:, :k].astype(np.int32)


def _assert_is_oracle(idx, e, mask=None, capacity=None):
  p = _sort(idx, e, mask, capacity)
  expected = oracle.sort_by_expert(idx, e, mask, capacity)
  np.testing.assert_array_equal(p.permutation, expected[0])
  np.testing.assert_array_equal(p.inverse_permutation, expected[1])
  np.testing.assert_array_equal(p.group_sizes, expected[2])
  assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(p))


@pytest.mark.parametrize("shape", conformance.rows(cases.SHAPES))
def test_sort_is_the_oracle(shape):
  t, e, k = shape
  mask = np.random.default_rng(1).random(t) < 0.6
  _assert_is_oracle(_choices(t, e, k), e)
  _assert_is_oracle(_choices(t, e, k), e, mask)
  _assert_is_oracle(_choices(t, e, k), e, mask, capacity=2)


@pytest.mark.parametrize("capacity", (None, 2))
@pytest.mark.parametrize("dtype", (np.int32, np.int8))
def test_an_index_of_no_expert_comes_last_and_is_in_no_group(dtype, capacity):
  limits = np.iinfo(dtype)
  idx = np.array(
    [[-1, 0], [1, 4], [5, 2], [limits.max, 1], [limits.min, 1]], dtype
  )
  _assert_is_oracle(idx, 4, capacity=capacity)
  p = _sort(idx, 4, None, capacity)
  assert p.group_sizes.sum() == (5 if capacity is None else 4)


def test_every_token_on_the_same_experts():
  idx = np.tile(np.array([[3, 1]], np.int32), (50, 1))
  _assert_is_oracle(idx, 4)
  _assert_is_oracle(idx, 4, capacity=7)
  _assert_is_oracle(idx, 4, mask=np.zeros(50, bool))


def test_capacity_keeps_the_first_tokens():
  idx = np.array([[0], [0], [1], [0]], np.int32)
  p = _sort(idx, 2, None, 2)
  np.testing.assert_array_equal(p.permutation, [0, 1, 2, 3])
  np.testing.assert_array_equal(p.group_sizes, [2, 1])


@pytest.mark.any_jax
@pytest.mark.parametrize("capacity", (None, 3))
@pytest.mark.parametrize("n", (0, 1, 31, 32, 33, 1000))
def test_both_algorithms_agree(n, capacity):
  rng = np.random.default_rng(n)
  key = jnp.asarray(rng.integers(0, 7, n), jnp.int32)
  load = jnp.bincount(key, length=7)
  counted, packed = (
    jax.jit(functools.partial(sort, capacity=capacity))(key, load)
    for sort in (xla._counting_sort, xla._packed_sort)
  )
  jax.tree.map(np.testing.assert_array_equal, counted, packed)
  if capacity is None:
    expected = np.argsort(np.asarray(key), stable=True)
    np.testing.assert_array_equal(counted[0], expected)


@pytest.mark.any_jax
@pytest.mark.parametrize("majors", (2**16, 2**16 + 1, 2**31 - 1))
def test_pairs_that_fit_a_word_or_not_sort_alike(majors):
  rng = np.random.default_rng(0)
  major = rng.integers(0, majors, 50).astype(np.int32) // 5 * 5
  major[0], minor = majors - 1, rng.permutation(2**16)[:50].astype(np.int32)
  minor[0] = 2**16 - 1
  order = np.lexsort((minor, major))
  got = jax.jit(xla.sort_pairs, static_argnums=(2, 3))(
    major, minor, majors, 2**16
  )
  np.testing.assert_array_equal(got, (major[order], minor[order]))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=30)
def test_permutation_is_a_stable_bijection(data):
  seed = data.draw(st.integers(0, 2**31))
  rng = np.random.default_rng(seed)
  idx, mask = _choices(37, 16, 3, seed), rng.random(37) < 0.8
  p = _sort(idx, 16, mask, None)
  permutation = np.asarray(p.permutation)
  np.testing.assert_array_equal(
    permutation[np.asarray(p.inverse_permutation)], np.arange(37 * 3)
  )
  key = np.where(mask[:, None], idx, 16).reshape(-1)[permutation]
  assert np.all(np.diff(key) >= 0)
  assert np.all(np.diff(permutation)[np.diff(key) == 0] > 0)
  assert p.group_sizes.sum() == 3 * mask.sum()


@pytest.mark.devices(8)
def test_shard_map_and_vmap_sort_every_shard():
  idx = _choices(64, 16, 3)
  mesh = jax.make_mesh((8,), ("data",))
  tokens = jax.P("data")

  def permutation(idx):
    return dispatch.sort_by_expert(idx, 16, capacity=2).permutation

  mapped = jax.jit(
    jax.shard_map(
      permutation,
      mesh=mesh,
      in_specs=tokens,
      out_specs=tokens,
      check_vma=True,
    )
  )(jax.device_put(idx, jax.NamedSharding(mesh, tokens)))
  mapped = np.asarray(mapped)
  batched = jax.jit(jax.vmap(permutation))(idx.reshape(8, 8, 3))
  for i in range(8):
    shard = idx[8 * i : 8 * i + 8]
    expected = oracle.sort_by_expert(shard, 16, capacity=2)[0]
    np.testing.assert_array_equal(mapped[24 * i : 24 * i + 24], expected)
    np.testing.assert_array_equal(batched[i], expected)


@pytest.mark.parametrize(("platform", "sorts"), (("cpu", 0), ("tpu", 2)))
def test_the_platform_picks_the_algorithm(platform, sorts):
  traced = jax.jit(lambda i: dispatch.sort_by_expert(i, 8)).trace(
    jnp.zeros((4, 2), jnp.int32)
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.sort") == sorts


def test_xla_has_nothing_to_interpret():
  idx = jnp.zeros((4, 2), jnp.int32)
  with pytest.raises(NotImplementedError, match="no kernel to interpret.*True"):
    dispatch.sort_by_expert(idx, 8, implementation="xla", interpret=True)


def test_an_unknown_implementation_is_refused():
  idx = jnp.zeros((4, 2), jnp.int32)
  with pytest.raises(ValueError, match="`implementation`.*'pallas_tpu'.*'tpu'"):
    dispatch.sort_by_expert(idx, 8, implementation="tpu")


@pytest.mark.parametrize(
  ("idx", "capacity", "words"),
  (
    (np.zeros(3, np.int32), None, ("expert_idx", "(3,)", "[T, K]")),
    (np.zeros((3, 2), np.float32), None, ("expert_idx", "float32", "integer")),
    (np.zeros((3, 2), np.int32), 0, ("capacity", "got 0", "Use None")),
  ),
)
def test_errors_name_argument_value_and_fix(idx, capacity, words):
  with pytest.raises(ValueError) as error:
    dispatch.sort_by_expert(idx, 8, capacity=capacity)
  for word in words:
    assert word in str(error.value)


CONFIG = types.RouterConfig(num_experts=8, top_k=2)


@pytest.mark.parametrize(
  "num_tokens, factor, rows",
  [(64, 1.0, 16), (64, 1.25, 20), (65, 1.0, 17), (1, 1.0, 1), (0, 1.0, 1)],
)
def test_capacity_rounds_up(num_tokens, factor, rows):
  assert dispatch.expert_capacity(CONFIG, num_tokens, factor) == rows


@pytest.mark.parametrize("kind", (float, np.float32, jnp.float32))
def test_a_capacity_factor_is_what_it_is_written_as(kind):
  capacity = functools.partial(dispatch.expert_capacity, CONFIG)
  assert capacity(200, kind(1.1)) == 55
  assert capacity(200_000_000, kind(1.1)) == 55_000_000
  assert capacity(1200, kind(4 / 3)) == 400
  assert capacity(1200, kind(5 / 3)) == 500
  assert capacity(1201, kind(5 / 3)) == 501


@pytest.mark.parametrize("kind", (float, np.float32))
def test_a_capacity_factor_keeps_all_digits(kind):
  config = types.RouterConfig(num_experts=8, top_k=8)
  assert dispatch.expert_capacity(config, 10**7, kind(1.000001)) == 10_000_010
  assert dispatch.expert_capacity(config, 10**6, kind(1.000004)) == 1_000_004
  assert dispatch.expert_capacity(config, 10**7, kind(1e-6)) == 10


def test_a_capacity_that_nothing_reaches_drops_nothing():
  assert dispatch.expert_capacity(CONFIG, 8, 1e30) == 2**31 - 1
  idx = jnp.array([[0, 1], [0, 2]], jnp.int32)
  for capacity in (2**31 - 1, 2**31, 2**70):
    order = dispatch.sort_by_expert(idx, 4, capacity=capacity)
    np.testing.assert_array_equal(order.group_sizes, [2, 1, 1, 0])


@pytest.mark.parametrize("factor", (0.0, -1.0, math.inf, math.nan))
def test_impossible_capacity_factors_are_refused(factor):
  with pytest.raises(ValueError, match=f"`capacity_factor`.*{factor}"):
    dispatch.expert_capacity(CONFIG, 8, factor)


@pytest.mark.parametrize("dtype", (np.int64, np.uint32, np.uint64))
def test_an_index_of_more_bits_becomes_no_other_expert(dtype):
  far = 2**31 if dtype == np.uint32 else 2**32
  order = dispatch.sort_by_expert(np.array([[far, 1]], dtype), 4)
  np.testing.assert_array_equal(order.group_sizes, [0, 1, 0, 0])
  np.testing.assert_array_equal(order.permutation, [1, 0])
