# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order from ranks on GPU, interpreted: the oracle, and XLA's sort."""

import functools

import gpu_mesh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxroute import dispatch, types
from jaxroute.kernels.gpu import order
from jaxroute.kernels.gpu import route as kernel

pytestmark = gpu_mesh.needs_kernels

_order = functools.partial(
  dispatch.sort_by_expert, implementation="pallas_gpu", interpret=True
)


def _choices(t, e, k, seed=0):
  """[T, K] int32: distinct experts, the first more often."""
  rng = np.random.default_rng(seed)
  keys = rng.random((t, e)) + np.arange(e) / (2 * e)
  return np.argsort(keys)[:, :k].astype(np.int32)


def _known(expert_idx, e, counted):
  """Rank and load, as the routing kernel counts them."""
  load = np.bincount(expert_idx[counted].ravel(), minlength=e)
  return dict(rank=oracle.ranks(expert_idx, counted), load=np.int32(load))


@pytest.mark.parametrize(
  ("t", "e", "k", "masked", "capacity"),
  (
    (1, 3, 1, False, None),
    (70, 16, 2, True, 7),
    (300, 5, 5, False, 100),
    (300, 5, 5, True, None),
    (40, 300, 4, True, 1),
  ),
)
def test_it_is_the_order_of_a_sort(t, e, k, masked, capacity):
  expert_idx = _choices(t, e, k)
  mask = np.random.default_rng(1).random(t) < 0.7 if masked else None
  counted = np.ones(t, bool) if mask is None else mask
  known = _known(expert_idx, e, counted)
  ours = jax.tree.map(
    np.asarray, _order(expert_idx, e, mask, capacity, **known)
  )
  rows = ours.group_sizes.sum()
  operands = expert_idx, e, mask, capacity
  by_xla = dispatch.sort_by_expert(*operands, implementation="xla")
  for expected in oracle.sort_by_expert(*operands), jax.tree.leaves(by_xla):
    permutation, _, group_sizes = expected
    np.testing.assert_array_equal(ours.group_sizes, group_sizes)
    np.testing.assert_array_equal(ours.permutation[:rows], permutation[:rows])
  _assert_is_whole(ours)
  # Then what is not counted, then what is dropped, by expert; each in order.
  keys = np.where(counted[:, None], expert_idx, -1).ravel()
  dropped = (keys >= 0) & (known["rank"].ravel() >= (capacity or t))
  last = np.flatnonzero(dropped | (keys < 0))
  expected = last[np.argsort(keys[last], kind="stable")]
  np.testing.assert_array_equal(ours.permutation[rows:], expected)


def _assert_is_whole(permutation):
  """Every assignment has a row, and the inverse is the inverse."""
  n = len(permutation.permutation)
  np.testing.assert_array_equal(
    permutation.permutation[permutation.inverse_permutation], range(n)
  )


def test_of_no_tokens():
  none = np.zeros((0, 2), np.int32)
  ours = _order(none, 4, rank=none, load=np.zeros(4, np.int32))
  assert ours.permutation.shape == ours.inverse_permutation.shape == (0,)
  np.testing.assert_array_equal(ours.group_sizes, [0] * 4)


def test_of_experts_that_are_not_here():
  # Those of a shard of the experts: what is elsewhere is counted with no expert.
  expert_idx, mask = _choices(50, 8, 2) - 2, np.arange(50) % 5 > 0
  is_here = (expert_idx >= 0) & (expert_idx < 4) & mask[:, None]
  keys = np.where(is_here, expert_idx, 4)
  flat = keys.reshape(-1, 1)
  ranks = oracle.ranks(flat, np.ones(100, bool)).reshape(50, 2)
  load = np.bincount(flat.ravel(), minlength=5)[:4]  # int64
  ours = _order(expert_idx, 4, mask, rank=ranks, load=load)
  expected = dispatch.sort_by_expert(expert_idx, 4, mask, implementation="xla")
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("capacity", (None, 3))
def test_wrong_ranks_and_loads_write_nothing_elsewhere(capacity):
  rng, n = np.random.default_rng(0), 600
  expert_idx, wrong = rng.integers(
    -(2**31), 2**31, (2, n // 2, 2), dtype=np.int64
  ).astype(np.int32)
  load = rng.integers(-(2**31), 2**31, 8).astype(np.int32)
  for idx in (expert_idx, expert_idx % 8):
    ours = _order(idx, 8, None, capacity, rank=wrong, load=load)
    inverse = np.asarray(ours.inverse_permutation)
    assert inverse.shape == (n,) and inverse.min() >= 0 and inverse.max() < n
    assert ours.permutation.shape == (n,)


@functools.partial(jax.jit, static_argnames=("config", "lanes", "capacity"))
def _route_and_order(logits, mask, *, config, lanes, capacity):
  out = kernel.route(
    *(logits, None, mask),
    config=config,
    with_rank=True,
    lanes=lanes,
    interpret=True,
  )
  permutation = _order(
    *(out.expert_idx, config.num_experts, out.token_mask, capacity),
    rank=out.rank,
    load=out.load,
  )
  return out, permutation


def test_ranks_of_many_tiles():
  # Tiles of 32 tokens: two short spans of eight, and a part of one.
  t, e, lanes, capacity = 605, 32, 4, 20
  rng = np.random.default_rng(0)
  config = types.RouterConfig(num_experts=e, top_k=2)
  x = (rng.normal(size=(t, e)) + np.arange(e) / 50).astype(np.float32)
  x[rng.random(t) < 0.2] = np.nan
  mask = rng.random(t) < 0.7
  out, ours = jax.tree.map(
    np.asarray,
    _route_and_order(*(x, mask), config=config, lanes=lanes, capacity=capacity),
  )
  np.testing.assert_array_equal(out.token_mask, mask & ~np.isnan(x[:, 0]))
  np.testing.assert_array_equal(
    out.rank, oracle.ranks(out.expert_idx, out.token_mask)
  )
  expected = dispatch.sort_by_expert(
    *(out.expert_idx, e, out.token_mask, capacity), implementation="xla"
  )
  np.testing.assert_array_equal(ours.group_sizes, expected.group_sizes)
  rows = ours.group_sizes.sum()
  assert 0 < rows < out.load.sum()
  np.testing.assert_array_equal(
    ours.permutation[:rows], expected.permutation[:rows]
  )
  _assert_is_whole(ours)


def test_ranks_behind_long_and_short_spans():
  # What the routing kernel gives to `order.rank`, counted here.
  n, e, choices, pitch = 2500, 5, 8, 8
  rng = np.random.default_rng(0)
  expert_idx = rng.integers(0, e, n).astype(np.int32)
  counted = rng.random(n) < 0.8
  keys = np.where(counted, expert_idx, e)
  tiles = -(-n // choices)
  counts = np.zeros((tiles, pitch), np.int32)
  local = np.zeros(n, np.int32)
  for i, key in enumerate(keys):
    local[i] = counts[i // choices, key]
    counts[i // choices, key] += 1
  local = np.where(counted, local, ~local)
  spans = []
  for length, rows in zip(order.SPANS, order.span_rows(tiles), strict=True):
    padded = np.zeros((rows * length, pitch), np.int32)
    padded[:tiles] = counts
    spans.append(padded.reshape(rows, length, pitch).sum(axis=1))
  assert len(spans[1]) > 2
  ranks = order.rank(
    *(jnp.asarray(x) for x in (expert_idx, local, counts.ravel())),
    jnp.asarray(np.int32(np.concatenate(spans)).ravel()),
    num_experts=e,
    tile_choices=choices,
    interpret=True,
  )
  expected = oracle.ranks(keys[:, None], np.ones(n, bool))[:, 0]
  np.testing.assert_array_equal(ranks, expected)


def test_without_rank_or_load_it_cannot_and_none_sorts():
  expert_idx = _choices(10, 4, 2)
  known = _known(expert_idx, 4, np.ones(10, bool))
  for given in ({}, *({name: x} for name, x in known.items())):
    with pytest.raises(NotImplementedError, match="with_rank=True"):
      _order(expert_idx, 4, **given)
    with pytest.raises(NotImplementedError, match="with_rank=True"):
      dispatch.sort_by_expert(
        expert_idx, 4, implementation="pallas_gpu", **given
      )
    jax.tree.map(
      np.testing.assert_array_equal,
      dispatch.sort_by_expert(expert_idx, 4, **given),
      dispatch.sort_by_expert(expert_idx, 4, implementation="xla"),
    )


def test_of_too_many_experts_it_cannot():
  expert_idx = _choices(10, 1025, 2)
  known = _known(expert_idx, 1025, np.ones(10, bool))
  with pytest.raises(NotImplementedError, match="at most 1024, got 1025"):
    _order(expert_idx, 1025, **known)


@pytest.mark.parametrize(
  ("name", "wrong", "words"),
  (
    ("rank", np.zeros((9, 2), np.int32), "T=10"),
    ("rank", np.zeros((10, 3), np.int32), "K=2"),
    ("rank", np.zeros(20, np.int32), "T=10, K=2"),
    ("rank", np.zeros((10, 2), np.float32), "int32"),
    ("load", np.zeros(5, np.int32), "E=4"),
    ("load", np.zeros((4, 1), np.int32), "E=4"),
    ("load", np.zeros(4, np.float32), "int32"),
  ),
)
def test_wrong_shapes_are_said(name, wrong, words):
  expert_idx = _choices(10, 4, 2)
  known = _known(expert_idx, 4, np.ones(10, bool)) | {name: wrong}
  for implementation in (None, "xla", "pallas_gpu"):
    with pytest.raises(ValueError, match=words) as error:
      dispatch.sort_by_expert(
        expert_idx, 4, implementation=implementation, **known
      )
    assert f"`{name}`" in str(error.value)
