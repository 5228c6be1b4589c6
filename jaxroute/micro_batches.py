# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Gradient accumulation: means of losses and gradients, sums of counts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks, types

# (params, expert_bias, batch, **more) -> (loss, (counts, metrics, *more)); see
# `train_step`.
LossFn = Callable[..., tuple[jax.Array, tuple[Any, ...]]]
WeightFn = Callable[[types.PyTree], jax.Array]


class Accumulated(NamedTuple):
  """What all micro-batches of a batch come to.

  Attributes:
    weight: `[]` float32. The sum of their weights; 1 or 0 if there is one only, whose
      mean would be rounded twice if it were multiplied by a weight and divided again.
    loss: `[]` float32, or float64. The weighted mean.
    metrics: the weighted means, float32 or wider.
    grads: the weighted means, of the dtypes of the parameters.
    counts: summed over the micro-batches; over the shards only if `Counts`.
    variables: as the last micro-batch left them.
  """

  weight: jax.Array
  loss: jax.Array
  metrics: dict[str, Any]
  grads: types.PyTree
  counts: types.Counts | types.Parts
  variables: types.PyTree


def accumulated_grad(
  loss_fn: LossFn,
  params: types.PyTree,
  expert_bias: types.PyTree,
  batch: types.PyTree,
  *,
  micro_batches: int = 1,
  weight_fn: WeightFn | None = None,
  rng: jax.Array | None = None,
  variables: types.PyTree = None,
) -> Accumulated:
  """Value and gradient of a loss, in micro-batches that route by the same bias.

  Args:
    loss_fn: as in `jaxroute.train_step`.
    params: what the gradient is to.
    expert_bias: what the loss function routes by.
    batch: pytree of arrays, `[B, ...]`.
    micro_batches: parts that the batch is processed in; divides B.
    weight_fn: as in `jaxroute.train_step`.
    rng: a random key; micro-batch i gets `jax.random.fold_in(rng, i)`.
    variables: handed from one micro-batch to the next.

  Returns:
    An `Accumulated`, which is 0 in its means where the weight is.

  Raises:
    ValueError: if `micro_batches` is no int that divides B, a parameter is not a
      floating-point array, or a function returns what it should not.
  """
  fix = "1 takes the batch as a whole."
  micro_batches = checks.as_int("micro_batches", micro_batches, fix)
  _check_are_floats(params)

  def run(index: Any, part: types.PyTree, variables: types.PyTree) -> Any:
    """Of one micro-batch: what adds up, and the variables."""
    key = None if rng is None else jax.random.fold_in(rng, index)
    value_and_grad = jax.value_and_grad(
      functools.partial(call_loss, loss_fn), has_aux=True
    )
    (loss, (counts, metrics, variables)), grads = value_and_grad(
      params, expert_bias, part, key, variables
    )
    weight = _weight(weight_fn, part)
    if micro_batches == 1:
      weight = jnp.where(weight > 0, 1, weight)
    weigh = _widened if weight_fn is None else functools.partial(_times, weight)
    weighted = jax.tree.map(weigh, (loss, metrics, grads))
    return (weight, weighted, counts), variables

  if micro_batches == 1:
    total, variables = run(0, batch, variables)
  else:
    total, variables = _scan(run, _split(batch, micro_batches), variables)
  weight, weighted, counts = total
  divisor = jnp.where(weight == 0, 1, weight)
  loss, metrics, grads = jax.tree.map(
    lambda x: x / divisor.astype(x.dtype), weighted
  )
  grads = jax.tree.map(
    lambda g, p: g.astype(jnp.asarray(p).dtype), grads, params
  )
  return Accumulated(weight, loss, metrics, grads, counts, variables)


def call_loss(
  loss_fn: LossFn,
  params: types.PyTree,
  expert_bias: types.PyTree,
  batch: types.PyTree,
  rng: jax.Array | None = None,
  variables: types.PyTree = None,
) -> tuple[
  jax.Array, tuple[types.Counts | types.Parts, dict[str, Any], types.PyTree]
]:
  """Calls a loss function with what it takes, and checks what it returns.

  Args:
    loss_fn: as in `jaxroute.train_step`.
    params: first argument.
    expert_bias: second argument.
    batch: third argument.
    rng: keyword argument, unless it is None.
    variables: keyword argument, unless it is None.

  Returns:
    `(loss, (counts, metrics, variables))`. The counts are one part a shard where
    they can be, which `jaxroute.counts.of_loss` sums.

  Raises:
    ValueError: if `loss_fn` returns something else.
  """
  more = {"rng": rng, "variables": variables}
  out = loss_fn(
    params,
    expert_bias,
    batch,
    **{name: value for name, value in more.items() if value is not None},
  )
  names = ["counts", "metrics"] + ["variables"] * (variables is not None)
  if not (_is_tuple(out, 2) and _is_tuple(out[1], len(names))):
    raise ValueError(
      f"`loss_fn` must return (loss, ({', '.join(names)})), got {checks.describe(out)}."
      " Where there are no metrics, return an empty dict."
    )
  loss, (counts, metrics, *after) = out
  if jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
    raise ValueError(
      "`loss_fn` must return a floating-point scalar as the loss, got"
      f" {checks.describe(loss)}. Take the mean over the batch."
    )
  if not isinstance(counts, types.Counts):
    raise ValueError(
      f"`loss_fn` must return (loss, ({', '.join(names)})) with a"
      f" `jaxroute.Counts`, got {checks.describe(counts)} for the counts. Wrap the"
      " loads: `jaxroute.Counts(load=...)`, or `jaxroute.linen.counts(...)`."
    )
  if not isinstance(metrics, Mapping):
    raise ValueError(
      f"`loss_fn` must return a dict of metrics, got {checks.describe(metrics)}."
    )
  for path, x in jax.tree_util.tree_leaves_with_path(dict(metrics)):
    if not _is_number(x, complex_too=True):
      raise ValueError(
        "`loss_fn` must return metrics of numbers, whose means are taken, got"
        f" {checks.describe(x)} at metrics{jax.tree_util.keystr(path)}. Leave it out."
      )
  if after:
    _check_is_alike(after[0], variables)
  counts = counts.parts or counts
  return loss, (counts, dict(metrics), after[0] if after else None)


def norm(grads: types.PyTree) -> tuple[jax.Array, jax.Array]:
  """The Euclidean norm of gradients, and whether they are finite.

  Args:
    grads: pytree of arrays.

  Returns:
    `[]` float32, or float64 if a gradient is: squares of large and small
    gradients neither overflow nor vanish. `[]` bool, of the gradients and not of
    the norm.
  """
  sizes = [jnp.abs(_widened(g)) for g in jax.tree.leaves(grads)]
  is_double = any(x.dtype == jnp.float64 for x in sizes)
  dtype = jnp.float64 if is_double else jnp.float32
  sizes = [x.astype(dtype) for x in sizes]
  largest = functools.reduce(
    jnp.maximum, [jnp.max(x, initial=0) for x in sizes], jnp.zeros((), dtype)
  )
  is_finite = jnp.isfinite(largest)
  unit = jnp.where(is_finite & (largest > 0), largest, 1)
  squares = [jnp.sum((x / unit) ** 2) for x in sizes]
  return unit * jnp.sqrt(sum(squares, jnp.zeros((), dtype))), is_finite


def multi_steps(
  before: types.PyTree, after: types.PyTree
) -> tuple[jax.Array | bool, jax.Array | bool]:
  """What the `optax.MultiSteps` in an optimizer did in an update.

  Args:
    before: the state of the optimizer.
    after: the state that the update returned.

  Returns:
    Two `[]` bools: whether it took the gradient, and whether the parameters
    moved. Both are true of an optimizer without `MultiSteps`.
  """

  def leaves(state: types.PyTree) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=_is_multi_steps)

  is_taken, is_moved = [], []
  for old, new in zip(leaves(before), leaves(after), strict=True):
    if _is_multi_steps(old):
      # One within another moves nothing unless both do.
      _, inner_moved = multi_steps(old.inner_opt_state, new.inner_opt_state)
      emitted = new.gradient_step != old.gradient_step
      is_taken.append(emitted | (new.mini_step != old.mini_step))
      is_moved.append(emitted & inner_moved)
  if not is_taken:
    return True, True
  return jnp.any(jnp.stack(is_taken)), jnp.any(jnp.stack(is_moved))


def _is_multi_steps(x: Any) -> bool:
  return isinstance(x, optax.MultiStepsState)


def _scan(run: Callable[..., Any], parts: types.PyTree, variables: Any) -> Any:
  """Adds up over the micro-batches, and hands on the variables."""

  def body(carry: Any, part: Any) -> tuple[Any, None]:
    total, variables = carry
    more, variables = run(*part, variables)
    return (jax.tree.map(jnp.add, total, more), variables), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    jnp.zeros_like, jax.eval_shape(run, *first, variables)[0]
  )
  return jax.lax.scan(body, (zeros, variables), parts)[0]


def _split(batch: types.PyTree, parts: int) -> tuple[jax.Array, types.PyTree]:
  """The numbers of the parts, and [B, ...] as [parts, B / parts, ...].

  Every part is strided through the batch. Contiguous parts would live on a few
  devices each when B is sharded; strided ones are spread over all, without
  moving a row.
  """

  def split(path: Any, x: jax.Array) -> jax.Array:
    shape = jnp.shape(x)
    if not shape or shape[0] % parts:
      raise ValueError(
        f"`micro_batches`={parts} must divide the leading axis of every array of"
        f" `batch`, got shape {shape} at batch{jax.tree_util.keystr(path)}. Random"
        " keys are given as `rng`, other scalars with an axis of the batch's size."
      )
    shape = shape[0] // parts, parts, *shape[1:]
    return jnp.swapaxes(jnp.reshape(x, shape), 0, 1)

  return jnp.arange(parts), jax.tree_util.tree_map_with_path(split, batch)


def _weight(weight_fn: WeightFn | None, part: types.PyTree) -> jax.Array:
  if weight_fn is None:
    return jnp.ones((), jnp.float32)
  weight = weight_fn(part)
  if not _is_number(weight, complex_too=False) or jnp.shape(weight):
    raise ValueError(
      f"`weight_fn` must return a real scalar, got {checks.describe(weight)}. Return"
      " the number of tokens that count: `jnp.sum(batch['token_mask'])`."
    )
  return _widened(weight)


def _is_number(x: Any, *, complex_too: bool) -> bool:
  """Whether `x` is an array of numbers or bools, or one of Python's."""
  if isinstance(x, bool | int | float) or (complex_too and type(x) is complex):
    return True
  dtype = getattr(x, "dtype", None)
  if dtype is None or not hasattr(x, "shape"):
    return False
  kinds = jnp.bool_, jnp.integer, jnp.floating
  kinds += (jnp.complexfloating,) if complex_too else ()
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _times(weight: jax.Array, x: jax.Array) -> jax.Array:
  """The product, wide enough to add up; 0 of anything, NaN too, is 0."""
  x = _widened(x)
  product = x * weight.astype(x.dtype)
  return jnp.where(weight == 0, jnp.zeros_like(product), product)


def _widened(x: jax.typing.ArrayLike) -> jax.Array:
  """As float32, or as it is if it is float64 or complex."""
  x = jnp.asarray(x)
  is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
  return x if is_wide else x.astype(jnp.float32)


def _check_are_floats(params: types.PyTree) -> None:
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
      raise ValueError(
        "`params` must hold floating-point arrays, got"
        f" {checks.describe(x)} at params{jax.tree_util.keystr(path)}. What is not"
        " trained goes into `variables`."
      )


def _check_is_alike(after: types.PyTree, before: types.PyTree) -> None:
  """Variables keep their types, or the next step would be compiled anew."""
  expected, found = [
    jax.tree.map(checks.describe, jax.eval_shape(lambda x: x, tree))
    for tree in (before, after)
  ]
  if jax.tree.flatten(expected) != jax.tree.flatten(found):
    raise ValueError(
      f"`loss_fn` must return variables like those it gets, {expected}, got"
      f" {found}. Keep their names, shapes and dtypes."
    )


def _is_tuple(x: Any, size: int) -> bool:
  return isinstance(x, tuple | list) and len(x) == size
