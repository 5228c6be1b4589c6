# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How balanced a load is. Every function reduces the expert axis, the last one.

MaxVio has two readings (Wang et al., 2024): "batch", of one training batch, and
"global", of a whole validation set. Both are `max_vio`: of the load of the
batch, or of the loads summed over the set.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import checks, types


def violation(load: jax.Array) -> jax.Array:
  """`(load - mean) / mean`, the scale-free subgradient of the dual.

  The sign is exact for all counts, because the mean is split into quotient and
  remainder before anything becomes float32.

  Args:
    load: `[..., E]` int32. Assignments per expert, summed over all devices.

  Returns:
    `[..., E]` float32; 0 where nothing was counted.

  Raises:
    ValueError: if `load` is a scalar or does not hold int32 or int64.

  Example:
    >>> violation(jnp.array([3, 1, 1, 3]))
    Array([ 0.5, -0.5, -0.5,  0.5], dtype=float32)
  """
  quotient, rest = mean_load(load)
  fraction = rest.astype(jnp.float32) / load.shape[-1]
  mean = quotient.astype(jnp.float32) + fraction
  difference = (load - quotient).astype(jnp.float32) - fraction
  return jnp.where(mean == 0, 0.0, difference / jnp.where(mean == 0, 1.0, mean))


def mean_load(load: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean L = T K / E of a load, exactly: `quotient + rest / E`.

  Args:
    load: `[..., E]` int32. Assignments per expert, summed over all devices.

  Returns:
    `quotient` and `rest`, both `[..., 1]` int32; `0 <= rest < E`. Of int64 counts
    they are int64, and of NumPy's they are NumPy's.

  Raises:
    ValueError: if `load` is a scalar or does not hold int32 or int64.

  Example:
    >>> quotient, rest = mean_load(jnp.array([3, 1, 1, 4]))
    >>> int(quotient[0]), int(rest[0])
    (2, 1)
  """
  _check_counts("load", load)
  # JAX would wrap the counts of a long evaluation, which NumPy sums as int64.
  xp, dtype, e = load.__array_namespace__(), load.dtype, load.shape[-1]
  # Quotients are summed, because the sum of the counts may not fit an int32.
  rest = xp.sum(load % e, axis=-1, keepdims=True, dtype=dtype)
  quotient = xp.sum(load // e, axis=-1, keepdims=True, dtype=dtype)
  quotient += rest // e
  return quotient, rest % e


def total(counts: jax.Array) -> jax.Array:
  """The sum of counts over experts, which itself may not fit an int32.

  Args:
    counts: `[..., E]` int32.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if `counts` is a scalar or does not hold int32 or int64.

  Example:
    >>> total(jnp.full(4, 2**30))
    Array(4.2949673e+09, dtype=float32)
  """
  _check_counts("counts", counts)
  return jnp.sum(counts.astype(jnp.float32), axis=-1)


def max_vio(load: types.PyTree) -> jax.Array:
  """Maximal violation: how far the busiest expert is above the mean load.

  Args:
    load: `[..., E]` int32. Assignments per expert, summed over all devices. Or
      what holds such arrays: a `Routing`, an `MoEOutput`, `Counts`, a
      `RouterState`, a Flax collection, a list of these.

  Returns:
    `[...]` float32, from 0 (balanced, or nothing counted) to E / K - 1. Of a
    collection or a list `[Lyr]`: of one layer after the other.

  Raises:
    ValueError: if a load is a scalar or does not hold int32 or int64, or there is
      none.

  Example:
    >>> max_vio(jnp.array([3, 1, 1, 3]))
    Array(0.5, dtype=float32)

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, section 4.1.
  """
  holders = (types.Routing, types.Counts, types.RouterState)

  def load_of(x: Any) -> types.PyTree:
    if isinstance(x, types.MoEOutput):
      return x.routing.load
    return x.load if isinstance(x, holders) else x

  loads = jax.tree.map(
    load_of, load, is_leaf=lambda x: isinstance(x, (types.MoEOutput, *holders))
  )
  arrays = jax.tree.leaves(loads)
  if not arrays or not all(hasattr(x, "dtype") for x in arrays):
    raise ValueError(
      "`load` must be integer [..., E], or hold such arrays, got a"
      f" {type(load).__name__} of {[type(x).__name__ for x in arrays]}. Pass the"
      " counts of `jaxroute.route` or of a layer."
    )
  if isinstance(loads, Mapping) and "histogram" in loads:
    raise ValueError(
      f"`load` must hold loads only, got the collections {sorted(loads)}. Pass"
      ' `counted["load"]`, or `jaxroute.linen.counts(counted)`.'
    )
  values = [jnp.max(violation(x), axis=-1) for x in arrays]
  if loads is arrays[0]:
    return values[0]
  return jnp.concatenate([x.reshape(-1) for x in values])


def coefficient_of_variation(load: jax.Array) -> jax.Array:
  """Standard deviation of the load over its mean.

  Args:
    load: `[..., E]` int32.

  Returns:
    `[...]` float32; 0 if balanced or nothing was counted.

  Raises:
    ValueError: if `load` is a scalar or does not hold int32 or int64.

  Example:
    >>> coefficient_of_variation(jnp.array([3, 1, 1, 3]))
    Array(0.5, dtype=float32)
  """
  return jnp.sqrt(jnp.mean(violation(load) ** 2, axis=-1))


def load_entropy(load: jax.Array) -> jax.Array:
  """Entropy of the load's distribution over experts, relative to uniform.

  Args:
    load: `[..., E]` int32.

  Returns:
    `[...]` float32 in `[0, 1]`: 1 if balanced, as a single expert always is; 0
    if one of several experts got all, or nothing was counted.

  Raises:
    ValueError: if `load` is a scalar or does not hold int32 or int64.

  Example:
    >>> load_entropy(jnp.array([2, 2, 0, 0]))
    Array(0.5, dtype=float32)
  """
  _check_counts("load", load)
  e = load.shape[-1]
  share = load.astype(jnp.float32) / jnp.maximum(total(load), 1.0)[..., None]
  # A dead expert has no share, and 0 log 0 is NaN.
  logarithm = jnp.log(jnp.where(share > 0, share, 1.0))
  entropy = -jnp.sum(share * logarithm, axis=-1)
  relative = entropy / math.log(e) if e > 1 else jnp.ones_like(entropy)
  # Rounding must not leave the range.
  relative = jnp.clip(relative, 0.0, 1.0)
  return jnp.where(jnp.any(load > 0, axis=-1), relative, 0.0)


def dead_experts(load: jax.Array) -> jax.Array:
  """Number of experts that received nothing.

  Args:
    load: `[..., E]` int32.

  Returns:
    `[...]` int32.

  Raises:
    ValueError: if `load` is a scalar or does not hold int32 or int64.

  Example:
    >>> dead_experts(jnp.array([3, 0, 0, 1]))
    Array(2, dtype=int32)
  """
  _check_counts("load", load)
  return jnp.sum(load == 0, axis=-1, dtype=jnp.int32)


def drop_fraction(load: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Share of the assignments that were routed but not dispatched.

  Args:
    load: `[..., E]` int32. Assignments per expert before any drop.
    group_sizes: `[..., E]` int32. Rows per expert that were dispatched.

  Returns:
    `[...]` float32 in `[0, 1]`; 0 if nothing was routed.

  Raises:
    ValueError: if one does not hold int32 or int64, or the shapes differ.

  Example:
    >>> drop_fraction(jnp.array([6, 2]), jnp.array([4, 2]))
    Array(0.25, dtype=float32)
  """
  _check_counts("load", load)
  _check_counts("group_sizes", group_sizes)
  if load.shape != group_sizes.shape:
    raise ValueError(
      f"`group_sizes` must have the shape of `load`, {load.shape}, got"
      f" {group_sizes.shape}. Pass those of the same layers."
    )
  return total(load - group_sizes) / jnp.maximum(total(load), 1.0)


def bias_spread(expert_bias: jax.Array) -> jax.Array:
  """max(bias) - min(bias): the only part of its size that can affect selection.

  Args:
    expert_bias: `[..., E]` float32.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if it is a scalar or not floating point.

  Example:
    >>> bias_spread(jnp.array([5.0, 5.25, 4.5]))
    Array(0.75, dtype=float32)
  """
  fix = "Pass the bias of a layer, or of all in one array."
  checks.check_array(
    "expert_bias", expert_bias, "[..., E]", "floating point", fix
  )
  expert_bias = expert_bias.astype(jnp.float32)
  return jnp.max(expert_bias, axis=-1) - jnp.min(expert_bias, axis=-1)


def summary(
  load: types.PyTree, expert_bias: types.PyTree
) -> dict[str, jax.Array]:
  """The numbers worth logging every step, over all layers.

  Args:
    load: int32 pytree of `[..., E]` arrays, `[Lyr, E]` or a Flax collection.
    expert_bias: float32, with arrays of the same shapes in the same order.

  Returns:
    Scalars: `max_vio`, `load_cv`, `load_entropy` and `bias_spread` (means over
    layers) and `dead_experts` (the sum over them).

  Raises:
    ValueError: if there is no array, or the shapes differ.
  """
  loads, biases = jax.tree.leaves(load), jax.tree.leaves(expert_bias)
  for x in loads:
    _check_counts("load", x)
  shapes = [x.shape for x in loads]
  if not shapes or shapes != [np.shape(x) for x in biases]:
    raise ValueError(
      f"`expert_bias` must hold an array for each of `load`, of the shapes {shapes},"
      f" got {[np.shape(x) for x in biases]}. Pass both of one state."
    )

  def per_layer(
    metric: Callable[[jax.Array], jax.Array], arrays: list[jax.Array]
  ) -> jax.Array:
    return jnp.concatenate([metric(x).reshape(-1) for x in arrays])

  return {
    "max_vio": jnp.mean(per_layer(max_vio, loads)),
    "load_cv": jnp.mean(per_layer(coefficient_of_variation, loads)),
    "load_entropy": jnp.mean(per_layer(load_entropy, loads)),
    "dead_experts": jnp.sum(per_layer(dead_experts, loads), dtype=jnp.int32),
    "bias_spread": jnp.mean(per_layer(bias_spread, biases)),
  }


def _check_counts(name: str, counts: jax.Array) -> None:
  fix = (
    "Sum counts as int32: float rounding can flip the sign. Of a pytree, pass one"
    " array after the other."
  )
  dtype = "int32 or int64"
  checks.check_array(name, counts, "[..., E]", dtype, fix)
