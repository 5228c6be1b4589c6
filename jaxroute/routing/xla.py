# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`route` in plain XLA: it runs on every platform and takes every `RouterConfig`.

The largest keys are found in rounds, of which each reads little. On an NVIDIA GPU
that is fast for many keys and slow for few, as a round takes some launches of 2 us
or more: few keys are sorted there. The choice is made when a trace is lowered.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxroute import remat, types
from jaxroute import scores as scores_lib
from jaxroute.parallel import mesh
from jaxroute.routing import bias_histogram, float_keys, weights

# Above so many rounds one sort is faster, and quicker to compile.
_MAX_ROUNDS = 16
# Keys whose largest is kept as one head; see `_largest`.
_HEAD_KEYS = 8
# On CUDA fewer keys are sorted. With sorts of keys and groups DeepSeek-V3's router
# (E = 256) took 67, 130 and 1,568 us at T = 16, 4,096 and 65,536, by rounds 274, 300
# and 416 us (H100, jax 0.11.2, 2026-11-26): they met near T = 12,000, and meet later
# now that no groups are sorted.
_FEW_KEYS = 2**22

_Out = TypeVar("_Out")


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> types.Routing:
  """See `jaxroute.route`, which checks the arguments."""
  keys = _selection_keys(logits, expert_bias, config)
  expert_idx, cutoff = _select(keys, config)
  expert_idx = remat.checkpoint_name("expert_idx", expert_idx)
  routing_weights, token_mask = weights.weigh(
    logits, expert_idx, config, token_mask
  )
  histogram = None
  if config.histogram:
    selection = float_keys.from_keys(keys)
    histogram = bias_histogram.count(selection, expert_idx, cutoff, token_mask)
  load = _count_load(expert_idx, token_mask, config.num_experts)
  return types.Routing(
    expert_idx=expert_idx,
    weights=remat.checkpoint_name("weights", routing_weights),
    counts=types.Counts(load=load, histogram=histogram),
    cutoff=cutoff,
    token_mask=token_mask,
  )


def _selection_keys(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
) -> jax.Array:
  """`[T, E]` int32: keys of the selection scores; outside the best groups, of -inf."""
  selection = scores_lib.selection_scores(logits, expert_bias, config)
  # XLA may compute a value anew in every fusion that reads it, with other bits.
  keys = jax.lax.optimization_barrier(float_keys.to_keys(selection))
  if not config.limits_groups:
    return keys
  return _by_number(
    keys,
    few=functools.partial(_keep_best_groups_of_few, config=config),
    many=functools.partial(_keep_best_groups, config=config),
  )


def _by_number(
  keys: jax.Array,
  few: Callable[[jax.Array], _Out],
  many: Callable[[jax.Array], _Out],
) -> _Out:
  """`few(keys)` on CUDA if there are few, else `many(keys)`: the same results."""
  # A symbolic number may be small, where `many` loses most.
  if isinstance(keys.shape[0], int) and keys.size >= _FEW_KEYS:
    return many(keys)
  return jax.lax.platform_dependent(keys, cuda=few, default=many)


def _select(
  keys: jax.Array, config: types.RouterConfig
) -> tuple[jax.Array, jax.Array]:
  """The K best experts `[T, K]`, and the (K+1)-th selection score `[T]`."""
  k = config.top_k
  count = min(k + 1, config.num_experts)
  top, idx = _by_number(
    keys,
    few=functools.partial(_sort, count=count),
    many=functools.partial(_largest, count=count),
  )
  if k < config.num_experts:
    cutoff = float_keys.from_keys(top[:, k])
  else:
    cutoff = jnp.full_like(float_keys.from_keys(top[:, 0]), -jnp.inf)
  return idx[:, :k], cutoff


def _keep_best_groups(keys: jax.Array, config: types.RouterConfig) -> jax.Array:
  """Sets the keys outside the best `group_top_k` groups to that of -inf."""
  t = keys.shape[0]
  grouped = keys.reshape(t, config.num_groups, config.group_size)
  best = float_keys.from_keys(_largest(grouped, config.group_score_count)[0])
  score_keys = float_keys.to_keys(_group_score(best))
  score_keys = jax.lax.optimization_barrier(score_keys)
  _, kept = _largest(score_keys, config.group_top_k)
  keep = jnp.any(kept[..., None] == _iota(config.num_groups, 3), axis=1)
  return jnp.where(keep[..., None], grouped, _masked_key()).reshape(keys.shape)


def _keep_best_groups_of_few(
  keys: jax.Array, config: types.RouterConfig
) -> jax.Array:
  """`_keep_best_groups` in four launches on CUDA, where it does not sort.

  A group is kept if fewer than `group_top_k` groups come before it.
  """
  t, g = keys.shape[0], config.num_groups
  grouped = keys.reshape(t, g, config.group_size)
  best = _largest_keys(grouped, config.group_score_count)
  score = _group_score(float_keys.from_keys(best))
  before = jnp.zeros_like(score, jnp.int32)
  for i in range(g):
    other = score[:, i : i + 1]
    wins = (other > score) | ((other == score) & (_iota(g, 2) > i))
    before = before + wins.astype(jnp.int32)
  # Where the groups are one axis of the result, a sort after it has to copy.
  keep = jnp.repeat(before < config.group_top_k, config.group_size, axis=1)
  return jnp.where(keep, keys, _masked_key())


def _group_score(best: jax.Array) -> jax.Array:
  """`[T, G]`: the sum of the best selection scores of groups, `[T, G, n]`."""
  score = best[..., 0]
  for i in range(1, best.shape[-1]):
    score = score + best[..., i]
  # inf + -inf is NaN: a group with an infinite member is the best there is.
  return jnp.where(best[..., 0] == jnp.inf, jnp.inf, score)


def _masked_key() -> jax.Array:
  """The key of an expert that is not to be chosen."""
  return float_keys.to_keys(jnp.float32(-jnp.inf))


def _largest_keys(keys: jax.Array, count: int) -> jax.Array:
  """The `count` largest of `[..., n]` keys, in one reduction, best first."""

  def merge(
    a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
  ) -> tuple[jax.typing.ArrayLike, ...]:
    # The i-th largest of two sorted lists.
    merged = []
    for i in range(count):
      pairs = (jnp.minimum(a[j], b[i - 1 - j]) for j in range(i))
      merged.append(
        functools.reduce(jnp.maximum, pairs, jnp.maximum(a[i], b[i]))
      )
    return tuple(merged)

  below_all = jnp.int32(float_keys.BELOW_ALL)
  lists = (keys, *[jnp.full_like(keys, below_all)] * (count - 1))
  largest = jax.lax.reduce(lists, (below_all,) * count, merge, (keys.ndim - 1,))
  return jnp.stack(largest, axis=-1)


def _largest(keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The `count` largest of `[..., n]` keys and their indices, best first.

  One round per result. `heads` holds the largest key left in each block, so a
  round reads n / 8 heads and one block instead of n keys. Equal keys come in
  index order, so the keys left are those after the last result.
  """
  if count > _MAX_ROUNDS:
    return _sort(keys, count)
  n = keys.shape[-1]
  pad = [(0, 0)] * (keys.ndim - 1) + [(0, -n % _HEAD_KEYS)]
  keys = jnp.pad(keys, pad, constant_values=float_keys.BELOW_ALL)
  blocks = keys.reshape(*keys.shape[:-1], -(-n // _HEAD_KEYS), _HEAD_KEYS)
  heads = jnp.max(blocks, axis=-1)
  lane = _iota(_HEAD_KEYS, keys.ndim)
  block_idx = _iota(heads.shape[-1], keys.ndim)
  last, idx = jnp.iinfo(jnp.int32).max, -1
  tops, indices = [], []
  for _ in range(count):
    top = jnp.max(heads, axis=-1, keepdims=True)
    block = _first(heads == top)
    block_keys = jnp.take_along_axis(
      blocks, block[..., None], axis=-2, mode="promise_in_bounds"
    )[..., 0, :]
    key_idx = block * _HEAD_KEYS + lane
    is_left = (block_keys < last) | ((block_keys == last) & (key_idx > idx))
    block_keys = jnp.where(is_left, block_keys, float_keys.BELOW_ALL)
    hit = _first(block_keys == top)
    rest = jnp.where(lane == hit, float_keys.BELOW_ALL, block_keys)
    rest = jnp.max(rest, axis=-1, keepdims=True)
    heads = jnp.where(block_idx == block, rest, heads)
    last, idx = top, block * _HEAD_KEYS + hit
    tops.append(top)
    indices.append(idx)
  return jnp.concatenate(tops, axis=-1), jnp.concatenate(indices, axis=-1)


def _sort(keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """`_largest`, by a sort: for so few keys XLA has nothing else on CUDA."""
  top, idx = jax.lax.top_k(keys, count)
  return top, idx


def _first(flags: jax.Array) -> jax.Array:
  """Index of the first True of the last axis, which is kept with size 1."""
  n = flags.shape[-1]
  # A select between unsharded operands would lose the sharding; a product keeps
  # it.
  from_end = flags.astype(jnp.int32) * (n - _iota(n, flags.ndim))
  return n - jnp.max(from_end, axis=-1, keepdims=True)


def _iota(n: int, ndim: int) -> jax.Array:
  """0 to n - 1 along the last of `ndim` axes."""
  return jnp.arange(n, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (n,))


def _count_load(
  expert_idx: jax.Array, token_mask: jax.Array, num_experts: int
) -> jax.Array:
  """`[E]` int32: assignments per expert, over every device that holds tokens."""
  load = jnp.zeros(num_experts, jnp.int32)
  ones = jnp.broadcast_to(token_mask[:, None], expert_idx.shape)
  return load.at[expert_idx].add(
    ones.astype(jnp.int32),
    mode="promise_in_bounds",
    # Under explicit sharding the sum over shards has to be asked for.
    out_sharding=mesh.replicated_like(expert_idx),
  )
