# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checks counts of layers and loss functions against the state they are added to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import types


def of_layers(layers: Any, total: types.Counts) -> types.Counts:
  """Stacks what the layers counted, into the shapes of a state's counts.

  Args:
    layers: a `Routing`, an `MoEOutput` or a `Counts`, or a list of those.
    total: the counts of a state.

  Returns:
    `Counts` like `total`; histograms only if it has any.

  Raises:
    ValueError: if they do not fit.
  """
  parts = layers if isinstance(layers, list | tuple) else [layers]
  found = [_of_layer(part) for part in parts]
  if not found:
    raise ValueError(
      "`routing` must hold the counts of at least one layer, got none. Pass the"
      " routing of every layer at once."
    )
  apart = [c.parts for c in found if c.parts is not None]
  if len(apart) == len(found) and _shards(apart) is not None:
    found = sum_shards(apart)
  if total.histogram is None:
    found = [types.Counts(load=c.load) for c in found]
  elif any(c.histogram is None for c in found):
    raise ValueError(
      "`routing` must have a histogram, got None. Set `histogram=True` in the"
      " `RouterConfig`, or leave it out of `init_router_state`."
    )
  return jax.tree.map(_stack_like, total, *[_in_tree(c, total) for c in found])


def of_loss(
  counts: types.Counts | types.Parts, router: types.RouterState
) -> types.Counts:
  """What a loss function counted, in the tree structure of the state it is for.

  Args:
    counts: with loads shaped like the biases, in any structure; or their parts.
    router: the state.

  Returns:
    `Counts` like `router.counts`.

  Raises:
    ValueError: if they do not fit.
  """
  if router.counts.histogram is None:
    counts = dataclasses.replace(counts, histogram=None)
  elif counts.histogram is None:
    raise ValueError(
      "`loss_fn` must count a histogram, which the router state has, got None. Set"
      " `histogram=True` in the `RouterConfig`."
    )
  if isinstance(counts, types.Parts):
    (counts,) = sum_shards([counts])
  like_bias(counts, router.expert_bias)
  total, structure = jax.tree.flatten(router.counts)
  leaves = jax.tree.leaves(counts)
  return jax.tree.unflatten(
    structure, [x.astype(y.dtype) for x, y in zip(leaves, total, strict=True)]
  )


def of_parts(parts: types.Parts, total: types.Counts) -> types.Counts:
  """Counts that know their parts, where these are those of all layers.

  Args:
    parts: of the layers that have some.
    total: of all layers.

  Returns:
    `Counts` equal to `total`.
  """

  def structure(counts: types.Counts | types.Parts) -> Any:
    return jax.tree.structure((counts.load, counts.histogram))

  if structure(parts) != structure(total) or _shards([parts]) is None:
    return total
  return sum_shards([parts])[0].made_of(parts)


def sum_shards(parts: Sequence[types.Parts]) -> list[types.Counts]:
  """Sums what shards counted, all in one all-reduce.

  Args:
    parts: of the same number of shards.

  Returns:
    For each its `Counts`.
  """

  def shards_first(tree: types.PyTree, axis: int) -> types.PyTree:
    return jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), tree)

  apart = [
    types.Counts(
      load=shards_first(p.load, -2), histogram=shards_first(p.histogram, -3)
    )
    for p in parts
  ]
  leaves, structure = jax.tree.flatten(apart)
  shards = _shards(parts)
  rows = jnp.concatenate([x.reshape(shards, -1) for x in leaves], axis=1)
  total = jnp.sum(rows, axis=0, dtype=rows.dtype)
  ends = np.cumsum([math.prod(x.shape[1:]) for x in leaves])
  sums = jnp.split(total, ends[:-1])
  return jax.tree.unflatten(
    structure,
    [s.reshape(x.shape[1:]) for s, x in zip(sums, leaves, strict=True)],
  )


def like_bias(counts: types.Counts, expert_bias: types.PyTree) -> types.Counts:
  """`counts` in the tree structure of the biases, checked leaf by leaf.

  Args:
    counts: of all layers.
    expert_bias: `[Lyr, E]` float32, or a pytree of `[..., E]` arrays.

  Returns:
    `Counts` whose trees have the structure of `expert_bias`.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  biases = jax.tree.leaves(expert_bias)
  for x in biases:
    if x.dtype != jnp.float32:
      raise ValueError(
        f"`expert_bias` must be float32, got {x.dtype}. Leave it out of casts"
        " of the model."
      )
  shapes = [x.shape for x in biases]
  load = _in_structure("load", counts.load, shapes, expert_bias)
  histogram = counts.histogram
  if histogram is not None:
    shapes = [(*shape, types.HISTOGRAM_BINS) for shape in shapes]
    histogram = _in_structure("histogram", histogram, shapes, expert_bias)
  return types.Counts(load=load, histogram=histogram)


def _shards(parts: Sequence[types.Parts]) -> int | None:
  """S, if all have the same."""
  found = {x.shape[-2] for p in parts for x in jax.tree.leaves(p.load)}
  return found.pop() if len(found) == 1 else None


def _stack_like(total: jax.Array, *layers: jax.Array) -> jax.Array:
  """The counts of all layers, in the shape and dtype of `total`."""
  is_stacked = len(layers) == 1 and layers[0].ndim == total.ndim
  shapes = {jnp.shape(layer) for layer in layers}
  found = layers[0].shape if is_stacked else (len(layers), *min(shapes))
  if found != total.shape or len(shapes) > 1:
    raise ValueError(
      f"`routing` must hold counts of shape {total.shape} (layers, experts"
      f" ...), got {sorted(shapes)} of {len(layers)}. Pass the routing of every"
      " layer at once."
    )
  for layer in layers:
    _check_dtype("routing", layer)
  stacked = layers[0] if is_stacked else jnp.stack(layers)
  return stacked.astype(total.dtype)


def _of_layer(layer: Any) -> types.Counts:
  if isinstance(layer, types.MoEOutput):
    layer = layer.routing
  if isinstance(layer, types.Routing):
    layer = layer.counts
  if isinstance(layer, types.Counts):
    return layer
  fix = "Pass what `jaxroute.route` or the layers return."
  if isinstance(layer, Mapping):
    fix = "Pass `jaxroute.linen.counts(...)` of what `model.apply` counted."
  raise ValueError(
    "`routing` must be a `Routing`, an `MoEOutput`, a `Counts`, or a list of those"
    f" of all layers, got a {type(layer).__name__}. {fix}"
  )


def _in_tree(counts: types.Counts, like: types.Counts) -> types.Counts:
  """`counts` in the tree structure of a state's; a single layer needs no name."""
  leaves, structure = jax.tree.flatten(counts)
  expected = jax.tree.structure(like)
  names_no_layer = structure.num_leaves == expected.num_leaves and (
    len(jax.tree.leaves(like.load)) == 1
  )
  if structure != expected and not names_no_layer:
    raise ValueError(
      f"`routing` must hold counts in the tree structure of the state's, {expected},"
      f" got {structure}. For a linen model pass `jaxroute.linen.counts(...)` of"
      " what `model.apply` counted."
    )
  return jax.tree.unflatten(expected, leaves)


def _in_structure(
  name: str,
  tree: types.PyTree,
  shapes: Sequence[tuple[Any, ...]],
  like: types.PyTree,
) -> types.PyTree:
  """The arrays of `tree`, of these shapes, in the structure of another tree."""
  arrays = jax.tree.leaves(tree)
  found = [jnp.shape(x) for x in arrays]
  if found != shapes:
    raise ValueError(
      f"`{name}` must hold an array for each of `expert_bias`, of the shapes"
      f" {shapes}, got {found}."
    )
  for x in arrays:
    _check_dtype(name, x)
  return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _check_dtype(name: str, counts: jax.Array) -> None:
  # Fewer bits wrap, differences of unsigned counts do, and floats round.
  if counts.dtype not in (jnp.int32, jnp.int64):
    raise ValueError(
      f"`{name}` must hold int32 counts, got {counts.dtype}. Sum them as they come"
      " from `jaxroute.route`."
    )
  # States count in int32.
  if isinstance(counts, np.ndarray) and np.any(counts >= 2**31):
    raise ValueError(
      f"`{name}` must hold counts below 2**31, got {np.max(counts)}. Update more"
      " often."
    )
