# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Auxiliary losses: optional partners of the selection bias, or its baselines.

They come without their coefficient and are means over the tokens of the mask.
They see unbiased scores only, so the bias gets no gradient from them either.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxroute import checks, metrics, types
from jaxroute import routing as routing_lib
from jaxroute import scores as scores_lib
from jaxroute.parallel import mesh


def switch(
  logits: jax.Array, routing: types.Routing, config: types.RouterConfig
) -> jax.Array:
  """Switch load-balancing loss, `E * sum_e f_e P_e`.

  `f_e` is the share of the assignments that expert e got, and `P_e` its mean
  score, where the scores of each token are normalised to sum to 1. The loss is
  1 at perfect balance.

  Args:
    logits: `[T, E]` floating point, as they were routed.
    routing: what `jaxroute.route` returned for them.
    config: static router description.

  Returns:
    `[]` float32. The gradient flows through `P` only.

  Raises:
    ValueError: if a shape or dtype does not fit.

  References:
    Fedus et al., 2021, https://arxiv.org/abs/2101.03961, equation 4.
  """
  routing_lib.check_inputs(logits, None, config, None)
  routing_lib.check_routing(routing, logits.shape[0], config)
  return global_batch(logits, routing.load, config, routing.token_mask)


def global_batch(
  logits: jax.Array,
  load: jax.Array,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """The Switch loss with the assignment shares of the global batch.

  With the load of each micro-batch for itself, the loss would ask every
  micro-batch to be balanced by itself. Pass the load summed over micro-batches
  and devices.

  Args:
    logits: `[T, E]` floating point, of this micro-batch.
    load: `[E]` int32. Assignments per expert of the global batch.
    config: static router description.
    token_mask: `[T]` bool. False tokens are left out of the mean scores.

  Returns:
    `[]` float32; 0 if no token counts.

  Raises:
    ValueError: if a shape or dtype does not fit.

  References:
    Qiu et al., 2025, https://arxiv.org/abs/2501.11873, equation 4.
  """
  routing_lib.check_inputs(logits, None, config, token_mask)
  checks.check_array(
    "load",
    load,
    "[E]",
    "int32 or int64",
    "Pass the load of one layer, summed over micro-batches and devices.",
    E=config.num_experts,
  )
  share = load.astype(jnp.float32) / jnp.maximum(metrics.total(load), 1.0)
  mean_score = _mean_score(logits, config, token_mask)
  return config.num_experts * jnp.sum(jax.lax.stop_gradient(share) * mean_score)


def sequence_wise(
  logits: jax.Array,
  config: types.RouterConfig,
  num_sequences: int,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """DeepSeek-V3's complementary loss: balance within every sequence.

  The assignment shares are those of the *unbiased* top-k over all experts, as
  in the paper, not of the routes taken.

  Args:
    logits: `[T, E]` floating point. Sequences of equal length one after the
      other.
    config: static router description.
    num_sequences: how many sequences; divides T.
    token_mask: `[T]` bool. False tokens are left out.

  Returns:
    `[]` float32, the mean over sequences that have a token.

  Raises:
    ValueError: if `num_sequences` does not divide T, or a shape or dtype does
      not fit.

  References:
    DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 17 to 20.
  """
  routing_lib.check_inputs(logits, None, config, token_mask)
  t, e = logits.shape
  fix = f"It divides T={t}."
  num_sequences = checks.as_int("num_sequences", num_sequences, fix, low=0)
  if num_sequences < 1 or t % num_sequences:
    raise ValueError(
      f"`num_sequences` must divide T={t}, got {num_sequences}. `logits` holds"
      " whole sequences of one length, padded if need be."
    )
  # The shares are those of a router without groups (equation 18).
  ungrouped = dataclasses.replace(
    config, num_groups=1, group_top_k=1, histogram=False
  )
  if token_mask is None:
    # Sharded as the logits are.
    token_mask = jnp.ones_like(logits[:, 0], jnp.bool_)

  def loss_of_one(logits: jax.Array, token_mask: jax.Array) -> jax.Array:
    routing = routing_lib.route(logits, None, ungrouped, token_mask)
    return global_batch(logits, routing.load, config, routing.token_mask)

  axes = _axes_of_sequences(logits, num_sequences)
  token_masks = mesh.reshape(token_mask, (num_sequences, -1), (axes, ()))
  logits = mesh.reshape(logits, (num_sequences, -1, e), (axes, (), ()))
  losses = jax.vmap(loss_of_one)(logits, token_masks)
  # A sequence without a token has a loss of 0 and does not count.
  num_counted = jnp.sum(jnp.any(token_masks, axis=1))
  return jnp.sum(losses) / _at_least_one(num_counted)


def _axes_of_sequences(
  logits: jax.Array, num_sequences: int
) -> tuple[str, ...]:
  """The explicit axes that whole sequences are sharded over."""
  partition = mesh.partition_of(logits, None)
  if partition is None:
    return ()
  shards = math.prod(
    mesh.mesh_of(partition, logits).shape[axis] for axis in partition.token_axes
  )
  # A sequence that lies on several devices is gathered, as all others are.
  return () if num_sequences % shards else partition.token_axes


def z_loss(logits: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Router z-loss: the mean of `logsumexp(logits) ** 2`.

  Args:
    logits: `[T, E]` floating point.
    token_mask: `[T]` bool. False tokens are left out.

  Returns:
    `[]` float32; 0 if no token counts.

  Raises:
    ValueError: if a shape or dtype does not fit.

  References:
    Zoph et al., 2022, https://arxiv.org/abs/2202.08906, equation 5.
  """
  fix = "Flatten batch and sequence into T."
  checks.check_array("logits", logits, "[T, E]", "floating point", fix)
  checks.check_mask(token_mask, logits.shape[0])
  logits = logits.astype(jnp.float32)
  if token_mask is None:
    token_mask = jnp.ones(logits.shape[:1], jnp.bool_)
  logits = jnp.where(token_mask[:, None], logits, 0.0)
  z = jax.nn.logsumexp(logits, axis=-1) ** 2
  # Divided first: the sum over the tokens may be too large for float32.
  z = z / _at_least_one(jnp.sum(token_mask))
  return jnp.sum(jnp.where(token_mask, z, 0.0))


def _at_least_one(count: jax.Array) -> jax.Array:
  """A count as a divisor, in float32."""
  return jnp.maximum(count, 1).astype(jnp.float32)


def _mean_score(
  logits: jax.Array,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> jax.Array:
  """`[E]` mean over tokens of their scores, which sum to 1 in each token."""
  if token_mask is None:
    token_mask = jnp.ones(logits.shape[:1], jnp.bool_)
  logits = jnp.where(token_mask[:, None], logits, 0.0)
  terms = scores_lib.terms(
    scores_lib.prepare_logits(logits, config), config.score_fn
  )
  scores = scores_lib.weights(
    terms, dataclasses.replace(config, normalize_weights=True)
  )
  scores = jnp.where(token_mask[:, None], scores, 0.0)
  return jnp.sum(scores, axis=0) / _at_least_one(jnp.sum(token_mask))
