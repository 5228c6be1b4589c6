# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Gradient accumulation: means of losses and gradients, sums of counts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import types

# (params, expert_bias, batch) -> (loss, (counts, metrics)); see `train_step`.
LossFn = Callable[
  [types.PyTree, types.PyTree, types.PyTree],
  tuple[jax.Array, tuple[types.Counts, dict[str, jax.Array]]],
]


def accumulated_grad(
  loss_fn: LossFn,
  params: types.PyTree,
  expert_bias: types.PyTree,
  batch: types.PyTree,
  micro_batches: int,
) -> Any:
  """Value and gradient of a loss, in micro-batches that route by the same bias.

  Args:
    loss_fn: as in `jaxroute.train_step`.
    params: what the gradient is to.
    expert_bias: what the loss function routes by.
    batch: pytree of arrays, `[B, ...]`.
    micro_batches: parts that the batch is processed in; divides B.

  Returns:
    `((loss, (counts, metrics)), gradient)`: counts are summed over the
    micro-batches, all else is averaged.

  Raises:
    ValueError: if `micro_batches` does not divide B.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if micro_batches == 1:
    return grad_fn(params, expert_bias, batch)
  parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)

  def body(total: Any, part: types.PyTree) -> tuple[Any, None]:
    return jax.tree.map(
      jnp.add, total, grad_fn(params, expert_bias, part)
    ), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(grad_fn, params, expert_bias, first),
  )
  ((loss, (counts, aux)), grads), _ = jax.lax.scan(body, zeros, parts)
  loss, aux, grads = jax.tree.map(
    lambda x: x / micro_batches, (loss, aux, grads)
  )
  return (loss, (counts, aux)), grads


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] to [parts, B / parts, ...], every part strided through the batch.

  Contiguous parts would live on a few devices each when B is sharded; strided
  ones are spread over all, without moving a row.
  """
  if parts < 1 or x.shape[0] % parts:
    raise ValueError(
      f"`micro_batches`={parts} must be at least 1 and divide the leading axis"
      f" of every array of `batch`, got shape {x.shape}."
    )
  return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
