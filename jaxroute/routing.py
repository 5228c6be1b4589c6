# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing with a selection bias: the one entry, and its XLA implementation.

The primal step of auxiliary-loss-free balancing: every token takes the K experts
with the largest score + bias, and is weighted by the scores alone.
"""

import jax
import jax.numpy as jnp

from jaxroute import scores as scores_lib
from jaxroute import types


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: types.Implementation | None = None,
) -> types.Routing:
  """Chooses K experts per token and weighs them; counts what was chosen.

  Experts are chosen by `scores + expert_bias` (ties: the lowest index), weighted
  by their unbiased scores. Gradients flow to `logits` through the weights only;
  the bias gets none. A NaN logit never beats a finite one; a token that has to
  choose one gets NaN weights and is left out of `load`.

  Args:
    logits: `[T, E]` floating point. Router projection output; -inf masks an
      expert.
    expert_bias: `[E]` float32. The dual variable, or None for no bias.
    config: what to compute; static.
    token_mask: `[T]` bool. False marks padding: weight 0, not counted.
    implementation: "xla", "tpu", "gpu", or None for the best one here.

  Returns:
    A `Routing`; on T = 0 its arrays are empty and `load` is zero.

  Raises:
    ValueError: if a shape or dtype does not fit `config`.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.

  Example:
    >>> config = types.RouterConfig(num_experts=4, top_k=2)
    >>> logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    >>> route(logits, jnp.zeros(4), config).expert_idx
    Array([[1, 2]], dtype=int32)
    >>> bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    >>> route(logits, bias, config).expert_idx
    Array([[3, 1]], dtype=int32)

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, section 3.
    DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 12 to 16.
  """
  check_inputs(logits, expert_bias, config, token_mask)
  if implementation not in (None, "xla", "tpu", "gpu"):
    raise ValueError(
      "`implementation` must be None, 'xla', 'tpu' or 'gpu', got"
      f" {implementation!r}."
    )
  if implementation in ("tpu", "gpu"):
    raise NotImplementedError(
      f"there is no {implementation!r} routing kernel in this version; use"
      " `implementation=None` or 'xla', which runs on every platform."
    )
  with jax.named_scope("jaxroute.route"):
    return _route_xla(logits, expert_bias, config, token_mask)


def check_inputs(logits, expert_bias, config, token_mask) -> None:
  """Raises ValueError unless the arguments of `route` fit together."""
  if logits.ndim != 2 or logits.shape[1] != config.num_experts:
    raise ValueError(
      f"`logits` must be [T, E={config.num_experts}], got shape"
      f" {logits.shape}. Flatten batch and sequence into T."
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      f"`logits` must be floating point, got {logits.dtype}. Pass the router"
      " projection's output, not indices."
    )
  if expert_bias is not None:
    if expert_bias.shape != (config.num_experts,):
      raise ValueError(
        f"`expert_bias` must be [E={config.num_experts}], got shape"
        f" {expert_bias.shape}. Pass the row of one layer."
      )
    if expert_bias.dtype != jnp.float32:
      raise ValueError(
        f"`expert_bias` must be float32, got {expert_bias.dtype}. Leave it out"
        " of casts of the model: lower precision changes which experts win."
      )
  if token_mask is not None:
    if token_mask.shape != logits.shape[:1] or token_mask.dtype != jnp.bool_:
      raise ValueError(
        f"`token_mask` must be bool [T={logits.shape[0]}], got"
        f" {token_mask.dtype} {token_mask.shape}. True marks real tokens."
      )


def _route_xla(logits, expert_bias, config, token_mask):
  selection = scores_lib.selection_scores(logits, expert_bias, config)
  if config.group_top_k < config.num_groups:
    selection = _keep_best_groups(selection, config)
  k = config.top_k
  top, idx = jax.lax.top_k(selection, min(k + 1, config.num_experts))
  expert_idx = idx[:, :k].astype(jnp.int32)
  if k < config.num_experts:
    cutoff = top[:, k]
  else:
    cutoff = jnp.full(logits.shape[:1], -jnp.inf)
  weights, token_mask = _weigh(logits, expert_idx, config, token_mask)
  chosen = expert_idx[:, :, None] == jnp.arange(config.num_experts)
  load = jnp.sum(chosen & token_mask[:, None, None], axis=(0, 1), dtype=jnp.int32)
  return types.Routing(
    expert_idx=expert_idx,
    weights=weights,
    load=load,
    cutoff=cutoff,
    token_mask=token_mask,
  )


def _keep_best_groups(selection, config):
  """Sets the selection scores outside the best `group_top_k` groups to -inf."""
  t = selection.shape[0]
  grouped = selection.reshape(t, config.num_groups, config.group_size)
  count = {
    "top1": 1,
    "top2": 2,
    "top_k": config.top_k // config.group_top_k,
  }[config.group_score]
  best, _ = jax.lax.top_k(grouped, count)
  group_score = best[..., 0]
  for i in range(1, count):
    group_score = group_score + best[..., i]
  # inf + -inf: a group with an infinite member is the best there is.
  group_score = jnp.where(best[..., 0] == jnp.inf, jnp.inf, group_score)
  _, kept = jax.lax.top_k(group_score, config.group_top_k)
  keep = jnp.any(kept[..., None] == jnp.arange(config.num_groups), axis=1)
  return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(t, -1)


def _weigh(logits, expert_idx, config, token_mask):
  """Weights of the chosen experts, and the mask less the NaN tokens."""
  if token_mask is not None:
    # Before the scores, not after: 0 * NaN in the backward pass is NaN.
    logits = jnp.where(token_mask[:, None], logits, 0.0)
  logits = scores_lib.prepare_logits(logits, config)
  if config.score_after_top_k:
    chosen = jnp.take_along_axis(logits, expert_idx, axis=1)
    weights = scores_lib.score(chosen, config.score_fn)
  else:
    scores = scores_lib.score(logits, config.score_fn)
    weights = jnp.take_along_axis(scores, expert_idx, axis=1)
  if config.normalize_weights:
    total = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / (total + config.norm_eps)
  weights = weights * config.scaling_factor
  is_nan = jnp.any(jnp.isnan(weights), axis=1)
  if token_mask is None:
    token_mask = jnp.ones(logits.shape[:1], jnp.bool_)
  weights = jnp.where(is_nan[:, None], jnp.nan, weights)
  weights = jnp.where(token_mask[:, None], weights, 0.0)
  return weights, token_mask & ~is_nan
