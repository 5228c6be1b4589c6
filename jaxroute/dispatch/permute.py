# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Dispatch of tokens to experts and combination of what the experts return.

The N = T * K assignments are put in expert order by one permutation. Those that
no expert receives (padding, tokens with NaN weights, drops) come last, after the
first `sum(group_sizes)` rows, so every shape is static and nothing is lost from
sight: `load - group_sizes` is what was dropped. Dispatch and combine gather by
the permutation or its inverse, forwards and backwards; neither scatters.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import remat, types
from jaxroute.kernels import route_tpu, sort_tpu

# Of a counting sort; the pairwise comparison of longer ones does not fuse on CPU.
_BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Permutation:
  """Assignments in expert order; assignment n is choice n % K of token n // K.

  Attributes:
    permutation: `[N]` int32. Row i of the expert order is assignment
      `permutation[i]`. Assignments of one expert keep the order of the tokens.
    inverse_permutation: `[N]` int32. Assignment n is in row
      `inverse_permutation[n]`.
    group_sizes: `[E]` int32. Rows per expert; the rows after their sum belong
      to no expert.
  """

  permutation: jax.Array
  inverse_permutation: jax.Array
  group_sizes: jax.Array


def expert_capacity(
  config: types.RouterConfig, num_tokens: int, capacity_factor: float
) -> int:
  """Rows that each expert accepts: `ceil(capacity_factor * T * K / E)`.

  Args:
    config: static router description.
    num_tokens: T, of one dispatch.
    capacity_factor: 1.0 leaves no slack over perfect balance.

  Returns:
    C, at least 1.

  Raises:
    ValueError: if `capacity_factor` is not positive and finite.
  """
  if not 0 < capacity_factor < math.inf:
    raise ValueError(
      f"`capacity_factor` must be positive and finite, got {capacity_factor}."
      " Leave the capacity out (None) to drop nothing."
    )
  mean_load = num_tokens * config.top_k / config.num_experts
  return max(1, math.ceil(capacity_factor * mean_load))


@functools.partial(jax.jit, static_argnames=("num_experts", "capacity"))
def sort_by_expert(
  expert_idx: jax.Array,
  num_experts: int,
  token_mask: jax.Array | None = None,
  capacity: int | None = None,
) -> Permutation:
  """Puts the assignments in expert order, stably.

  Args:
    expert_idx: `[T, K]` int32. The chosen experts, distinct within a token;
      an index of E stands for an expert that is not here, and is in no group.
    num_experts: E.
    token_mask: `[T]` bool. Assignments of False tokens come last and are in no
      group. `Routing.token_mask` also leaves out tokens with NaN weights.
    capacity: C. An expert keeps its first C assignments in token order; the
      others are dropped. None drops nothing.

  Returns:
    A `Permutation`, with `group_sizes = min(load, C)`.

  Raises:
    ValueError: if a shape, dtype or `capacity` does not fit.
  """
  if expert_idx.ndim != 2 or not jnp.issubdtype(expert_idx.dtype, jnp.integer):
    raise ValueError(
      "`expert_idx` must be integer [T, K], got"
      f" {expert_idx.dtype} {expert_idx.shape}."
    )
  if capacity is not None and capacity < 1:
    raise ValueError(
      f"`capacity` must be at least 1 row per expert, got {capacity}. Use None"
      " to drop nothing."
    )
  key = expert_idx.astype(jnp.int32)
  if token_mask is not None:
    key = jnp.where(token_mask[:, None], key, num_experts)
  if _tpu_kernel_fits(key):
    load, permutation, inverse = _sort_tpu(key, num_experts, capacity)
  else:
    key = key.reshape(-1)
    load = jnp.zeros(num_experts + 1, jnp.int32).at[key].add(1)
    permutation, inverse = jax.lax.platform_dependent(
      key,
      load,
      cpu=functools.partial(_counting_sort, capacity=capacity),
      default=functools.partial(_packed_sort, capacity=capacity),
    )
  group_sizes = load[:num_experts]
  if capacity is not None:
    group_sizes = jnp.minimum(group_sizes, capacity)
  return Permutation(
    permutation=remat.name("permutation", permutation),
    inverse_permutation=remat.name("inverse_permutation", inverse),
    group_sizes=remat.name("group_sizes", group_sizes),
  )


def _tpu_kernel_fits(key):
  """Whether to count by the kernel: on one TPU, which XLA does not partition."""
  t, k = key.shape
  exact = t * k < sort_tpu.MAX_ASSIGNMENTS and k <= sort_tpu.MAX_TOP_K
  if not exact or not route_tpu.runs_here():
    return False
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  return mesh.are_all_axes_manual or mesh.size == 1


def _sort_tpu(key, num_experts, capacity, interpret=False):
  """Load, permutation and inverse of `[T, K]` keys.

  The inverse is counted. The permutation is sorted all the same: to invert the
  inverse is a scatter, 55 cycles per token on v6e where the sort of words is 2.
  """
  count = functools.partial(
    sort_tpu.count, num_experts=num_experts, interpret=interpret
  )
  rows = functools.partial(sort_tpu.rows, interpret=interpret)
  if capacity is not None:
    zeros = jnp.zeros(num_experts + 1, jnp.int32)
    rank = rows(*vary_alike((key, zeros)))
    key = jnp.where(rank < capacity, key, num_experts)
  load = count(key)
  inverse = rows(key, jnp.cumsum(load) - load).reshape(-1)
  n = key.size
  order = jnp.arange(n, dtype=jnp.int32)
  _, permutation = _sort_pairs(key.reshape(-1), order, num_experts + 1, n)
  return load, permutation, inverse


def _packed_sort(key, load, capacity):
  """The stable sorting permutation of `key` `[N]`, and its inverse.

  On accelerators a sort of single words beats one of pairs by 4 to 1, and a
  scatter by far more.
  """
  n, last = key.shape[0], load.shape[0] - 1
  order = jnp.arange(n, dtype=jnp.int32)
  key, permutation = _sort_pairs(key, order, last + 1, n)
  if capacity is not None:
    is_first = jnp.diff(key, prepend=-1) != 0
    rank = order - jax.lax.cummax(jnp.where(is_first, order, 0))
    key = jnp.where(rank < capacity, key, last)
    _, permutation = _sort_pairs(key, permutation, last + 1, n)
  _, inverse = _sort_pairs(permutation, order, n, n)
  return permutation, inverse


def _sort_pairs(major, minor, majors, minors):
  """Sorts distinct pairs from `[0, majors) x [0, minors)`, as words if they fit."""
  bits = max(minors - 1, 0).bit_length()
  if bits + max(majors - 1, 0).bit_length() > 32:
    return jax.lax.sort((major, minor), num_keys=2, is_stable=False)
  word = (major.astype(jnp.uint32) << bits) | minor.astype(jnp.uint32)
  word = jax.lax.sort(word, is_stable=False)
  minor = word & np.uint32((1 << bits) - 1)
  return (word >> bits).astype(jnp.int32), minor.astype(jnp.int32)


def _counting_sort(key, load, capacity):
  """As `_packed_sort`; a row is its bucket's end less the equal keys from it on.

  Those are counted per block of keys, by a running sum over the blocks, and
  within a block pair by pair.
  """
  n = key.shape[0]
  pad = -n % _BLOCK
  last = load.shape[0] - 1
  start = jnp.cumsum(load) - load
  blocks = jnp.pad(key, (0, pad), constant_values=last).reshape(-1, _BLOCK)
  rows = jnp.arange(blocks.shape[0])[:, None]
  counts = jnp.zeros((blocks.shape[0], load.shape[0]), jnp.int32)
  counts = counts.at[rows, blocks].add(1, mode="promise_in_bounds")
  ends = jax.lax.associative_scan(jnp.add, counts)
  ends = ends + start[None, :]
  equal = blocks[:, :, None] == blocks[:, None, :]
  not_before = jnp.tril(jnp.ones((1, _BLOCK, _BLOCK), jnp.bool_))
  behind = jnp.sum(equal & not_before, axis=1, dtype=jnp.int32)
  end = ends.at[rows, blocks].get(mode="promise_in_bounds")
  inverse = (end - behind).reshape(-1)[:n]
  if capacity is not None:
    key = jnp.where(inverse - start[key] < capacity, key, last)
    load = jnp.zeros_like(load).at[key].add(1)
    return _counting_sort(key, load, None)
  permutation = (
    jnp.zeros_like(inverse)
    .at[inverse]
    .set(
      jnp.arange(n, dtype=jnp.int32),
      unique_indices=True,
      mode="promise_in_bounds",
    )
  )
  return permutation, inverse


def dispatch(x: jax.Array, permutation: Permutation) -> jax.Array:
  """Copies every token to the rows of its experts.

  Args:
    x: `[T, D]`. Tokens.
    permutation: from `sort_by_expert`, of T * K assignments.

  Returns:
    `[N, D]`, rows in expert order. Rows past `sum(group_sizes)` belong to no
    expert and are arbitrary; their gradient is not read.

  Raises:
    ValueError: if T does not divide the N assignments.
  """
  n = permutation.permutation.shape[0]
  if x.ndim != 2 or n % max(x.shape[0], 1):
    raise ValueError(
      f"`x` must be [T, D] and T divide the N={n} assignments of `permutation`,"
      f" got {x.shape}. Sort and dispatch the same tokens."
    )
  with jax.named_scope("jaxroute.dispatch"):
    return _dispatch(*vary_alike((x, permutation)))


def combine(
  rows: jax.Array, weights: jax.Array, permutation: Permutation
) -> jax.Array:
  """Sums what a token's experts returned, by the routing weights.

  Args:
    rows: `[N, D]`. Expert outputs in expert order; rows past
      `sum(group_sizes)` are not read.
    weights: `[T, K]` float32. Routing weights; NaN weights give a NaN token.
    permutation: the one that `dispatch` used.

  Returns:
    `[T, D]`, the dtype of `rows`; sums in float32. A dropped assignment adds
    nothing.

  Raises:
    ValueError: if `rows` and `weights` are not of the N assignments.
  """
  n = permutation.permutation.shape[0]
  if rows.ndim != 2 or rows.shape[0] != n or weights.ndim != 2:
    raise ValueError(
      f"`rows` must be [N={n}, D] and `weights` [T, K], got {rows.shape} and"
      f" {weights.shape}. Pass the permutation that `dispatch` used."
    )
  if weights.size != n or weights.dtype != jnp.float32:
    raise ValueError(
      f"`weights` must be float32 [T, K] with T * K = N = {n}, got"
      f" {weights.dtype} {weights.shape}."
    )
  with jax.named_scope("jaxroute.combine"):
    return _combine(*vary_alike((rows, weights, permutation)))


def vary_alike(tree: types.PyTree) -> types.PyTree:
  """Marks arrays as varying over every mesh axis that one of them varies over.

  Inside `jax.shard_map`, functions with a derivative of their own get and return
  arrays of one varying type; the sums over the mesh are left to the transpose of
  the mark.

  Args:
    tree: pytree of arrays.

  Returns:
    The same values; unchanged outside `jax.shard_map`.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = set().union(*map(varying, jax.tree.leaves(tree)))

  def mark(x):
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(mark, tree)


def _slots(permutation, t):
  """Row of every assignment `[T, K]`, and which are in a group."""
  slots = permutation.inverse_permutation.reshape(t, -1)
  kept = slots < jnp.sum(permutation.group_sizes)
  return jnp.where(kept, slots, 0), kept


def _take(x, idx):
  return x.at[idx].get(mode="promise_in_bounds")


# The transpose of a gather is a scatter-add: slow, and with atomics not the same
# in every run. Each assignment has one row, so the inverse is a gather as well.


@jax.custom_vjp
def _dispatch(x, permutation):
  n, t = permutation.permutation.shape[0], x.shape[0]
  return _take(x, permutation.permutation // max(n // max(t, 1), 1))


def _dispatch_fwd(x, permutation):
  return _dispatch(x, permutation), (permutation, x[:, :0])


def _dispatch_bwd(residuals, d_rows):
  permutation, like = residuals
  t, n = like.shape[0], d_rows.shape[0]
  if n == 0:
    return jnp.zeros((t, d_rows.shape[1]), d_rows.dtype), None
  slots, kept = _slots(permutation, t)
  total = jnp.zeros((t, d_rows.shape[1]), jnp.float32)
  for k in range(n // t):
    rows = _take(d_rows, slots[:, k]).astype(jnp.float32)
    total += jnp.where(kept[:, k, None], rows, 0.0)
  return total.astype(d_rows.dtype), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows, weights, permutation):
  t, k = weights.shape
  total = jnp.zeros((t, rows.shape[1]), jnp.float32)
  if rows.shape[0] == 0:
    return total.astype(rows.dtype)
  slots, kept = _slots(permutation, t)
  weights = jnp.where(kept | jnp.isnan(weights), weights, 0.0)
  for i in range(k):
    part = _take(rows, slots[:, i]).astype(jnp.float32)
    part = jnp.where(kept[:, i, None], part, 0.0)
    total += part * weights[:, i, None]
  return total.astype(rows.dtype)


def _combine_fwd(rows, weights, permutation):
  return _combine(rows, weights, permutation), (rows, weights, permutation)


def _combine_bwd(residuals, d_out):
  rows, weights, permutation = residuals
  t, k = weights.shape
  if rows.shape[0] == 0:
    return jnp.zeros_like(rows), jnp.zeros_like(weights), None
  d_out = d_out.astype(jnp.float32)
  assignment = permutation.permutation
  row = jnp.arange(rows.shape[0], dtype=jnp.int32)
  owned = row < jnp.sum(permutation.group_sizes)
  d_rows = _take(d_out, assignment // k)
  d_rows = d_rows * _take(weights.reshape(-1), assignment)[:, None]
  d_rows = jnp.where(owned[:, None], d_rows, 0.0).astype(rows.dtype)
  slots, kept = _slots(permutation, t)
  d_weights = [
    jnp.sum(_take(rows, slots[:, i]).astype(jnp.float32) * d_out, axis=1)
    for i in range(k)
  ]
  return d_rows, jnp.where(kept, jnp.stack(d_weights, axis=1), 0.0), None


_combine.defvjp(_combine_fwd, _combine_bwd)
