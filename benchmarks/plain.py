# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What one writes without jaxroute, for benchmarks to compare with."""

import jax
import jax.numpy as jnp


def route(logits, expert_bias, config):
  """Routing and expert order as one writes them with `lax.top_k` and argsort.

  Args:
    logits: `[T, E]` float32.
    expert_bias: `[E]` float32, or None.
    config: by a sigmoid or a softmax; groups are worth their best two.

  Returns:
    `expert_idx`, `weights` and `load`, and the permutation into expert order and
    its inverse, as jaxroute has them.
  """
  t = logits.shape[0]
  if config.score_fn == "sigmoid":
    scores = jax.nn.sigmoid(logits)
  else:
    scores = jax.nn.softmax(logits)
  selection = scores if expert_bias is None else scores + expert_bias
  if config.num_groups > 1:
    grouped = selection.reshape(t, config.num_groups, config.group_size)
    group_score = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    kept = jax.lax.top_k(group_score, config.group_top_k)[1]
    keep = jax.nn.one_hot(kept, config.num_groups, dtype=jnp.bool_).any(axis=1)
    grouped = jnp.where(keep[:, :, None], grouped, -jnp.inf)
    selection = grouped.reshape(t, -1)
  expert_idx = jax.lax.top_k(selection, config.top_k)[1]
  weights = jnp.take_along_axis(scores, expert_idx, axis=1)
  weights = weights / weights.sum(axis=1, keepdims=True) * config.scaling_factor
  assigned = expert_idx.reshape(-1)
  load = jnp.bincount(assigned, length=config.num_experts)
  permutation = jnp.argsort(assigned, stable=True)
  inverse = jnp.zeros_like(permutation)
  inverse = inverse.at[permutation].set(jnp.arange(assigned.shape[0]))
  return expert_idx, weights, load, permutation, inverse
